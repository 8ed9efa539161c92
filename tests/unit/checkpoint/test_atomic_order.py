"""What a power cut would show and nothing else does: what is synced, and before which name it gets."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from model_foundry.checkpoint.atomic import (
    atomic_directory,
    atomic_write,
    cut_torn_line,
    free_bytes,
    remove_directory,
    replaced_name,
    sync_directory,
)

Event = tuple[str, int, int]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """(sync or rename, inode, bytes at that time), in order; all are done."""
    found: list[Event] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        about = os.fstat(descriptor)
        found.append(("sync", about.st_ino, about.st_size))
        fsync(descriptor)

    def renamed(do: Any) -> Any:
        def act(source: Any, target: Any, **more: Any) -> None:
            about = Path(source).stat()
            found.append(("rename", about.st_ino, about.st_size))
            do(source, target, **more)

        return act

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    return found


def order(events: list[Event]) -> list[tuple[str, int]]:
    return [(what, inode) for what, inode, _ in events]


def inode(path: Path) -> int:
    return path.stat().st_ino


def num_open() -> int:
    return psutil.Process().num_fds()


def test_a_file_is_on_the_disk_whole_before_it_has_its_name_and_the_name_follows(
    tmp_path: Path, events: list[Event]
) -> None:
    atomic_write(tmp_path / "x", "twelve bytes")
    own, parent = inode(tmp_path / "x"), inode(tmp_path)
    assert order(events) == [("sync", own), ("rename", own), ("sync", parent)]
    assert events[0][2] == 12, "what Python still held would be lost"


def test_a_folder_s_files_and_folders_are_synced_before_it_has_its_name(tmp_path: Path, events: list[Event]) -> None:
    before = num_open()
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "b").write_text("b")
        (folder / "a").write_text("a")
    found, own = order(events), inode(tmp_path / "x")
    renamed = found.index(("rename", own))
    parts = [tmp_path / "x" / name for name in ("a", "deep/b", "deep")]
    places = [found.index(("sync", inode(part))) for part in parts]
    top = found.index(("sync", own))
    assert max(places) < top < renamed, "a folder holds names of what is on the disk"
    assert places[1] < places[2]
    assert found[-1] == ("sync", inode(tmp_path))
    assert num_open() == before, "every file is closed again"


def test_a_folder_that_cannot_get_its_name_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "other", "")
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "old").touch()
    rename = os.rename

    def fails_once(source: Any, target: Any) -> None:
        if Path(target).name == "x" and not Path(source).name.startswith(replaced_name(tmp_path / "x").name):
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OSError, match="no"), atomic_directory(tmp_path / "x") as folder:
        (folder / "new").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"x", "other"}
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["old"]


def test_what_a_kill_left_is_settled_before_another_is_written(tmp_path: Path) -> None:
    replaced_name(tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match="no more"), atomic_directory(tmp_path / "x"):
        raise ValueError("no more")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_out_of_the_way_for_good_before_its_files_go(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    own, parent = inode(tmp_path / "x"), inode(tmp_path)
    remove_directory(tmp_path / "x")
    assert order(events) == [("rename", own), ("sync", parent)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_fault_and_a_broken_disk_is(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fails)
    if number == errno.EIO:
        with pytest.raises(OSError, match="no"):
            sync_directory(tmp_path)
    else:
        sync_directory(tmp_path)


def test_a_torn_line_of_several_blocks_goes_and_the_disk_knows(tmp_path: Path, events: list[Event]) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"whole\n" + b"x" * 200_000)
    assert cut_torn_line(path) == b"x" * 200_000
    assert path.read_bytes() == b"whole\n"
    assert events == [("sync", inode(path), 6)]
    path.write_bytes(b"y" * 200_000)
    assert cut_torn_line(path) == b"y" * 200_000
    assert path.read_bytes() == b""


def test_a_line_may_be_empty_and_a_disk_may_not_say_how_full_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"\nzz")
    assert cut_torn_line(path) == b"zz"
    assert path.read_bytes() == b"\n"

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(shutil, "disk_usage", fails)
    assert free_bytes(path) == 0
