"""An export appears whole and measured, or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from model_foundry.checkpoint.lock import FileLock
from model_foundry.checkpoint.manifest import verify_manifest
from model_foundry.cli.export import find_subject
from model_foundry.errors import ArchitectureMismatchError, CheckFailedError, FoundryError, ModelError, UsageError
from model_foundry.export.certificate import CARD, CERTIFICATE
from model_foundry.export.gguf import gguf_obstacle
from model_foundry.export.hand_over import export
from model_foundry.export.measure import Subject
from model_foundry.export.merge import MARKER, plan_merge
from model_foundry.export.quantise import check_formats
from model_foundry.models.config import ModelConfig
from model_foundry.models.folder import fingerprint, read_json, read_tensors
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import LoraConfig, Message
from tests.tiny_adapters import head_adapter
from tests.tiny_exports import PROMPTS, make_subject
from tests.tiny_models import config_of
from tests.tiny_runs import assert_one_paragraph, foundry_here

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(tmp_path_factory.mktemp("subject"))


def test_a_merged_export_is_certified(subject: Subject, tmp_path: Path) -> None:
    certificate = export(subject, tmp_path / "out", kind="merged")
    out = tmp_path / "out"
    assert certificate["passed"]
    names = {check["name"] for check in certificate["checks"]}
    assert {"merged: weights", "merged: logits", "merged: greedy answers", "merged: adapter's effect"} <= names
    manifest = verify_manifest(out)
    assert {CARD, CERTIFICATE, MARKER, "model.safetensors"} <= manifest.files.keys()
    stored = json.loads((out / CERTIFICATE).read_text())
    assert stored["files"]["model.safetensors"]["sha256"] == manifest.files["model.safetensors"].sha256
    front = yaml.safe_load((out / CARD).read_text().split("---")[1])
    assert front["base_model"] == "tiny"
    assert "merged: logits" in (out / CARD).read_text()


def test_the_template_and_the_stop_tokens_of_the_run_travel_along(subject: Subject, tmp_path: Path) -> None:
    """A base without ChatML, trained with it, would be served without it and never stop."""
    renderer = Renderer(Tokenizer.load(subject.base), "chatml")
    export(replace(subject, renderer=renderer), tmp_path / "out", kind="merged")
    assert Tokenizer.load(tmp_path / "out").chat_template == renderer.template_text
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == list(renderer.stop_token_ids)


def test_a_model_without_a_chat_template_is_measured_on_texts(tmp_path: Path) -> None:
    """Prevents what was only pretrained from being refused: it has no turns, and need not have any."""
    made = make_subject(tmp_path)
    (made.base / "chat_template.jinja").unlink(missing_ok=True)
    (made.base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    found = replace(find_subject(str(made.base)), prompts=PROMPTS[:1])
    certificates = [export(found, tmp_path / kind, kind=kind) for kind in ("merged", "gguf")]
    assert all(check["passed"] for certificate in certificates for check in certificate["checks"])
    assert all("no chat template" in certificate["notes"][-1] for certificate in certificates)
    assert "no chat template" in (tmp_path / "merged" / CARD).read_text()
    assert {"gguf: token ids", "llama.cpp: logits"} <= {check["name"] for check in certificates[1]["checks"]}
    assert Tokenizer.load(tmp_path / "merged").chat_template is None
    with pytest.raises(UsageError, match="no chat template, which Ollama asks for"):
        export(found, tmp_path / "ollama", kind="ollama", quants=("f16",))


def test_a_short_context_asks_the_prompts_that_fit_and_says_so(subject: Subject, tmp_path: Path) -> None:
    """A tiny model could not be exported at all: sixteen tokens of answer did not fit beside any question."""
    context = max(len(subject.renderer.prompt(prompt)) for prompt in subject.prompts) + 5
    short = make_subject(tmp_path / "short", "llama-tied", max_position_embeddings=context)
    prompts = (*short.prompts, (Message("user", "What is the capital of France? " * 4),))
    certificate = export(replace(short, prompts=prompts), tmp_path / "out", kind="gguf", quants=("f16",))
    assert any(note.startswith("1 of 4 prompts do not fit its context") for note in certificate["notes"])
    with pytest.raises(ModelError, match=f"none of 1 prompts fits its context of {context}"):
        export(replace(short, prompts=prompts[3:]), tmp_path / "out-2", kind="merged")
    sliding = make_subject(tmp_path / "sliding", "mistral-full", sliding_window=context)
    with pytest.raises(ModelError, match=f"fits its sliding window of {context}"):
        export(replace(sliding, prompts=prompts[3:]), tmp_path / "out-3", kind="gguf", quants=("f16",))


def test_an_adapter_is_handed_over_with_its_tokenizer(subject: Subject, tmp_path: Path) -> None:
    certificate = export(subject, tmp_path / "out", kind="adapter")
    assert certificate["passed"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= certificate["files"].keys()


def test_an_exported_adapter_still_knows_its_base(subject: Subject, tmp_path: Path) -> None:
    origin = replace(subject.origin, base_fingerprint=fingerprint(subject.base))
    export(replace(subject, origin=origin), tmp_path / "out", kind="adapter")
    assert plan_merge(subject.base, tmp_path / "out").updates
    other = make_subject(tmp_path / "other", seed=1)
    with pytest.raises(ArchitectureMismatchError, match="other weights"):
        plan_merge(other.base, tmp_path / "out")


def test_an_adapter_that_rounding_swallows_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """The merged model would be the base model, and nothing would say so."""
    weak = make_subject(tmp_path / "weak", adapter_scale=0.003)
    with pytest.raises(CheckFailedError, match=r"adapter's effect.*a finer one is --dtype float32$"):
        export(weak, tmp_path / "out" / "merged", kind="merged", dtype="bfloat16")
    assert list((tmp_path / "out").iterdir()) == []
    assert export(weak, tmp_path / "out" / "merged", kind="merged", dtype="float32")["passed"]
    with pytest.raises(CheckFailedError, match=r"--quant f32$"):  # minutes of measuring, and no word of the rest
        export(weak, tmp_path / "out" / "gguf", kind="gguf", quants=("q4_0", "f32"))
    with pytest.raises(CheckFailedError, match=r"a finer one is --quant f16$"):
        export(weak, tmp_path / "out" / "gguf", kind="gguf", quants=("q4_0",))


def test_a_full_disk_leaves_nothing(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import model_foundry.export.hand_over as room

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "write_certificate", full)
    with pytest.raises(FoundryError, match="disk is full"):
        export(subject, tmp_path / "out", kind="merged")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed_by_the_next(subject: Subject, tmp_path: Path) -> None:
    """Every kill -9 left a folder as large as the model, which nothing ever looked at again."""
    left, writing = tmp_path / ".tmp-out-0123456789ab", tmp_path / ".tmp-out-ba9876543210"
    kept = [tmp_path / ".tmp-out-2-0123456789ab", tmp_path / ".tmp-out-of-mine", writing]
    for folder in (left, *kept):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    said: list[str] = []
    with FileLock.on_folder(writing):
        export(subject, tmp_path / "out", kind="adapter", say=said.append)
    assert not left.exists()
    assert all((folder / "model.safetensors").exists() for folder in kept)
    assert any(left.name in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *(folder.name for folder in kept)])


def test_what_is_there_already_is_not_overwritten(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        export(subject, tmp_path / "out", kind="merged")
    assert (tmp_path / "out" / "precious.txt").read_text() == "x"


def test_unknown_formats_are_refused_with_the_next_command() -> None:
    with pytest.raises(UsageError, match="not written here") as caught:
        check_formats("q8_0,iq2_xs")
    assert "llama-quantize" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no format 'q7'"):
        check_formats("q7")
    with pytest.raises(UsageError, match="no format is named"):
        check_formats(" ,")
    assert check_formats("Q8_0, q4_k_m,q8_0") == ("q8_0", "q4_k_m")


@pytest.mark.parametrize("kind, word", [("llama-biases", "hidden_act"), ("qwen3-moe-mixed", "bias")])
def test_what_llama_cpp_computes_otherwise_is_refused(kind: str, word: str) -> None:
    assert word in (gguf_obstacle(ModelConfig.from_hf(config_of(kind))) or "")
    assert gguf_obstacle(ModelConfig.from_hf(config_of("llama"))) is None


def test_the_command_merges_an_adapter_folder(subject: Subject, tmp_path: Path) -> None:
    done = foundry_here(
        "export", subject.adapter, "--to", "merged", "--dtype", "float16", "--out", tmp_path / "o", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    assert {str(tensor.dtype) for _, tensor in read_tensors(tmp_path / "o")} == {"torch.float16"}
    again = foundry_here("export", subject.adapter, "--to", "merged", "--out", tmp_path / "o")
    assert_one_paragraph(again, code=2, words=("not empty",))


def test_wrong_wishes_are_one_paragraph(subject: Subject, tmp_path: Path) -> None:
    for wish, words in {
        ("--to", "gguf", "--quant", "iq4_xs"): ("llama-quantize",),
        ("--to", "merged", "--quant", "q8_0"): ("--dtype",),
        ("--to", "gguf-adapter", "--quant", "q8_0"): ("f32, f16, bf16",),
        ("--to", "ollama", "--quant", "q8_0,q6_k"): ("one file",),
        ("--to", "gguf", "--register", "x"): ("--to ollama",),
        ("--to", "gguf", "--dtype", "float16"): ("--quant",),
    }.items():
        done = foundry_here("export", subject.adapter, *wish, "--out", tmp_path / "o")
        assert_one_paragraph(done, code=2, words=words)
    done = foundry_here("export", subject.base, "--to", "adapter", "--out", tmp_path / "o")
    assert_one_paragraph(done, code=2, words=("no adapter",))
    assert not (tmp_path / "o").exists()


def test_an_adapter_of_another_base_is_refused(subject: Subject, tmp_path: Path) -> None:
    other = make_subject(tmp_path / "other", "qwen2")
    with pytest.raises(ModelError, match=r"trained on other weights|which the base lacks|the base's has"):
        export(replace(subject, adapter=other.adapter), tmp_path / "out", kind="merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_an_adapter_on_the_head_is_certified_merged_and_as_a_gguf(tmp_path: Path, kind: str) -> None:
    """PEFT trains heads, with dropout too, which does nothing here; the reference refused both. A tied head's update
    must spare the embedding."""
    plain = make_subject(tmp_path / "plain", kind)
    headed = replace(plain, adapter=head_adapter(tmp_path / "head", plain.base, dropout=0.1))
    assert export(headed, tmp_path / "merged", kind="merged")["passed"]
    assert export(headed, tmp_path / "gguf", kind="gguf", quants=("f32",))["passed"]


@pytest.mark.parametrize("lora", [LoraConfig(r=4, use_dora=True), LoraConfig(r=4, lora_alpha=2, use_rslora=True)])
def test_dora_and_rank_stabilised_adapters_are_certified(tmp_path: Path, lora: LoraConfig) -> None:
    odd = make_subject(tmp_path / "odd", lora=lora)
    assert export(odd, tmp_path / "gguf", kind="gguf", quants=("f32",))["passed"]
