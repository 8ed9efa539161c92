"""The checkpoints of one run: save, list, verify, fall back, keep few.

The folder is the truth: a checkpoint is a folder whose manifest verifies. `checkpoints.jsonl` beside it is a journal
for people. Knows nothing of models or configs; the caller writes the files, and `metadata` holds what it needs to
read them again. One writer at a time: a lock in the folder, which vanishes with a killed process.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from model_foundry.checkpoint import atomic
from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.checkpoint.manifest import (
    Manifest,
    Recording,
    check_sizes,
    link_file,
    read_manifest,
    recording,
    verify_manifest,
    write_manifest,
)
from model_foundry.errors import CheckpointCorruptError, CheckpointError

FINAL = "final"
_LOCK_NAME = ".lock"
_LOCK_WAIT_SECONDS = 60.0
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the system does not allow files this large",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP_IN_NAME = re.compile(r"(\d+)$")


def step_name(step: int) -> str:
    """The name of a checkpoint saved on schedule: step-00000050."""
    return f"step-{step:08d}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on the disk. `metadata` is what was given to `save`, `manifest` lists its files."""

    name: str
    step: int
    path: Path
    metadata: Mapping[str, Any]
    manifest: Manifest

    @property
    def total_bytes(self) -> int:
        return self.manifest.total_bytes

    def verify(self) -> None:
        """Read every file; CheckpointCorruptError names the one that differs."""
        verify_manifest(self.path)

    def link_into(self, folder: Path, parts: Collection[str]) -> bool:
        """Put these parts into another checkpoint that is being saved, as further names of the same files.

        What was just verified is neither read nor written again. No file of a checkpoint is ever changed: it is
        replaced or deleted by its name, and stays whole under the other one.

        Returns:
            False where the file system has no such names, or this checkpoint is gone by now; nothing is left then.
        """
        try:
            for name, record in self.manifest.files.items():
                if PurePosixPath(name).parts[0] in parts:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    link_file(self.path / name, folder / name, record=record)
        except OSError:
            for part in parts:
                shutil.rmtree(folder / part, ignore_errors=True)
            return False
        return True


class CheckpointStore:
    """Checkpoints below `root` (`run_dir/checkpoints`)."""

    def __init__(
        self,
        root: Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),  # noqa: UP017
    ) -> None:
        self.root = root
        self._clock = clock
        self._known_good: dict[str, str] = {}  # name -> digest of manifests verified or written by this object

    def path(self, name: str) -> Path:
        return self.root / name

    def save(
        self,
        name: str,
        step: int,
        write: Callable[[Path], None],
        metadata: Mapping[str, Any] | None = None,
        *,
        expected_bytes: int = 0,
    ) -> Path:
        """Save a checkpoint; it appears under its name when every byte is on the disk, or not at all.

        Args:
            name: `step_name(step)` or "final"; an existing one is replaced.
            write: called with an empty folder to fill. Files written with `write_tensors` or `write_file` are hashed
                on the way; others are read once more.
            metadata: JSON values to get back from `Checkpoint.metadata`.
            expected_bytes: about how much `write` will write, where the caller knows; tried against the free space.

        Raises:
            CheckpointError: the disk is full (need and free space named) or not writable; what was there before stays.
        """
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} cannot be a checkpoint's name", hint="Use letters, digits, - and _.")
        json.dumps(metadata, allow_nan=False)
        target = self.root / name
        recorded = Recording()
        try:
            if not self.root.is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                atomic.sync_directory(self.root.parent)
            with self._locked():
                self._tidy()
                self._refuse_if_too_large(target, expected_bytes)
                with recording() as recorded, atomic.atomic_directory(target) as folder:
                    write(folder)
                    manifest = write_manifest(
                        folder, fields={"name": name, "step": step, "metadata": dict(metadata or {})}
                    )
                self._known_good[name] = manifest.digest
                self._append_to_index(name, step, manifest)
        except OSError as error:
            raise self._explain(error, target, max(expected_bytes, sum(recorded.planned_bytes.values()))) from error
        return target

    def list(self) -> list[Checkpoint]:
        """Checkpoints whose manifest and file sizes are right, oldest first; contents are not read."""
        found = []
        for name in self._names():
            try:
                found.append(self._read(name, quick=True))
            except CheckpointCorruptError:
                continue
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.name == FINAL))

    def open(self, name: str, *, verify: bool = True) -> Checkpoint:
        """The checkpoint of that name, every byte verified; without `verify` only the sizes, of what was just written.

        Raises:
            CheckpointError: there is none; CheckpointCorruptError: it is damaged, naming the file.
        """
        if name not in self._names():
            names = ", ".join(checkpoint.name for checkpoint in self.list()) or "none"
            raise CheckpointError(f"no checkpoint named {name!r}", where=str(self.root), hint=f"There is: {names}.")
        return self._read(name, quick=not verify)

    def newest_valid(self, on_fallback: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose every byte verifies; None when there is none.

        `on_fallback` gets one sentence for every newer one that had to be passed over: which file, what was expected
        and what was found.
        """
        for name in reversed(self._names()):
            try:
                return self._read(name, quick=False)
            except CheckpointCorruptError as error:
                on_fallback(f"checkpoint {name} cannot be used: {error}")
        return None

    def prune(self, keep: int | None, protected: Collection[str] = (FINAL,)) -> list[str]:
        """Delete all but the `keep` newest checkpoints beside `protected`; the names that went.

        The last one that verifies is never deleted, nor is "final". Damaged ones do not count as kept, and go when
        they are older than those that are.
        """
        if keep is None or not self.root.is_dir():
            return []
        if keep < 1:
            raise CheckpointError(f"cannot keep {keep} checkpoints", hint="Keep at least one, or None for all.")
        try:
            with self._locked():
                self._tidy()
                doomed = self._doomed(keep, {*protected, FINAL})
                for name in doomed:
                    atomic.remove_directory(self.root / name)
                    self._known_good.pop(name, None)
        except OSError as error:
            raise self._explain(error, self.root, 0) from error
        return doomed

    def _doomed(self, keep: int, protected: Collection[str]) -> list[str]:
        good = {checkpoint.name for checkpoint in self.list()}
        names = [name for name in self._names() if name not in protected]
        kept = [name for name in names if name in good][-keep:]
        if not kept:
            return []
        doomed = names[: names.index(kept[0])]
        # A size says little: before anything goes, one that stays must have been verified.
        if not any(self._verifies(name) for name in reversed([*kept, *(name for name in protected if name in good)])):
            last_valid = next((name for name in reversed(doomed) if self._verifies(name)), None)
            doomed = [name for name in doomed if name != last_valid]
        return doomed

    def _verifies(self, name: str) -> bool:
        try:
            digest = self._known_good.get(name)
            if digest is None or self._read(name, quick=True).manifest.digest != digest:
                self._read(name, quick=False)
        except CheckpointCorruptError:
            return False
        return True

    def _read(self, name: str, *, quick: bool) -> Checkpoint:
        path = self._folder(name)
        if quick:
            manifest = read_manifest(path)
            check_sizes(path, manifest)
        else:
            manifest = verify_manifest(path)
            self._known_good[name] = manifest.digest
        try:
            step, metadata = int(manifest.fields["step"]), dict(manifest.fields["metadata"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointCorruptError("the manifest is not a checkpoint's", where=str(path)) from error
        return Checkpoint(name=name, step=step, path=path, metadata=metadata, manifest=manifest)

    def _names(self) -> list[str]:
        """Names of all folders that are or were a checkpoint, oldest first by step."""
        if not self.root.is_dir():
            return []
        entries = {entry.name.removeprefix(atomic.REPLACED_PREFIX) for entry in os.scandir(self.root) if entry.is_dir()}
        return sorted((name for name in entries if _NAME.fullmatch(name)), key=self._age)

    def _age(self, name: str) -> tuple[float, bool, str]:
        try:
            step = float(read_manifest(self._folder(name)).fields["step"])
        except (CheckpointCorruptError, KeyError, TypeError, ValueError):
            match = _STEP_IN_NAME.search(name)
            step = float(match[1]) if match else float("inf")
        return (step, name == FINAL, name)

    def _folder(self, name: str) -> Path:
        """Where the checkpoint lies: under its name, or aside when a kill cut its replacement short."""
        path = self.root / name
        aside = atomic.replaced_name(path)
        return aside if aside.is_dir() and not path.is_dir() else path

    def _tidy(self) -> None:
        for name in self._names():
            atomic.settle_replaced(self.root / name)
        atomic.remove_leftovers(self.root)

    def _locked(self) -> FileLock:
        try:
            return FileLock.acquire(self.root / _LOCK_NAME, wait_seconds=_LOCK_WAIT_SECONDS)
        except LockHeldError as error:
            raise CheckpointError(f"{error.holder} is saving here", where=str(self.root)) from None

    def _append_to_index(self, name: str, step: int, manifest: Manifest) -> None:
        path = self.root.parent / "checkpoints.jsonl"
        record = {
            "name": name,
            "step": step,
            "bytes": manifest.total_bytes,
            "sha256": manifest.digest,
            "clock": {"time": self._clock().isoformat(timespec="seconds")},
        }
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            atomic.cut_torn_line(path)
            atomic.append_line(descriptor, json.dumps(record).encode())
        finally:
            os.close(descriptor)

    def _refuse_if_too_large(self, target: Path, expected_bytes: int) -> None:
        free = atomic.free_bytes(self.root)
        if expected_bytes > free:
            raise _no_room(errno.ENOSPC, target, expected_bytes, free)

    def _explain(self, error: OSError, target: Path, needed_bytes: int) -> CheckpointError:
        if error.errno in _NO_ROOM:
            newest = max((checkpoint.total_bytes for checkpoint in self.list()[-1:]), default=0)
            return _no_room(error.errno, target, max(needed_bytes, newest), atomic.free_bytes(self.root))
        return CheckpointError(f"could not be saved: {error.strerror or error}", where=str(error.filename or target))


def _no_room(number: int, target: Path, needed_bytes: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"{_NO_ROOM[number]}: the checkpoint needs at least {needed_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
        where=str(target),
        hint="Free some space, lower training.save_total_limit, or choose another run_dir; earlier checkpoints are "
        "untouched, and --resume auto goes on from the newest.",
    )
