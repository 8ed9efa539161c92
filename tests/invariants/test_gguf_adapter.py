"""An adapter's GGUF on the base's GGUF is the adapter: what llama.cpp computes with both, for every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from model_foundry.errors import CheckFailedError, ModelError, UsageError
from model_foundry.export.gguf_adapter import GgufAdapter, write_gguf_adapter
from model_foundry.export.hand_over import export
from model_foundry.export.measure import Subject, check_gguf_adapter
from model_foundry.export.merge import Merge, plan_merge
from model_foundry.export.modelfile import read_modelfile
from model_foundry.export.parity import make_probe
from model_foundry.export.verify import verify_export
from model_foundry.models import llama_cpp
from model_foundry.types import Check, LoraConfig
from tests.tiny_adapters import head_adapter
from tests.tiny_exports import make_subject


def measured(subject: Subject, merge: Merge, written: GgufAdapter) -> dict[str, Check]:
    probe = make_probe(merge, subject.renderer, subject.prompts)
    return {check.name: check for check in check_gguf_adapter(written.path, written.format, subject, merge, probe)}


def failures(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.evidence for name, check in checks.items() if not check.passed}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_llama_cpp_with_the_adapter_computes_what_the_adapter_does(tmp_path: Path, kind: str) -> None:
    """Query rows in the wrong order, experts in the wrong stack, a scale that is not alpha / r."""
    subject = make_subject(tmp_path, kind, lora=LoraConfig(r=4, lora_alpha=6))
    merge = plan_merge(subject.base, subject.adapter)
    for format in ("f32", "bf16"):
        written = write_gguf_adapter(tmp_path / f"{format}.gguf", merge, format=format, name="tiny")
        checks = measured(subject, merge, written)
        assert failures(checks) == {}, format
        if format == "f32":
            assert float(checks["llama.cpp: logits"].value or 0) < 1e-9


def test_a_rank_stabilised_scale_is_kept(tmp_path: Path) -> None:
    """lora_alpha as it stands would make the adapter half as strong at rank four."""
    subject = make_subject(tmp_path, lora=LoraConfig(r=4, lora_alpha=2, use_rslora=True))
    merge = plan_merge(subject.base, subject.adapter)
    written = write_gguf_adapter(tmp_path / "a.gguf", merge, format="f32", name="tiny")
    assert failures(measured(subject, merge, written)) == {}


def test_an_adapter_on_a_head_of_its_own_is_written_and_on_a_tied_one_refused(tmp_path: Path) -> None:
    subject = make_subject(tmp_path / "own")
    merge = plan_merge(subject.base, head_adapter(tmp_path / "head", subject.base))
    written = write_gguf_adapter(tmp_path / "a.gguf", merge, format="f32", name="tiny")
    assert written.changed == ("output.weight",)
    assert failures(measured(replace(subject, adapter=merge.adapter), merge, written)) == {}
    tied = make_subject(tmp_path / "tied", "llama-tied")
    merge = plan_merge(tied.base, head_adapter(tmp_path / "tied-head", tied.base))
    with pytest.raises(ModelError, match="tied to the embedding"):
        write_gguf_adapter(tmp_path / "b.gguf", merge, format="f32", name="tiny")


def test_what_llama_cpp_would_leave_out_is_refused(tmp_path: Path) -> None:
    dora = make_subject(tmp_path / "dora", lora=LoraConfig(r=2, use_dora=True))
    with pytest.raises(ModelError, match="DoRA"):
        export(dora, tmp_path / "out", kind="gguf-adapter", quants=("f32",))
    assert not (tmp_path / "out").exists()


def spoil(path: Path, name: str, how: str) -> None:
    reader = GGUFReader(path, "r+")
    tensor = next(each for each in reader.tensors if each.name == name)
    if how == "rows":
        rows = tensor.data.shape[0]
        tensor.data[:] = tensor.data.reshape(4, rows // 8, 2, -1).swapaxes(1, 2).reshape(tensor.data.shape).copy()
    else:
        reader.fields["adapter.lora.alpha"].parts[-1][0] = 0.0001
    np.memmap.flush(reader.data)


@pytest.mark.parametrize("how, failing", [("rows", "llama.cpp: logits"), ("scale", "llama.cpp: adapter's effect")])
def test_a_spoilt_adapter_is_caught(tmp_path: Path, how: str, failing: str) -> None:
    subject = make_subject(tmp_path)
    merge = plan_merge(subject.base, subject.adapter)
    written = write_gguf_adapter(tmp_path / "a.gguf", merge, format="f32", name="tiny")
    spoil(written.path, "blk.0.attn_q.weight.lora_b", how)
    assert failing in failures(measured(subject, merge, written))


def test_an_adapter_of_another_base_is_one_sentence(tmp_path: Path) -> None:
    subject = make_subject(tmp_path / "one")
    other = make_subject(tmp_path / "two", hidden_size=128)
    merge = plan_merge(other.base, other.adapter)
    written = write_gguf_adapter(tmp_path / "a.gguf", merge, format="f32", name="tiny")
    mine = plan_merge(subject.base, subject.adapter)
    found = measured(subject, mine, written)["llama.cpp: readable"]
    assert not found.passed
    assert "with a.gguf on top: " in str(found.value)
    assert "init server" not in str(found.value), "the reason is named"


@pytest.mark.slow
def test_the_export_is_certified_and_says_how_to_load_it(tmp_path: Path) -> None:
    subject = make_subject(tmp_path / "subject")
    certificate = export(subject, tmp_path / "out", kind="gguf-adapter", quants=("f16",))
    assert certificate["passed"]
    assert certificate["weights"] == {"f16": "tiny-run-adapter-f16.gguf"}
    assert any("--lora tiny-run-adapter-f16.gguf" in note for note in certificate["notes"])


@pytest.mark.slow
def test_base_and_adapter_apart_are_certified_together_for_ollama(tmp_path: Path) -> None:
    """FROM and ADAPTER of one Modelfile: what llama.cpp computes with both is what is measured, then and later."""
    subject, out = make_subject(tmp_path / "subject", "qwen3-moe"), tmp_path / "out"
    certificate = export(subject, out, kind="ollama", quants=("q8_0",), separate=True)
    base, adapter = certificate["weights"]["q8_0"], certificate["weights"]["adapter"]
    assert {base, adapter} == {path.name for path in out.glob("*.gguf")}
    modelfile = read_modelfile(out / "Modelfile")
    assert (modelfile.source, modelfile.adapter) == (f"./{base}", f"./{adapter}")
    names = {check["name"] for check in certificate["checks"]}
    assert {"llama.cpp: logits", "llama.cpp: adapter's effect", "Modelfile: ADAPTER"} <= names
    assert "gguf: logits" not in names, "the base alone is not what was asked"
    verdict = verify_export(out, certificate, subject)
    assert [check.name for check in verdict.checks if not check.passed] == []
    (out / "Modelfile").write_text(replace(modelfile, adapter=None).text)
    failed = {check.name for check in verify_export(out, certificate, subject).checks if not check.passed}
    assert failed == {"files", "Modelfile: ADAPTER"}
    with pytest.raises(UsageError, match="no adapter"):
        export(replace(subject, adapter=None), tmp_path / "x", kind="ollama", separate=True)


@pytest.mark.slow
def test_an_adapter_that_nobody_reads_is_not_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama.cpp, base and adapter apart passed: transformers reads the base alone, and nobody the adapter."""
    subject = make_subject(tmp_path / "subject")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    with pytest.raises(CheckFailedError, match=r"llama\.cpp: installed is no .* pip install 'model-foundry\[gguf\]'"):
        export(subject, tmp_path / "out", kind="ollama", quants=("f16",), separate=True)
    assert not (tmp_path / "out").exists()
    assert export(subject, tmp_path / "out", kind="ollama", quants=("f16",))["passed"], "transformers reads the whole"


@pytest.mark.slow
def test_num_ctx_stays_within_the_attention_window(tmp_path: Path) -> None:
    """llama.cpp slides over no window, and Ollama was told to go beyond it."""
    subject, out = make_subject(tmp_path / "subject", "mistral-full", sliding_window=200), tmp_path / "out"
    certificate = export(subject, out, kind="ollama", quants=("f16",))
    modelfile = read_modelfile(out / "Modelfile")
    assert modelfile.num_ctx == 200
    (out / "Modelfile").write_text(replace(modelfile, num_ctx=201).text)
    failed = {check.name for check in verify_export(out, certificate, subject).checks if not check.passed}
    assert failed == {"files", "Modelfile: context"}


def test_some_experts_alone_are_refused(tmp_path: Path) -> None:
    """A stack with holes would be filled with other experts' factors."""
    subject = make_subject(tmp_path / "moe", "qwen3-moe")
    merge = plan_merge(subject.base, subject.adapter)
    some = {name: update for name, update in merge.updates.items() if ".experts.5." not in name}
    with pytest.raises(ModelError, match="5 experts of"):
        write_gguf_adapter(tmp_path / "a.gguf", replace(merge, updates=some), format="f32", name="x")
