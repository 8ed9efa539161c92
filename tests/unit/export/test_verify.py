"""`foundry verify export`: the bytes first, then what they compute; what cannot be repeated is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_foundry.checkpoint.manifest import MANIFEST_NAME, write_manifest
from model_foundry.errors import ModelError
from model_foundry.export.certificate import CERTIFICATE
from model_foundry.export.hand_over import export
from model_foundry.export.measure import Subject
from model_foundry.export.verify import Verdict, read_certificate, verify_export
from tests.tiny_exports import make_subject
from tests.tiny_runs import assert_one_paragraph, foundry_here

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def exports(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    export(subject, folder / "merged", kind="merged")
    export(subject, folder / "ollama", kind="ollama", quants=("q8_0",))
    return folder


@pytest.fixture
def copy(exports: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports, tmp_path / "copy"))


def verdict(folder: Path, subject: Subject | str) -> Verdict:
    return verify_export(folder, read_certificate(folder), subject)


def failures(found: Verdict) -> dict[str, str]:
    return {check.name: check.evidence for check in found.checks if not check.passed}


def signed(folder: Path) -> None:
    """As if the changed bytes had been certified: only measuring can find them now."""
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder)


def test_untouched_exports_pass_again(copy: Path, subject: Subject) -> None:
    for kind in ("merged", "ollama"):
        again = verdict(copy / kind, subject)
        assert failures(again) == {}
        assert again.not_repeated == []
        names = {check["name"] for check in read_certificate(copy / kind)["checks"]}
        assert names == {check.name for check in again.checks} - {"files"}


def test_a_renamed_tensor_is_named(copy: Path, subject: Subject) -> None:
    path = copy / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.gated.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    failed = failures(verdict(copy / "merged", subject))
    assert "model.safetensors has" in failed["files"]
    assert "mlp.gate" in failed["merged: weights"]
    signed(copy / "merged")
    assert "files" not in failures(verdict(copy / "merged", subject))
    assert "merged: weights" in failures(verdict(copy / "merged", subject))


def test_a_gguf_cut_in_half_is_named(copy: Path, subject: Subject) -> None:
    path = copy / "ollama" / "tiny-run-q8_0.gguf"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    failed = failures(verdict(copy / "ollama", subject))
    assert "tiny-run-q8_0.gguf has" in failed["files"]
    assert any(name.startswith(("gguf", "llama.cpp")) for name in failed)
    assert all("Traceback" not in text for text in failed.values())


def test_a_missing_and_an_added_file_are_named(copy: Path, subject: Subject) -> None:
    (copy / "merged" / "tokenizer.json").unlink()
    (copy / "merged" / "extra.safetensors").write_bytes(b"x")
    failed = failures(verdict(copy / "merged", subject))
    assert "tokenizer.json is missing" in failed["files"]
    assert "extra.safetensors was added" in failed["files"]
    assert "merged: tokenizer" in failed


def swap_rows(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = tensors[name]
    tensors[name] = rows.reshape(4, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_rope(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"rope_theta": 5e5}
    config["rope_parameters"] = (config.get("rope_parameters") or {"rope_type": "default"}) | {"rope_theta": 5e5}
    path.write_text(json.dumps(config))


def drop_adapter(folder: Path, base: Path) -> None:
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")


def set_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))


def cut_newline(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("\\n", "", 1) if "\\n" in path.read_text() else "x" + path.read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": path.read_text()}))


@pytest.mark.parametrize(
    "how, failing",
    [
        ("rows", "merged: weights"), ("rope", "merged: configuration"), ("adapter", "merged: adapter's effect"),
        ("end", "merged: stop tokens"), ("newline", "merged: chat template"),
    ],
)  # fmt: skip
def test_a_broken_merge_is_caught_by_what_it_computes(copy: Path, subject: Subject, how: str, failing: str) -> None:
    """Each of them loads without a word, and its hashes are its own."""
    folder = copy / "merged"
    if how == "adapter":
        drop_adapter(folder, subject.base)
    else:
        {"rows": swap_rows, "rope": set_rope, "end": set_end, "newline": cut_newline}[how](folder)
    signed(folder)
    failed = failures(verdict(folder, subject))
    assert failing in failed
    assert "files" not in failed
    if how in ("rows", "rope", "adapter"):
        assert "merged: logits" in failed


def test_what_cannot_be_repeated_is_said(copy: Path, subject: Subject) -> None:
    gone = verdict(copy / "merged", "the run is not here")
    assert failures(gone) == {}
    assert gone.not_repeated == ["parity: the run is not here"]
    other = replace(subject, origin=replace(subject.origin, base_fingerprint="2" * 64))
    assert "another base" in verdict(copy / "merged", other).not_repeated[0]


def test_an_export_of_another_run_fails_where_that_run_was_named(subject: Subject, tmp_path: Path) -> None:
    """It ended with 0: the files were as certified, and parity was only said not to have been repeated."""
    out, other = tmp_path / "out", make_subject(tmp_path / "other", seed=1)
    assert foundry_here("export", subject.adapter, "--to", "adapter", "--out", out).returncode == 0
    done = foundry_here("verify", "export", out, "--of", other.adapter)
    assert done.returncode == 1, done.stdout
    assert "FAIL  origin: base" in done.stdout
    assert str(subject.adapter) in done.stdout
    assert foundry_here("verify", "export", out, "--of", subject.adapter).returncode == 0


def test_a_folder_without_a_certificate_is_one_sentence(copy: Path) -> None:
    (copy / "merged" / CERTIFICATE).unlink()
    with pytest.raises(ModelError, match="no export"):
        read_certificate(copy / "merged")


def test_the_command_names_what_differs_and_ends_with_one(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert foundry_here("export", subject.adapter, "--to", "merged", "--out", out).returncode == 0
    done = foundry_here("verify", "export", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merged: logits" in done.stdout
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] += torch.tensor(0.5)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = foundry_here("verify", "export", out, "--json")
    assert done.returncode == 1
    failed = [check for check in json.loads(done.stdout)["checks"] if not check["passed"]]
    assert "model.norm.weight is off" in next(c["evidence"] for c in failed if c["name"] == "merged: weights")
    assert_one_paragraph(foundry_here("verify", "export", subject.base), code=2, words=("certificate.json",))
    gone = foundry_here("verify", "export", out, "--of", tmp_path / "nowhere")
    assert_one_paragraph(gone, code=2)
