"""Saving, falling back, replacing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_foundry.checkpoint import atomic
from model_foundry.checkpoint.background import BackgroundSaver
from model_foundry.checkpoint.manifest import write_file
from model_foundry.checkpoint.store import FINAL, CheckpointStore, step_name
from model_foundry.errors import CheckpointCorruptError, CheckpointError

Fill = Callable[[str], Callable[[Path], None]]
Flip = Callable[[Path, int], None]


def save_steps(store: CheckpointStore, fill: Fill, *steps: int) -> None:
    for step in steps:
        store.save(step_name(step), step, fill(f"at {step}"), {"cursor": step * 8})


def test_saved_checkpoints_come_back_oldest_first_with_their_metadata(store: CheckpointStore, fill: Fill) -> None:
    """Prevents an order by name, in which final and step-9 of an older scheme come first."""
    save_steps(store, fill, 20, 3)
    store.save(FINAL, 20, fill("end"))
    store.save("manual", 5, fill("by hand"))
    assert [checkpoint.name for checkpoint in store.list()] == [step_name(3), "manual", step_name(20), FINAL]
    assert store.open(step_name(3)).metadata == {"cursor": 24}
    assert store.open(step_name(3)).total_bytes == sum(
        path.stat().st_size for path in store.path(step_name(3)).rglob("*.bin")
    )
    newest = store.newest_valid(pytest.fail)
    assert newest is not None
    assert newest.name == FINAL
    index = [json.loads(line) for line in (store.root.parent / "checkpoints.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in index] == [20, 3, 20, 5]


def test_an_empty_or_absent_store_has_no_checkpoint(store: CheckpointStore) -> None:
    assert store.newest_valid(pytest.fail) is None
    assert store.list() == []
    assert store.prune(1) == []
    assert not store.root.exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint named 'final'.*There is: none"):
        store.open(FINAL)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete file", "delete manifest", "flip manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    store: CheckpointStore, fill: Fill, flip: Flip, damage: str
) -> None:
    save_steps(store, fill, 1, 2, 3)
    weights, manifest = store.path(step_name(3)) / "adapter" / "weights.bin", store.path(step_name(3)) / "manifest.json"
    match damage:
        case "flip":
            flip(weights, 17)
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:10])
        case "delete file":
            weights.unlink()
        case "delete manifest":
            manifest.unlink()
        case "flip manifest":
            flip(manifest, 40)
    said: list[str] = []
    newest = store.newest_valid(said.append)
    assert newest is not None
    assert newest.step == 2
    assert len(said) == 1
    assert step_name(3) in said[0]
    assert str(manifest if damage == "flip manifest" else store.path(step_name(3))) in said[0]
    with pytest.raises(CheckpointCorruptError):
        store.open(step_name(3))


def test_an_unreadable_file_counts_as_damaged(store: CheckpointStore, fill: Fill) -> None:
    """Prevents a bad sector in the newest checkpoint from ending what the one before could resume."""
    save_steps(store, fill, 1, 2)
    path = store.path(step_name(2)) / "state" / "optimizer.bin"
    path.unlink()
    path.symlink_to(path)  # reading it fails, as root too
    said: list[str] = []
    newest = store.newest_valid(said.append)
    assert newest is not None
    assert newest.step == 1
    assert "optimizer.bin" in said[0]


def test_a_store_of_nothing_but_damage_has_no_checkpoint_and_says_why(
    store: CheckpointStore, fill: Fill, flip: Flip
) -> None:
    save_steps(store, fill, 1, 2)
    for step in (1, 2):
        flip(store.path(step_name(step)) / "state" / "optimizer.bin", 0)
    said: list[str] = []
    assert store.newest_valid(said.append) is None
    assert len(said) == 2


def test_saving_again_replaces_and_an_error_in_it_does_not(store: CheckpointStore, fill: Fill) -> None:
    save_steps(store, fill, 1)

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("the writer's own error")

    with pytest.raises(ValueError, match="own error"):
        store.save(step_name(1), 1, fail)
    assert b"at 1" in (store.open(step_name(1)).path / "adapter" / "weights.bin").read_bytes()
    store.save(step_name(1), 1, fill("again"))
    assert b"again" in (store.open(step_name(1)).path / "adapter" / "weights.bin").read_bytes()
    assert {path.name for path in store.root.iterdir()} == {step_name(1), ".lock"}


def test_a_checkpoint_that_shares_files_keeps_them(store: CheckpointStore, fill: Fill, tmp_path: Path) -> None:
    """Prevents a copy that changes or goes with what it was made of, and one that is read again to be hashed."""
    save_steps(store, fill, 1)
    source, other = store.open(step_name(1)), CheckpointStore(tmp_path / "other")

    def link(folder: Path) -> None:
        assert source.link_into(folder, ("adapter", "state"))

    other.save("copy", 1, link)
    want = {path.name: path.read_bytes() for path in source.path.rglob("*.bin")}
    assert (other.path("copy") / "adapter" / "weights.bin").samefile(source.path / "adapter" / "weights.bin")
    store.save(step_name(1), 1, fill("again"))
    store.save(step_name(2), 2, fill("later"))
    store.prune(1)
    assert not source.path.exists()
    copy = other.open("copy")
    assert copy.manifest.files == source.manifest.files
    assert {path.name: path.read_bytes() for path in copy.path.rglob("*.bin")} == want

    def link_what_is_gone(folder: Path) -> None:
        assert not source.link_into(folder, ("adapter", "state"))
        assert list(folder.iterdir()) == []
        fill("written instead")(folder)

    other.save("copy", 2, link_what_is_gone)
    assert b"instead" in (other.open("copy").path / "adapter" / "weights.bin").read_bytes()


def test_a_replacement_cut_short_is_readable_before_anyone_repairs_it(store: CheckpointStore, fill: Fill) -> None:
    """Prevents a reader (chat, runs) from finding neither the old nor the new, or from writing to heal it."""
    save_steps(store, fill, 1)
    aside = atomic.replaced_name(store.path(step_name(1)))
    store.path(step_name(1)).rename(aside)
    assert [checkpoint.path for checkpoint in store.list()] == [aside]
    assert store.open(step_name(1)).path == aside
    save_steps(store, fill, 2)
    assert store.open(step_name(1)).path == store.path(step_name(1))


def test_a_checkpoint_moved_to_another_place_still_verifies(store: CheckpointStore, fill: Fill, tmp_path: Path) -> None:
    save_steps(store, fill, 1)
    shutil.copytree(store.root, tmp_path / "elsewhere")
    assert CheckpointStore(tmp_path / "elsewhere").open(step_name(1)).step == 1


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "ä"])
def test_names_that_are_not_folders_of_this_store_are_refused(store: CheckpointStore, fill: Fill, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a checkpoint's name"):
        store.save(name, 1, fill(""))


def test_a_torn_index_is_mended_and_never_believed(store: CheckpointStore, fill: Fill) -> None:
    save_steps(store, fill, 1)
    index = store.root.parent / "checkpoints.jsonl"
    index.write_text(index.read_text() + '{"name": "step-0000')
    save_steps(store, fill, 2)
    assert [json.loads(line)["step"] for line in index.read_text().splitlines()] == [1, 2]
    index.unlink()
    assert len(store.list()) == 2


def test_a_forked_child_does_not_keep_the_store_locked(store: CheckpointStore, fill: Fill) -> None:
    """Prevents a data worker, forked during a save, from blocking every later save."""
    children: list[int] = []

    def write(folder: Path) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        children.append(child)
        fill("")(folder)

    store.save(step_name(1), 1, write)
    try:
        started = time.monotonic()
        save_steps(store, fill, 2)
        assert time.monotonic() - started < 10
    finally:
        os.kill(children[0], 9)
        os.waitpid(children[0], 0)


class TestFullDisk:
    """A save that does not fit must name the need, and leave no trace."""

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small disk needs root; the file size limit below covers the same code")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)

    def test_a_full_disk_leaves_earlier_checkpoints_and_no_rest(self, small_disk: Path, fill: Fill) -> None:
        store = CheckpointStore(small_disk / "run" / "checkpoints")
        save_steps(store, fill, 1)

        def write(folder: Path) -> None:
            write_file(folder / "first", b"x" * 100_000)
            write_file(folder / "second", b"x" * 400_000)

        with pytest.raises(CheckpointError, match=r"disk is full.*at least 0\.5 MB, 0\.[0-9] MB are free"):
            store.save(step_name(2), 2, write)
        self.assert_only_the_first(store)
        with pytest.raises(CheckpointError, match=r"disk is full.*at least 5\.0 MB"):
            store.save(step_name(2), 2, fill(""), expected_bytes=5_000_000)
        self.assert_only_the_first(store)
        save_steps(store, fill, 2)

    def test_a_file_that_may_not_be_that_large(self, store: CheckpointStore, fill: Fill) -> None:
        save_steps(store, fill, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # Python ignores the signal that goes with it
        try:
            with pytest.raises(CheckpointError, match=r"does not allow files this large.*at least 1\.0 MB"):
                store.save(step_name(2), 2, fill_large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        self.assert_only_the_first(store)

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path, fill: Fill) -> None:
        (tmp_path / "run").write_text("a file")
        with pytest.raises(CheckpointError, match="could not be saved"):
            CheckpointStore(tmp_path / "run" / "checkpoints").save(step_name(1), 1, fill(""))

    @staticmethod
    def assert_only_the_first(store: CheckpointStore) -> None:
        assert {path.name for path in store.root.iterdir()} == {step_name(1), ".lock"}
        assert store.open(step_name(1)).step == 1


def fill_large(folder: Path) -> None:
    write_file(folder / "large", b"x" * 1_000_000)


class TestBackground:
    """A save beside the loop is as safe as one in it."""

    def test_saves_arrive_in_order_and_are_pruned(self, store: CheckpointStore, fill: Fill) -> None:
        with BackgroundSaver(store, keep=2) as saver:
            for step in range(1, 5):
                saver.start(step_name(step), step, fill(f"at {step}"), {"cursor": step})
                saver.wait_until_read()
        assert [checkpoint.step for checkpoint in store.list()] == [3, 4]
        assert store.open(step_name(4)).metadata == {"cursor": 4}

    def test_weights_may_change_as_soon_as_they_were_read(self, store: CheckpointStore) -> None:
        """Prevents a checkpoint with half of the next optimizer step in it."""
        weights = bytearray(b"a" * 2_000_000)

        def write(folder: Path) -> None:
            time.sleep(0.05)
            (folder / "weights").write_bytes(weights)

        with BackgroundSaver(store) as saver:
            saver.start(step_name(1), 1, write)
            saver.wait_until_read()
            weights[:] = b"b" * len(weights)
        assert (store.path(step_name(1)) / "weights").read_bytes() == b"a" * 2_000_000

    def test_a_failed_save_reaches_the_loop_once(self, store: CheckpointStore, fill: Fill) -> None:
        """Prevents a run that ends well with no checkpoint, because a thread failed unheard."""

        def fail(folder: Path) -> None:
            raise CheckpointError("no room")

        saver = BackgroundSaver(store)
        saver.start(step_name(1), 1, fail)
        with pytest.raises(CheckpointError, match="no room"):
            saver.wait()
        saver.wait()
        saver.start(step_name(2), 2, fill(""))
        saver.wait()
        assert [checkpoint.step for checkpoint in store.list()] == [2]

    def test_the_loops_own_error_is_the_one_that_is_seen(self, store: CheckpointStore, fill: Fill) -> None:
        def fail_beside_a_save() -> None:
            with BackgroundSaver(store) as saver:
                saver.start(step_name(1), 1, fill(""))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_beside_a_save()
        assert store.open(step_name(1)).step == 1
