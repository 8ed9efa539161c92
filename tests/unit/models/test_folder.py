"""Model folders: what is read is whole, what is written is readable by others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_foundry.errors import ModelError
from model_foundry.models.folder import (
    fingerprint,
    portable_config,
    read_config,
    read_tensors,
    stored_tensors,
    weight_files,
    write_model_folder,
)

MakeModel = Callable[..., Path]


def test_a_folder_written_in_shards_reads_back_bit_by_bit(tiny_model: MakeModel, tmp_path: Path) -> None:
    source = tiny_model()
    tensors = {name: tensor.bfloat16() for name, tensor in read_tensors(source)}
    target = tmp_path / "sharded"
    write_model_folder(target, read_config(source), tensors.items(), tokenizer_from=source, max_shard_bytes=300)
    assert len(weight_files(target)) > 2
    found = dict(read_tensors(target))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())


def test_tensors_that_share_memory_are_written_as_they_look(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Two names on one storage, and a transposed view, are how a merged or tied weight looks in memory."""
    source, weight = tiny_model(), torch.arange(12.0).reshape(3, 4)
    tensors = {"a": weight, "b": weight, "c": weight.T, "d": weight[1:]}
    write_model_folder(tmp_path / "out", read_config(source), tensors.items(), tokenizer_from=source)
    found = dict(read_tensors(tmp_path / "out"))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_written_files_are_readable_by_other_users(tiny_model: MakeModel, tmp_path: Path) -> None:
    """safetensors' own writer leaves weights at mode 0600, and a server under another user cannot load them."""
    source = tiny_model()
    write_model_folder(tmp_path / "out", read_config(source), read_tensors(source), tokenizer_from=source)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_older_readers_find_rope_theta_dtype_and_a_tokenizer_class_they_know(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    """transformers 5 nests rope_theta, and a reader of the top level silently takes 10,000."""
    source = tiny_model(dtype="float32")
    write_model_folder(tmp_path / "out", read_config(source), read_tensors(source), tokenizer_from=source)
    config = read_config(tmp_path / "out")
    assert config["rope_theta"] == 5000.0
    assert config["torch_dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_scaled_rope_is_repeated_for_readers_of_rope_scaling() -> None:
    config = portable_config({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_a_failed_write_leaves_nothing_behind(tiny_model: MakeModel, tmp_path: Path) -> None:
    source = tiny_model()

    def fails_half_way():
        yield from list(read_tensors(source))[:3]
        raise RuntimeError("out of memory while merging")

    with pytest.raises(RuntimeError):
        write_model_folder(tmp_path / "out", {}, fails_half_way(), tokenizer_from=source, max_shard_bytes=100)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["tiny"]


def test_a_folder_that_holds_something_is_not_overwritten(tiny_model: MakeModel, tmp_path: Path) -> None:
    source, other = tiny_model(), tiny_model("other")
    with pytest.raises(ModelError, match="not empty"):
        write_model_folder(other, {}, read_tensors(source), tokenizer_from=source)


def test_pickled_weights_are_refused_with_the_way_out(tiny_model: MakeModel) -> None:
    folder = tiny_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*save_pretrained"):
        list(read_tensors(folder))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weight_file_is_named(tiny_model: MakeModel, keep: int) -> None:
    folder = tiny_model()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        list(read_tensors(folder))


def test_a_missing_shard_is_named(tiny_model: MakeModel, tmp_path: Path) -> None:
    source, target = tiny_model(), tmp_path / "out"
    write_model_folder(target, {}, read_tensors(source), tokenizer_from=source, max_shard_bytes=300)
    lost = weight_files(target)[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        list(read_tensors(target))


def test_an_index_that_names_a_file_elsewhere_is_refused(tiny_model: MakeModel) -> None:
    """A hostile index could otherwise read any safetensors file on the machine."""
    folder = tiny_model()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelError, match="other"):
        weight_files(folder)


def test_an_index_that_promises_more_than_the_shards_hold_is_refused(tiny_model: MakeModel, tmp_path: Path) -> None:
    """The missing weight would otherwise stay at its random start."""
    source, target = tiny_model(), tmp_path / "out"
    write_model_folder(target, {}, read_tensors(source), tokenizer_from=source, max_shard_bytes=300)
    path = target / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = weight_files(target)[0].name
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        stored_tensors(target)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_a_broken_config_is_named(tiny_model: MakeModel, content: bytes) -> None:
    folder = tiny_model()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(folder)


def test_the_fingerprint_follows_the_bytes_and_not_the_place(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tiny_model()
    before = fingerprint(folder)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert fingerprint(moved) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert fingerprint(folder) != before


def test_a_fingerprint_is_not_read_from_an_outdated_note(tiny_model: MakeModel) -> None:
    """Same path and size, other bytes and time: the remembered hash must not be used."""
    folder = tiny_model()
    path = folder / "model.safetensors"
    before = fingerprint(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert fingerprint(folder) != before
