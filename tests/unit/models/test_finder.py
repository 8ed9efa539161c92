"""From a name to a folder: nothing hangs, nothing half-made is used, nothing is fetched unasked."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model_foundry.checkpoint.store import CheckpointStore
from model_foundry.errors import CheckpointCorruptError, ModelError, ModelNotFoundError
from model_foundry.models import fetch
from model_foundry.models.cache import damage, entry_folder, fill, read_entry
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import fingerprint
from model_foundry.types import LoraConfig
from tests.tiny_adapters import write_tiny_adapter

MakeModel = Callable[..., Path]
KNOWN = "smollm2-135m-instruct"


def ignore(line: str) -> None:
    pass


def cache_as(name: str, source: Path, home: Path) -> Path:
    """Put a copy of a folder into the cache under this name."""

    def copy(folder: Path) -> dict[str, str]:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return {"source": "test"}

    return fill(name, name, copy, say=ignore, home=home).folder


def write_adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


def write_run(run: Path, base: str, names: tuple[str, ...] = ("step-00000010", "final")) -> Path:
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"config": {"model": {"name": base}}}))
    store = CheckpointStore(run / "checkpoints")
    for step, name in enumerate(names):
        store.save(name, step, lambda folder: write_adapter(folder / "adapter", "a/folder/of/another/machine") and None)
    return run


def test_a_folder_is_used_where_it_lies(tiny_model: MakeModel) -> None:
    folder = tiny_model()
    source = resolve_model(str(folder))
    assert (source.folder, source.adapter) == (folder, None)


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instrukt", "SmolLM-135M-instruct", "HuggingFaceTB/SmolLM2-135M-instruct"]
)
def test_a_name_that_does_not_exist_is_answered_at_once_with_a_guess(name: str) -> None:
    """With no network this used to be a minute of retries in many a tool."""
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=f"Did you mean {KNOWN}"):
        resolve_model(name, say=ignore)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "model.gguf", "~/nowhere/x"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_a_hub(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        resolve_model(name)


def test_a_cached_name_is_one_of_the_guesses(tiny_model: MakeModel, own_home: Path) -> None:
    cache_as("acme/rocket", tiny_model(), own_home)
    with pytest.raises(ModelNotFoundError, match="Did you mean acme/rocket"):
        resolve_model("acme/rockt", say=ignore)


def test_a_folder_beside_it_is_one_of_the_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demon.txt").write_text("no folder")
    monkeypatch.chdir(tmp_path)
    for name in ("runs/demoo", str(tmp_path / "runs" / "dmo")):
        meant = name.replace("demoo", "demo").replace("dmo", "demo")
        with pytest.raises(ModelNotFoundError, match=f"Did you mean {meant}\\?"):
            resolve_model(name, say=ignore)
    with pytest.raises(ModelNotFoundError, match="Known names"):
        resolve_model("nowhere/zzzz", say=ignore)


def test_what_was_made_of_a_file_is_no_name_to_ask_for(tiny_model: MakeModel, own_home: Path) -> None:
    """Prevents the tokenizer that was read out of a GGUF from being offered as a model."""
    cache_as("acme/rocket", tiny_model(), own_home)
    fill("gguf-tokenizer-0", "the tokenizer of x.gguf", lambda folder: {"source": "gguf"}, say=ignore, home=own_home)
    with pytest.raises(ModelNotFoundError, match=rf"Known names: acme/rocket, {KNOWN}\."):
        resolve_model("zzzz", say=ignore)


def test_offline_refuses_to_fetch_and_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match=f"FOUNDRY_OFFLINE.*foundry models pull {KNOWN}"):
        resolve_model(KNOWN)


def test_looking_does_not_fetch() -> None:
    with pytest.raises(ModelNotFoundError, match="foundry models pull"):
        resolve_model(KNOWN, pull=False)


@pytest.mark.parametrize("name", [KNOWN, "acme/rocket"])
def test_a_cached_model_is_found_offline(
    name: str, tiny_model: MakeModel, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache_as(name, tiny_model(), own_home)
    monkeypatch.setenv("FOUNDRY_OFFLINE", "1")
    assert resolve_model(name).folder == folder


def test_a_folder_of_the_working_directory_does_not_hide_a_known_name(
    tiny_model: MakeModel, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mkdir smollm2-135m-instruct` for one's results must not turn the name into an empty model."""
    folder = cache_as(KNOWN, tiny_model(), own_home)
    monkeypatch.chdir(tmp_path)
    (tmp_path / KNOWN).mkdir()
    assert resolve_model(KNOWN).folder == folder


def test_a_cached_model_cut_short_is_not_used(tiny_model: MakeModel, own_home: Path) -> None:
    folder = cache_as(KNOWN, tiny_model(), own_home)
    with (folder / "model.safetensors").open("ab") as file:
        file.truncate(100)
    with pytest.raises(ModelError, match=r"model\.safetensors has 100 bytes"):
        resolve_model(KNOWN, pull=False)


def test_a_flipped_byte_in_the_cache_is_found_by_hash(tiny_model: MakeModel, own_home: Path) -> None:
    folder = cache_as(KNOWN, tiny_model(), own_home)
    entry = read_entry(folder)
    assert entry is not None
    assert damage(entry, hashes=True) is None
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert damage(entry) is None
    assert "model.safetensors" in (damage(entry, hashes=True) or "")


def test_a_fetch_that_fails_leaves_no_model_behind(own_home: Path) -> None:
    """A folder without its last file would be taken for the model by the next run."""

    def fails(folder: Path) -> dict[str, str]:
        (folder / "config.json").write_text("{}")
        raise ModelError("the connection broke")

    with pytest.raises(ModelError):
        fill(KNOWN, KNOWN, fails, say=ignore, home=own_home)
    assert list((own_home / "models").iterdir()) == []


def test_what_a_killed_fetch_left_is_removed(tiny_model: MakeModel, own_home: Path) -> None:
    folder = entry_folder(KNOWN, home=own_home)
    leftover = folder.parent / f".tmp-{KNOWN}-1234-0"
    neighbour = folder.parent / f".tmp-{KNOWN}-large-1234-0"
    for path in (leftover, neighbour):
        path.mkdir(parents=True)
    cache_as(KNOWN, tiny_model(), own_home)
    assert not leftover.exists()
    assert neighbour.exists()


@pytest.mark.slow
def test_two_processes_fill_an_entry_once(tiny_model: MakeModel, own_home: Path, tmp_path: Path) -> None:
    """Two runs started together would otherwise both convert, and one would rename over what the other has mapped."""
    script = (
        "import sys, time, shutil\nfrom pathlib import Path\nfrom model_foundry.models.cache import fill\n"
        "def make(folder):\n"
        "    open(sys.argv[2], 'a').write('made\\n'); time.sleep(0.3)\n"
        "    shutil.copytree(sys.argv[1], folder, dirs_exist_ok=True); return {}\n"
        "print(fill('m', 'm', make, say=print, home=None).folder)\n"
    )
    log = tmp_path / "made"
    command = [sys.executable, "-c", script, str(tiny_model()), str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert log.read_text() == "made\n"
    assert {output.splitlines()[-1] for output in outputs} == {str(entry_folder("m", home=own_home))}


def test_an_adapter_folder_brings_its_base(tiny_model: MakeModel, tmp_path: Path) -> None:
    base = tiny_model()
    adapter = write_adapter(tmp_path / "adapter", str(base))
    source = resolve_model(str(adapter))
    assert (source.folder, source.adapter) == (base, adapter)


def test_an_adapter_finds_a_base_named_relative_to_it(tiny_model: MakeModel, tmp_path: Path) -> None:
    base = tiny_model("base")
    assert resolve_model(str(write_adapter(tmp_path / "adapter", "../base"))).folder.resolve() == base


def test_a_run_is_its_newest_checkpoint_on_the_base_of_its_configuration(tiny_model: MakeModel, tmp_path: Path) -> None:
    base = tiny_model()
    run = write_run(tmp_path / "run", str(base))
    source = resolve_model(str(run), say=ignore)
    assert source.folder == base
    assert source.adapter == run / "checkpoints" / "final" / "adapter"
    assert resolve_model(str(run / "checkpoints" / "step-00000010")).adapter is not None


def test_another_base_than_the_adapter_was_trained_on_is_said(tiny_model: MakeModel, tmp_path: Path) -> None:
    """The same name can be other weights on another machine: an adapter on them answers a little differently."""
    base, run = tiny_model(), tmp_path / "run"
    for name, trained in (("same", fingerprint(base)), ("other", "0" * 64)):
        store = CheckpointStore(run / name / "checkpoints")
        (run / name).mkdir(parents=True)
        store.save("final", 1, lambda f: write_adapter(f / "adapter", str(base)) and None, {"model": trained})
    said: list[str] = []
    resolve_model(str(run / "same"), say=said.append)
    assert said == []
    resolve_model(str(run / "other"), say=said.append)
    assert "not the same weights" in said[0]


def test_a_base_that_moved_is_found_by_the_adapters_own_name(tiny_model: MakeModel, tmp_path: Path) -> None:
    base = tiny_model()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"config": {"model": {"name": "./gone"}}}))
    adapter = write_adapter(run / "checkpoints" / "step-1" / "adapter", str(base))
    assert resolve_model(str(adapter)).folder == base


def test_a_damaged_final_checkpoint_is_passed_over_and_said(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Serving the damaged one, or silently an older one, would both be wrong."""
    run = write_run(tmp_path / "run", str(tiny_model()))
    (run / "checkpoints" / "final" / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    said: list[str] = []
    source = resolve_model(str(run), say=said.append)
    assert source.adapter == run / "checkpoints" / "step-00000010" / "adapter"
    assert any("final" in line and "adapter_model.safetensors" in line for line in said)
    with pytest.raises(CheckpointCorruptError, match=r"adapter_model\.safetensors"):
        resolve_model(str(run / "checkpoints" / "final"))


def test_a_run_of_full_fine_tuning_is_its_model_folder(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny, store = tiny_model(), CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save("final", 1, lambda folder: shutil.copytree(tiny, folder / "model") and None)
    assert resolve_model(str(tmp_path / "run")).folder == tmp_path / "run" / "checkpoints" / "final" / "model"


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="no checkpoint"):
        resolve_model(str(tmp_path / "run"))


def test_an_adapter_on_an_adapter_is_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Loading only the upper one would answer as a model that was never trained."""
    lower = write_adapter(tmp_path / "lower", str(tiny_model()))
    with pytest.raises(ModelError, match="adapter itself"):
        resolve_model(str(write_adapter(tmp_path / "upper", str(lower))))


def test_a_run_that_trained_an_adapter_further_stands_on_the_first_base(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Its adapter holds all that was learned: refusing it, or stacking both, would each be wrong."""
    base = tiny_model()
    first = write_run(tmp_path / "first", str(base))
    second = write_run(tmp_path / "second", str(first))
    source = resolve_model(str(second), say=ignore)
    assert (source.folder, source.adapter) == (base, second / "checkpoints" / "final" / "adapter")


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_names_what_is_missing(tiny_model: MakeModel, lost: str) -> None:
    folder = tiny_model()
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=lost):
        resolve_model(str(folder))


def test_a_file_that_only_calls_itself_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a GGUF"):
        resolve_model(str(path), say=ignore)


@pytest.mark.slow
def test_a_hub_that_accepts_and_never_answers_costs_seconds_not_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert fetch.ask_hub("acme/rocket", endpoint=endpoint, timeout_s=0.5) is None
        assert time.monotonic() - start < 3


def test_of_a_repository_only_the_model_is_fetched() -> None:
    """Pickles, other formats and copies in folders would multiply the download, or be loaded by mistake."""
    names = [
        "config.json", "tokenizer.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin",
        "onnx/config.json", "README.md", "modeling_acme.py", "generation_config.json",
    ]  # fmt: skip
    assert fetch.wanted_files(names, where="acme/rocket") == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_a_repository_of_pickles_is_refused_before_it_is_downloaded() -> None:
    with pytest.raises(ModelError, match="safetensors"):
        fetch.wanted_files(["config.json", "tokenizer.json", "pytorch_model.bin"], where="acme/rocket")


def test_a_checkpoint_of_the_service_is_found_by_its_path(
    tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run ids hold colons, which folders do not; and a path must not lead out of the state."""
    base = tiny_model("llama")
    monkeypatch.setenv("FOUNDRY_STATE_DIR", str(tmp_path))
    adapter = tmp_path / "runs" / "ab12-train-0" / "weights" / "done" / "adapter"
    write_tiny_adapter(adapter, base, LoraConfig(r=2), manifest=True)
    found = resolve_model("tinker://ab12:train:0/weights/done", say=ignore)
    assert (found.folder, found.adapter) == (base, adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointCorruptError):
        resolve_model("tinker://ab12:train:0/weights/done", say=ignore)
    for name in (
        "tinker://ab12:train:0/weights/gone",
        "tinker://ab12:train:0/weights/../done",
        "tinker://x",
        "tinker:///",
    ):
        with pytest.raises(ModelNotFoundError):
            resolve_model(name, say=ignore)
