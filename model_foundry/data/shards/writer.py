"""One part of a build after another to the disk, so that a kill at any instant costs at most the part in hand.

The work lies in a folder beside the target. A part's files are written and synced first, its record last; files without
a record are not there as far as anyone is concerned. When all is done the index is written, the records go, and the
folder takes the target's name. Knows arrays and counts; knows no renderer and no input files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.checkpoint.atomic import atomic_write, sync_directory
from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.data.shards.blocks import Place
from model_foundry.data.shards.format import (
    INDEX_NAME,
    Counts,
    FileEntry,
    Index,
    ShardEntry,
    array_names,
    array_type,
    check_files,
    encode_index,
    encode_json,
    files_as_json,
    files_from_json,
    map_array,
    read_index,
    shard_as_json,
    shard_from_json,
    shard_name,
)
from model_foundry.data.shards.packing import GOES_ON, Packed, Segments
from model_foundry.data.shards.plan import Plan
from model_foundry.errors import DataError

_PLAN, _LOCK = "plan.json", "lock"
_WAITING_ARRAYS = {"tokens": None, "lengths": np.dtype("<i8"), "rows": np.dtype("<u8"), "spans": np.dtype("<i8")}


@dataclass(frozen=True, slots=True)
class State:
    """How far a build is.

    Attributes:
        place: where reading goes on.
        counts: what became of the records so far.
        shards: the shards that are written.
        waiting: rows read but not yet in a shard, or None.
        num_parts: parts committed; a part may have written no shard.
        has_index: all is written, and only the name is to be given.
    """

    place: Place
    counts: Counts
    shards: tuple[ShardEntry, ...]
    waiting: Segments | None
    num_parts: int
    has_index: bool = False


def work_folder(out: Path) -> Path:
    """Where a build of `out` lies until it is whole."""
    return out.with_name(f".packing-{out.name}")


def finished_index(out: Path, plan: Plan) -> Index | None:
    """The index of `out` if it holds whole shards of this plan; None if nothing is there.

    Raises:
        DataError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / INDEX_NAME).is_file():
        raise DataError("the folder to pack into is not empty", where=str(out), hint="Name another with --out")
    index = read_index(out)
    changes = plan.changes(Plan(index.parameters, index.inputs))
    if changes:
        raise DataError(
            f"other shards are there: {_listed(changes)}", where=str(out), hint="Name another folder with --out"
        )
    check_files(out, index.shards)
    return index


def planned_clock(out: Path) -> datetime | None:
    """The time that an earlier build of `out` gave to its template, if it asked for it."""
    for path in (work_folder(out) / _PLAN, work_folder(out) / INDEX_NAME, out / INDEX_NAME):
        if path.is_file():
            clock = _read_json(path).get("parameters", {}).get("clock")
            return None if clock is None else datetime.fromisoformat(clock)
    return None


class ShardWriter:
    """The work folder of one build. Made by `opened`, by one process at a time."""

    def __init__(self, out: Path, plan: Plan, *, kind: str, max_length: int, dtype: np.dtype[Any]) -> None:
        self._out = out
        self._folder = work_folder(out)
        self._plan = plan
        self._kind = kind
        self._max_length = max_length
        self._dtype = dtype

    @staticmethod
    @contextmanager
    def opened(
        out: Path, plan: Plan, *, kind: str, max_length: int, dtype: np.dtype[Any]
    ) -> Iterator[tuple[ShardWriter, State]]:
        """The writer and how far an earlier build came.

        Raises:
            DataError: another process is at it, or the build that lies there has another plan or is damaged.
        """
        writer = ShardWriter(out, plan, kind=kind, max_length=max_length, dtype=dtype)
        folder = writer._folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock.acquire(folder / _LOCK, wait_seconds=0.1)
        except LockHeldError as held:
            raise DataError(f"{held.holder} is packing into this folder", where=str(out)) from None
        with lock:
            if not (folder / _LOCK).exists():
                raise DataError("another process has just packed into this folder", where=str(out))
            yield writer, writer._begin()

    def commit(self, packed: Packed, state: State, *, place: Place, counts: Counts, waiting: Segments | None) -> State:
        """Write a part: a shard if there is anything for one, then what waits, then the record that makes it count.

        Args:
            state: before this part.
            place: where reading goes on behind it.
            counts: of the records read since.

        Raises:
            OSError: the disk is full or not writable; what was committed before is safe.
        """
        shard = self._write_shard(len(state.shards), packed) if len(packed.segments.tokens) else None
        number = state.num_parts
        kept = {} if waiting is None else self._write_waiting(number, waiting)
        sync_directory(self._folder)
        record = {
            "place": asdict(place),
            "counts": counts.as_json(),
            "shard": None if shard is None else shard_as_json(shard),
            "waiting": files_as_json(kept),
        }
        atomic_write(self._folder / _part_name(number), encode_json(record))
        self._remove_waiting(number - 1)
        shards = state.shards if shard is None else (*state.shards, shard)
        return State(place, state.counts.plus(counts), shards, waiting, number + 1)

    def finish(self, state: State) -> Index:
        """Write the index and give the folder its name."""
        if not state.has_index:
            atomic_write(self._folder / INDEX_NAME, encode_index(self._index(state)))
        return self._take_name()

    def discard(self) -> None:
        """Remove a build that cannot go on."""
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- beginning and end -------------------------------------------------------------------------------------------

    def _begin(self) -> State:
        path = self._folder / _PLAN
        if (self._folder / INDEX_NAME).is_file():  # killed between the index and the name
            index = read_index(self._folder)
            self._require_plan(Plan(index.parameters, index.inputs))
            return State(Place(), index.counts, index.shards, None, 0, has_index=True)
        if path.is_file():
            self._require_plan(Plan.from_json(_read_json(path)))
            return self._read_parts()
        atomic_write(path, encode_json(self._plan.as_json()))
        return State(Place(), Counts(), (), None, 0)

    def _require_plan(self, earlier: Plan) -> None:
        changes = self._plan.changes(earlier)
        if changes:
            hint = f"Give it what it had, or start again after: rm -r {self._folder}"
            what = f"an earlier build that was cut short was made otherwise: {_listed(changes)}"
            raise DataError(what, where=str(self._folder), hint=hint)

    def _read_parts(self) -> State:
        state = State(Place(), Counts(), (), None, 0)
        kept: Mapping[str, FileEntry] = {}
        while (path := self._folder / _part_name(state.num_parts)).is_file():
            record = _read_json(path)
            shards = state.shards
            if record["shard"] is not None:
                shards = (*shards, shard_from_json(record["shard"]))
            kept = files_from_json(record["waiting"])
            counts = state.counts.plus(Counts.from_json(record["counts"]))
            state = State(Place(**record["place"]), counts, shards, None, state.num_parts + 1)
        check_files(self._folder, state.shards)
        waiting = self._read_waiting(state.num_parts - 1, kept) if kept else None
        return State(state.place, state.counts, state.shards, waiting, state.num_parts)

    def _index(self, state: State) -> Index:
        return Index(
            kind=self._kind,
            max_length=self._max_length,
            token_bytes=self._dtype.itemsize,
            parameters=self._plan.parameters,
            inputs=self._plan.inputs,
            counts=state.counts,
            shards=state.shards,
        )

    def _take_name(self) -> Index:
        """Only the index and its shards stay; a kill in here leaves an index, with which the next build begins."""
        index = read_index(self._folder)
        keep = {INDEX_NAME, _LOCK, *(name for shard in index.shards for name in shard.files)}
        for path in self._folder.iterdir():
            if path.name not in keep:
                path.unlink()
        sync_directory(self._folder)
        (self._folder / _LOCK).unlink()
        self._folder.rename(self._out)
        sync_directory(self._out.parent)
        return index

    # -- files -------------------------------------------------------------------------------------------------------

    def _write_shard(self, number: int, packed: Packed) -> ShardEntry:
        segments = packed.segments
        arrays = {
            "tokens": segments.tokens,
            "weights": segments.weights() if self._kind == "rows" else None,
            "starts": segments.starts,
            "rows": segments.rows,
            "bins": packed.bins,
        }
        if self._kind == "text":
            begins = segments.rows != np.uint64(GOES_ON)
            arrays |= {"starts": segments.starts[begins], "rows": segments.rows[begins]}
        files = {}
        for name in array_names(self._kind):
            array = np.asarray(arrays[name])
            dtype = array_type(name, self._dtype.itemsize)
            files[shard_name(number, name)] = self._write(shard_name(number, name), array.astype(dtype, copy=False))
        num_trained = segments.num_trained if self._kind == "rows" else len(segments.tokens)
        num_starts, num_bins = len(np.asarray(arrays["starts"])), len(packed.bins)
        return ShardEntry(len(segments.tokens), num_trained, num_starts, num_bins, files)

    def _write_waiting(self, number: int, waiting: Segments) -> dict[str, FileEntry]:
        files = {}
        for name, dtype in _WAITING_ARRAYS.items():
            file = _waiting_name(number, name)
            files[file] = self._write(file, getattr(waiting, name).astype(dtype or self._dtype, copy=False).reshape(-1))
        return files

    def _read_waiting(self, number: int, kept: Mapping[str, FileEntry]) -> Segments:
        check_files(self._folder, (ShardEntry(0, 0, 0, 0, kept),), hashes=True)
        found = {
            name: np.array(map_array(self._folder / _waiting_name(number, name), np.dtype(dtype or self._dtype)))
            for name, dtype in _WAITING_ARRAYS.items()
        }
        return Segments(found["tokens"], found["lengths"], found["rows"], found["spans"].reshape(-1, 3))

    def _remove_waiting(self, number: int) -> None:
        for name in _WAITING_ARRAYS:
            with suppress(FileNotFoundError):
                (self._folder / _waiting_name(number, name)).unlink()

    def _write(self, name: str, array: np.ndarray) -> FileEntry:
        data = np.ascontiguousarray(array).view(np.uint8).data if array.size else memoryview(b"")
        # Over whatever a killed build left under this name.
        with open(self._folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _part_name(number: int) -> str:
    return f"part-{number:05d}.json"


def _waiting_name(number: int, array: str) -> str:
    return f"waiting-{number:05d}.{array}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        hint = f"Start again after: rm -r {path.parent}"
        raise DataError("what an earlier build left is damaged", where=str(path), hint=hint) from error


def _listed(changes: list[str], *, most: int = 5) -> str:
    more = f"; and {len(changes) - most:,} more" if len(changes) > most else ""
    return "; ".join(changes[:most]) + more
