"""What a store reads again before it deletes, what it puts in order, and what it says of the room it needs."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from model_foundry.checkpoint import atomic
from model_foundry.checkpoint import store as store_module
from model_foundry.checkpoint.manifest import recording, write_file, write_manifest
from model_foundry.checkpoint.store import FINAL, CheckpointStore, step_name
from model_foundry.errors import CheckpointCorruptError, CheckpointError

Fill = Callable[[str], Callable[[Path], None]]
Flip = Callable[[Path, int], None]
ONE, TWO, THREE = map(step_name, (1, 2, 3))


def save(store: CheckpointStore, fill: Fill, *steps: int) -> None:
    for step in steps:
        store.save(step_name(step), step, fill(f"at {step}"))


def weights(store: CheckpointStore, name: str) -> Path:
    return store.path(name) / "adapter" / "weights.bin"


def names(store: CheckpointStore) -> list[str]:
    return [checkpoint.name for checkpoint in store.list()]


def test_a_checkpoint_can_be_asked_to_verify_itself(store: CheckpointStore, fill: Fill, flip: Flip) -> None:
    save(store, fill, 1)
    checkpoint = store.open(ONE)
    checkpoint.verify()
    flip(weights(store, ONE), 3)
    with pytest.raises(CheckpointCorruptError):
        checkpoint.verify()


def test_parts_of_any_depth_are_shared(store: CheckpointStore, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "part" / "deep").mkdir(parents=True)
        for name in ("a", "b"):
            write_file(folder / "part" / "deep" / name, name)

    store.save(ONE, 1, write)
    (tmp_path / "other").mkdir()
    with recording():
        assert store.open(ONE).link_into(tmp_path / "other", {"part"})
        assert set(write_manifest(tmp_path / "other").files) == {"part/deep/a", "part/deep/b"}


def test_metadata_that_no_file_can_hold_is_refused_before_anything_is_written(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.save(ONE, 1, lambda folder: pytest.fail("was written"), {"loss": float("nan")})
    assert not store.root.exists()


def test_a_new_store_is_on_the_disk_by_its_name(tmp_path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut takes the folder with everything that was synced in it."""
    synced: list[Path] = []
    sync = atomic.sync_directory
    monkeypatch.setattr(atomic, "sync_directory", lambda path: (synced.append(path), sync(path)))
    save(CheckpointStore(tmp_path / "run" / "checkpoints"), fill, 1)
    assert synced[0] == tmp_path / "run"


@pytest.mark.parametrize("tidies", ["save", "prune"])
def test_what_a_killed_save_left_goes(store: CheckpointStore, fill: Fill, tidies: str) -> None:
    save(store, fill, 1)
    left = store.root / f"{atomic.TEMPORARY_PREFIX}{TWO}-0123"
    left.mkdir()
    (left / "weights.bin").write_bytes(b"half")
    if tidies == "save":
        save(store, fill, 2)
    else:
        store.prune(1)
    assert not left.exists()


def test_what_this_store_wrote_is_not_read_again_before_others_go(
    store: CheckpointStore, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is gigabytes, and its bytes were hashed on their way to the disk."""
    save(store, fill, 1, 2)
    monkeypatch.setattr(store_module, "verify_manifest", lambda path: pytest.fail(f"{path} was read"))
    assert store.prune(1) == [ONE]


def test_what_another_one_replaced_is_read_before_others_go(store: CheckpointStore, fill: Fill, flip: Flip) -> None:
    save(store, fill, 1, 2)
    other = CheckpointStore(store.root)
    other.save(TWO, 2, fill("something else"))
    flip(weights(store, TWO), 3)
    assert store.prune(1) == []
    assert names(store) == [ONE, TWO]


def test_the_final_one_alone_is_enough_for_others_to_go(store: CheckpointStore, fill: Fill, flip: Flip) -> None:
    save(store, fill, 1, 2)
    store.save(FINAL, 2, fill("the end"))
    flip(weights(store, TWO), 3)
    assert CheckpointStore(store.root).prune(1) == [ONE]


def test_the_newer_of_two_is_read_where_the_old_one_still_lies_aside(store: CheckpointStore, fill: Fill) -> None:
    """As a kill leaves them that comes right after the new one has its name."""
    save(store, fill, 1)
    shutil.copytree(store.path(ONE), atomic.replaced_name(store.path(ONE)))
    assert store.open(ONE).path == store.path(ONE)


def test_saves_leave_no_file_open_and_the_index_is_not_a_program(store: CheckpointStore, fill: Fill) -> None:
    save(store, fill, 1)
    before = psutil.Process().num_fds()
    save(store, fill, 2, 3)
    assert psutil.Process().num_fds() == before
    assert not (store.root.parent / "checkpoints.jsonl").stat().st_mode & 0o111


def test_a_full_disk_is_told_with_what_the_newest_checkpoint_takes(store: CheckpointStore) -> None:
    for step, size in ((1, 5), (2, 3), (3, 1)):
        store.save(step_name(step), step, lambda folder, size=size: write_file(folder / "weights", b"x" * size * 10**6))

    def fails(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"needs at least 1\.0 MB"):
        store.save(step_name(4), 4, fails)
    assert names(store) == [ONE, TWO, THREE]
