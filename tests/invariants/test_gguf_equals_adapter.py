"""What llama.cpp computes from our GGUF is what the adapter computed, for every kind; broken files are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from model_foundry.export.gguf import GgufFile, write_gguf
from model_foundry.export.llama_cpp import LlamaCpp
from model_foundry.export.measure import Subject, check_gguf
from model_foundry.export.merge import Merge, plan_merge
from model_foundry.export.parity import make_probe
from model_foundry.models.llama_cpp import private_socket
from model_foundry.types import Check, Message
from tests.tiny_exports import KINDS, make_subject


def write(path: Path, subject: Subject, merge: Merge, format: str, *, template: str | None = None) -> GgufFile:
    renderer = subject.renderer
    return write_gguf(
        path, merge, format=format, tokenizer=renderer.tokenizer, name="tiny",
        chat_template=renderer.template_text if template is None else template,
        stop_token_ids=renderer.stop_token_ids,
    )  # fmt: skip


def failures(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.evidence for check in checks if not check.passed}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_the_adapter_does(tmp_path: Path, kind: str) -> None:
    subject = make_subject(tmp_path, kind)
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    for format in ("f32", "f16", "q8_0"):
        written = write(tmp_path / f"{format}.gguf", subject, merge, format)
        checks = check_gguf(written, subject, merge, probe, readers=("llama.cpp",))
        assert failures(checks) == {}, format
        values = {check.name: check.value for check in checks}
        assert {"llama.cpp: logits", "llama.cpp: distribution", "llama.cpp: adapter's effect"} <= values.keys()
        if format == "f32":
            assert float(values["llama.cpp: logits"] or 0.0) < 1e-9


# What a run from nothing may have: odd widths, heads of any size, one layer, one head, more rows than tokens.
ODD: dict[str, dict[str, Any]] = {
    "a byte a token": {"vocab_size": 259},
    "odd widths": {"hidden_size": 33, "intermediate_size": 51, "num_attention_heads": 3, "num_key_value_heads": 1,
                   "head_dim": 6},
    "one of each": {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2},
    "reserved rows": {"vocab_size": 503},
}  # fmt: skip


@pytest.mark.parametrize("shape", ODD)
def test_llama_cpp_loads_small_tied_models_of_every_shape(tmp_path: Path, shape: str) -> None:
    """llama.cpp refused a vocabulary of single bytes: the list of merges, which was empty, had been left out."""
    bytes_only = ODD[shape].get("vocab_size") == 259
    subject = make_subject(tmp_path, "llama-tied", tokenizer_size=259 if bytes_only else 500, **ODD[shape])
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    for format in ("f16", "q8_0"):
        written = write(tmp_path / f"{format}.gguf", subject, merge, format)
        assert failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",))) == {}, format


def swap_rows(path: Path) -> None:
    """Query rows left as Hugging Face orders them: the classic mistake, and it loads without a word."""
    reader = GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    rows = tensor.data.shape[0]
    tensor.data[:] = tensor.data.reshape(4, rows // 8, 2, -1).swapaxes(1, 2).reshape(tensor.data.shape).copy()
    np.memmap.flush(reader.data)


def set_number(path: Path, key: str, value: float) -> None:
    reader = GGUFReader(path, "r+")
    reader.fields[key].parts[-1][0] = value
    np.memmap.flush(reader.data)


def rename_tensor(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b"blk.1.ffn_norm.weight") == 1
    path.write_bytes(data.replace(b"blk.1.ffn_norm.weight", b"blk.7.ffn_norm.weight"))


BREAK: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "swapped rows of the queries": (lambda path, _: swap_rows(path), "llama.cpp: logits"),
    "wrong rope base": (lambda path, arch: set_number(path, f"{arch}.rope.freq_base", 5e5), "llama.cpp: logits"),
    "wrong end of turn": (lambda path, _: set_number(path, "tokenizer.ggml.eot_token_id", 5), "gguf: stop tokens"),
    "a tensor of another name": (lambda path, _: rename_tensor(path), "llama.cpp: readable"),
}


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe"])
def test_a_file_that_was_broken_is_caught(tmp_path: Path, kind: str, how: str) -> None:
    subject = make_subject(tmp_path, kind)
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    written = write(tmp_path / "good.gguf", subject, merge, "f32")
    assert failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",))) == {}
    damage, expected = BREAK[how]
    damage(written.path, kind.replace("-", ""))
    assert expected in failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",)))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3-moe"])
def test_a_dropped_adapter_is_caught(tmp_path: Path, kind: str) -> None:
    """The base under the run's name answers fluently, and knows nothing that was taught."""
    subject = make_subject(tmp_path, kind)
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    written = write(tmp_path / "base.gguf", subject, plan_merge(subject.base, None), "f32")
    failed = failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",)))
    assert {"llama.cpp: logits", "llama.cpp: adapter's effect"} <= failed.keys()
    if kind == "llama":
        assert "instead of" in failed["llama.cpp: greedy answers"]


def test_llama_cpp_stops_at_the_tokens_that_the_file_names_and_at_no_other(tmp_path: Path) -> None:
    """A stop token that is only listed lets a model talk to itself."""
    subject = make_subject(tmp_path)
    merge, renderer = plan_merge(subject.base, subject.adapter), subject.renderer
    spelled = renderer.tokenizer.encode("b")[-1]
    for stops, wanted in {renderer.stop_token_ids: False, (*renderer.stop_token_ids, spelled): True}.items():
        written = write_gguf(
            tmp_path / f"{len(stops)}.gguf", merge, format="f32", tokenizer=renderer.tokenizer, name="tiny",
            chat_template=renderer.template_text, stop_token_ids=stops,
        )  # fmt: skip
        with private_socket() as socket:
            size = renderer.tokenizer.vocab_size
            model = LlamaCpp(written.path, socket=socket, context=32, vocab_size=size, spelled=spelled)
        start = renderer.prompt(subject.prompts[0]).tolist()
        assert all(model.stops_at(start, stop) for stop in renderer.stop_token_ids)
        assert model.stops_at(start, spelled) == wanted


def test_a_template_without_its_newline_is_caught(tmp_path: Path) -> None:
    subject = make_subject(tmp_path)
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    template = subject.renderer.template_text.replace("\n", "", 1)
    written = write(tmp_path / "template.gguf", subject, merge, "f32", template=template)
    failed = failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",)))
    assert "differs from character" in failed["gguf: chat template"]


def test_another_splitting_with_as_many_tokens_is_caught(tmp_path: Path) -> None:
    """Numbers of tokens were compared: I 'M a and I ' Ma are both three, and another prompt to the model."""
    made = make_subject(tmp_path, merges=(("'", "M"), ("M", "a")))
    subject = replace(made, prompts=((Message("user", "I'Ma"),),))
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    written = write(tmp_path / "split.gguf", subject, merge, "f32")
    assert failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",))) == {}
    reader = GGUFReader(written.path, "r+")
    reader.fields["tokenizer.ggml.pre"].parts[-1][:] = np.frombuffer(b"qwen2", dtype=np.uint8)  # it was gpt-2
    np.memmap.flush(reader.data)
    failed = failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",)))
    tokenizer = subject.renderer.tokenizer
    mine, theirs = tokenizer.encode("'Ma"), [tokenizer.backend.token_to_id("'M"), *tokenizer.encode("a")]
    assert len(mine) == len(theirs)
    assert f"{theirs}"[:-1] in failed["llama.cpp: token ids"]
    assert f"instead of {mine}"[:-1] in failed["llama.cpp: token ids"]


def test_a_file_cut_in_half_is_one_sentence(tmp_path: Path) -> None:
    subject = make_subject(tmp_path)
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    written = write(tmp_path / "cut.gguf", subject, merge, "f32")
    data = written.path.read_bytes()
    # The header stays whole, so that the file looks like one.
    written.path.write_bytes(data[: len(data) - 20_000])
    failed = failures(check_gguf(written, subject, merge, probe, readers=("llama.cpp",)))
    assert failed
    assert all("Traceback" not in text for text in failed.values())


@pytest.mark.slow
def test_transformers_reads_the_same_model_and_names_the_tensor_that_differs(tmp_path: Path) -> None:
    """Other code than ours turns the file back: weight by weight, token by token."""
    subject = make_subject(tmp_path)
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    written = write(tmp_path / "good.gguf", subject, merge, "f32")
    checks = check_gguf(written, subject, merge, probe, readers=("transformers",))
    assert failures(checks) == {}
    assert {"gguf: weights", "gguf: configuration", "gguf: token ids"} <= {check.name for check in checks}
    swap_rows(written.path)
    failed = failures(check_gguf(written, subject, merge, probe, readers=("transformers",)))
    assert "model.layers.0.self_attn.q_proj.weight is off by" in failed["gguf: weights"]
    assert "gguf: logits" in failed
