"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model_foundry.checkpoint.atomic import (
    append_line,
    atomic_directory,
    atomic_file,
    atomic_write,
    cut_torn_line,
    free_bytes,
    remove_directory,
    remove_leftovers,
    replaced_name,
    settle_replaced,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_write_replaces_whole_and_keeps_the_users_umask(tmp_path: Path) -> None:
    """Prevents files of mode 0600 that a colleague or a server cannot read."""
    path = tmp_path / "a.json"
    atomic_write(path, "ä")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert names(tmp_path) == {"a.json"}


def test_a_write_that_cannot_be_done_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        atomic_write(tmp_path / "a", b"a folder has this name")
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "missing" / "a", b"")
    assert names(tmp_path) == {"a"}


def test_a_file_written_in_pieces_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Prevents half a converted data set under the name of a whole one."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new ")
        assert path.read_bytes() == b"old"
        file.write(b"rows")
    assert path.read_bytes() == b"new rows"

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"new rows"
    assert names(tmp_path) == {"rows.jsonl"}


def test_a_folder_appears_whole_and_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    """Prevents a half-written folder under the real name."""
    target = tmp_path / "target"
    with atomic_directory(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("1")
        assert not target.exists()

    def interrupted() -> None:
        with atomic_directory(target) as folder:
            (folder / "file").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "deep" / "file").read_text() == "1"
    with atomic_directory(target) as folder:
        (folder / "other").write_text("3")
    assert names(target) == {"other"}
    assert names(tmp_path) == {"target"}


@pytest.mark.parametrize("is_new_in_place", [True, False])
def test_an_interrupted_replacement_is_settled(tmp_path: Path, is_new_in_place: bool) -> None:
    target, aside = tmp_path / "t", replaced_name(tmp_path / "t")
    aside.mkdir()
    (aside / "old").touch()
    if is_new_in_place:
        target.mkdir()
        (target / "new").touch()
    settle_replaced(target)
    assert names(target) == ({"new"} if is_new_in_place else {"old"})
    assert names(tmp_path) == {"t"}


def test_leftovers_go_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / ".tmp-a").mkdir()
    (tmp_path / ".tmp-a" / "file").touch()
    (tmp_path / ".tmp-b").touch()
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / ".tmp-inside").touch()
    assert remove_leftovers(tmp_path) == [".tmp-a", ".tmp-b"]
    assert names(tmp_path) == {"keep"}
    remove_directory(tmp_path / "keep")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"one\ntwo\n", b"one\ntwo\n"),
        (b"one\ntw", b"one\n"),
        (b"torn from the start", b""),
        (b"one\n" + b"x" * 200_000, b"one\n"),
        (b"one\n\x00\x00\x00", b"one\n"),
    ],
)
def test_a_torn_last_line_is_cut_and_returned(tmp_path: Path, before: bytes, after: bytes) -> None:
    """Prevents a record glued to the half of another, which no reader can parse; zeros are what a power cut leaves."""
    path = tmp_path / "lines"
    path.write_bytes(before)
    assert cut_torn_line(path) == before[len(after) :]
    assert path.read_bytes() == after
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    append_line(descriptor, b"next")
    os.close(descriptor)
    assert path.read_bytes() == after + b"next\n"


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0
