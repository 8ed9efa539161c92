"""Every byte of a checkpoint is held against what was written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.checkpoint.manifest import (
    MANIFEST_NAME,
    HashedFile,
    hash_file,
    read_manifest,
    recording,
    verify_manifest,
    write_file,
    write_manifest,
)
from model_foundry.errors import CheckpointCorruptError, CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "state").mkdir(parents=True)
    write_file(folder / "state" / "weights", b"0123456789" * 100)
    write_file(folder / "config.json", "{}")
    write_manifest(folder, fields={"step": 7})
    return folder


def test_what_was_written_verifies_and_comes_back(folder: Path) -> None:
    manifest = verify_manifest(folder)
    assert manifest.fields == {"step": 7}
    assert set(manifest.files) == {"state/weights", "config.json"}
    assert manifest.total_bytes == 1002


def test_any_flipped_byte_of_the_manifest_itself_is_seen(folder: Path, flip: Callable[[Path, int], None]) -> None:
    """Prevents a step or a hash that the disk changed and that still is valid JSON."""
    path = folder / MANIFEST_NAME
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        path.write_bytes(good)
        flip(path, position)
        with pytest.raises(CheckpointCorruptError) as caught:
            read_manifest(folder)
        assert str(path) in str(caught.value)


def test_a_flipped_byte_is_named_with_both_hashes(folder: Path, flip: Callable[[Path, int], None]) -> None:
    path = folder / "state" / "weights"
    expected = hash_file(path).sha256
    flip(path, 500)
    with pytest.raises(CheckpointCorruptError) as caught:
        verify_manifest(folder)
    for part in (str(path), expected, hash_file(path).sha256):
        assert part in str(caught.value)


def test_a_truncated_file_is_named_with_both_sizes(folder: Path) -> None:
    path = folder / "state" / "weights"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match=r"state/weights.*expected 1000 bytes, found 999"):
        verify_manifest(folder)


def test_missing_and_added_files_are_named(folder: Path) -> None:
    """Prevents a loader from picking up a file that nobody saved."""
    (folder / ".DS_Store").touch()
    verify_manifest(folder)
    (folder / "state" / "extra.safetensors").touch()
    with pytest.raises(CheckpointCorruptError, match=r"extra\.safetensors: is not in the manifest"):
        verify_manifest(folder)
    (folder / "state" / "extra.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointCorruptError, match=r"config\.json: is missing"):
        verify_manifest(folder)


def test_a_save_that_never_ended_is_said(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointCorruptError, match="never finished"):
        verify_manifest(folder)


def test_a_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    """Prevents a downloaded checkpoint from having our process read other people's files."""
    outside = folder.parent / "outside"
    outside.write_text("x")
    write_manifest(folder)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    del content["sha256"]
    content["files"]["../outside"] = {"size": 1, "sha256": hash_file(outside).sha256}

    def encode(value: object) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    content["sha256"] = hashlib.sha256(encode(content)).hexdigest()
    (folder / MANIFEST_NAME).write_bytes(encode(content))
    with pytest.raises(CheckpointCorruptError, match="outside the folder"):
        verify_manifest(folder)


def test_links_cannot_be_saved(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="only files and folders"):
        write_manifest(folder)


def test_a_file_changed_after_it_was_hashed_is_hashed_again(tmp_path: Path) -> None:
    """Prevents a manifest that certifies bytes which are not there."""
    with recording() as recorded:
        write_file(tmp_path / "a", b"first")
        write_file(tmp_path / "b", b"same")
        assert len(recorded.records) == 2
        (tmp_path / "a").write_bytes(b"other")
        manifest = write_manifest(tmp_path)
    assert manifest.files["a"] == hash_file(tmp_path / "a")
    verify_manifest(tmp_path)


@given(blocks=st.lists(st.binary(max_size=300), max_size=6))
def test_hashing_while_writing_equals_hashing_afterwards(
    blocks: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("hash") / "file"
    with recording() as recorded, HashedFile(path) as file:
        for block in blocks:
            file.write(block)
    assert [record for _, record in recorded.records.values()] == [hash_file(path)]


def test_a_folder_is_verified_at_the_end_of_the_process_too(tmp_path: Path) -> None:
    """What is still saved and loaded then must not fail because no thread can be started any more."""
    folder = tmp_path / "whole"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 1000)
    write_manifest(folder)
    code = (
        "import atexit, pathlib, sys; from model_foundry.checkpoint.manifest import verify_manifest;"
        "atexit.register(lambda: print(len(verify_manifest(pathlib.Path(sys.argv[1])).files)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
