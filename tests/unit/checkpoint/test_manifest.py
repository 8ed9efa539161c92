"""Every byte of a checkpoint is held against what was written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    HashedFile,
    _begin_hash,
    hash_file,
    link_file,
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


def test_a_large_file_is_whole_to_its_last_byte(tmp_path: Path) -> None:
    """Written past the page cache in whole blocks; what is left over comes at the end."""
    data = bytes(range(256)) * 6000
    with HashedFile(tmp_path / "weights", planned_bytes=len(data)) as file:
        file.write(data)
    assert (tmp_path / "weights").read_bytes() == data


def test_what_a_link_was_found_to_be_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    """A record that is not true shows whether it was taken."""
    (tmp_path / "next").mkdir()
    record = FileRecord(1000, "0" * 64)
    with recording():
        link_file(folder / "state" / "weights", tmp_path / "next" / "weights", record=record)
        assert write_manifest(tmp_path / "next").files == {"weights": record}
    link_file(folder / "config.json", tmp_path / "next" / "config.json", record=record)
    assert write_manifest(tmp_path / "next").files == {
        "config.json": hash_file(folder / "config.json"), "weights": hash_file(folder / "state" / "weights")
    }  # fmt: skip


def test_what_is_written_after_a_save_is_no_part_of_it(tmp_path: Path) -> None:
    with recording() as current:
        write_file(tmp_path / "one", b"1")
    write_file(tmp_path / "two", b"2")
    assert set(current.records) == {str(tmp_path / "one")}
    assert set(current.planned_bytes) == {str(tmp_path / "one")}


def test_a_link_that_was_put_into_a_checkpoint_is_named_unless_it_is_hidden(folder: Path) -> None:
    (folder / ".note").symlink_to(folder / "config.json")
    verify_manifest(folder)
    (folder / "more").symlink_to(folder / "config.json")
    with pytest.raises(CheckpointCorruptError, match="not in the manifest"):
        verify_manifest(folder)


def test_files_are_read_without_threads_where_none_can_be_started(folder: Path) -> None:
    readers = ThreadPoolExecutor(1)
    readers.shutdown()
    path = folder / "config.json"
    assert _begin_hash(readers, path).result(timeout=5) == hash_file(path)
    with pytest.raises(FileNotFoundError):
        _begin_hash(readers, folder / "gone").result(timeout=5)


def test_a_manifest_can_be_read_by_people_and_by_any_parser(folder: Path) -> None:
    write_manifest(folder, fields={"name": "Über"})
    assert '"name": "Über"' in (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    assert read_manifest(folder).fields == {"name": "Über"}
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(folder, fields={"loss": float("nan")})
