"""Files of rows or text to packed shards: read, encode by several processes, pack, write; go on where it was cut short.

The bytes depend on the plan alone. Blocks of records go out to the processes and come back in order; what is packed and
written is done here, in order. Memory is bounded by a window of tokens and a few blocks for each process. Says how far
it is through a callback; prints nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.data.byte_streams import is_compressed
from model_foundry.data.files import iter_records
from model_foundry.data.rows import BadRows
from model_foundry.data.shards.blocks import Block, Place, row_blocks, text_blocks
from model_foundry.data.shards.encode import EncodedBlock, RowEncoder, TextEncoder, first_format
from model_foundry.data.shards.format import Counts, Index
from model_foundry.data.shards.packing import Packed, RowWindow, Segments
from model_foundry.data.shards.plan import PackOptions, Plan, RendererSource, list_inputs, make_plan
from model_foundry.data.shards.processes import end_with_parent
from model_foundry.data.shards.split import Split
from model_foundry.data.shards.writer import ShardWriter, State, finished_index, planned_clock
from model_foundry.errors import DataError, FoundryError
from model_foundry.rendering import Renderer

_BLOCKS_A_PROCESS = 3
_SMALL_BYTES = 32 << 20
Encoder = RowEncoder | TextEncoder


@dataclass(frozen=True, slots=True)
class PackProgress:
    """How far a build is: input bytes done (estimated within a file) and in all, and what came out since it began."""

    num_bytes: int
    total_bytes: int
    num_records: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was built.

    Attributes:
        index: what the shards hold.
        num_processes: encoding, this one included where it does it itself.
        seconds: of this call; a build that went on has more behind it.
        num_new_tokens: packed by this call.
        num_new_bytes: of input, read by this call.
        went_on: whether an earlier build was continued, or (with no new tokens) found whole.
    """

    index: Index
    num_processes: int
    seconds: float
    num_new_tokens: int
    num_new_bytes: int
    went_on: bool


def build_shards(
    source: Path,
    out: Path,
    options: PackOptions,
    renderer_source: RendererSource,
    *,
    num_processes: int = 0,
    on_progress: Callable[[PackProgress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> PackReport:
    """Pack a file or folder into shards; continue a build of the same plan that was cut short.

    Args:
        source: rows or text, whatever `iter_records` reads.
        out: the folder to be made. Nothing is there until all is whole.
        num_processes: encoding at once; 0 chooses by the size of the input. Changes no byte of the result.
        on_progress: told after every block.
        say: told what a person should know: that the build goes on, that the input is being hashed.

    Raises:
        DataError: inputs that cannot be read or used, no rows in them, another plan than the build that lies there, or
            a target that holds something else. FoundryError: a process ended before its work was done.
    """
    started = time.perf_counter()
    say = say or (lambda _: None)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError("the shards would lie inside their own input", where=str(out), hint="Name another with --out")
    files = list_inputs(source)
    if renderer_source.now is None:
        # A template may write the date: what was begun yesterday goes on with yesterday's.
        renderer_source = replace(renderer_source, now=planned_clock(out) or datetime.now())
    renderer = renderer_source.load()
    plan, stamps = _plan_of(source, files, options, renderer)
    if (index := finished_index(out, plan)) is not None:
        return PackReport(index, 0, time.perf_counter() - started, 0, 0, True)
    format = "text" if options.kind == "text" else first_format(_all_records(files), options.format)
    encoder = make_encoder(renderer, options, format)
    num_processes = num_processes or _choose_processes(plan.num_bytes)
    opened = ShardWriter.opened(out, plan, kind=options.kind, max_length=options.max_length, dtype=encoder.dtype)
    with _where_writes_fail(out), opened as (writer, state):
        went_on = state.num_parts > 0 or state.has_index
        if went_on:
            say(f"going on after {state.counts.num_records:,} records in {len(state.shards):,} shards")
        build = _Build(files, options, encoder, writer, started, on_progress)
        before = sum(shard.num_tokens for shard in state.shards)
        try:
            if not state.has_index:
                with _encoding(num_processes, encoder, renderer_source, options, format) as encode:
                    state = build.run(state, encode)
            _require_some(state, options, source)
            _require_unchanged(files, stamps)
        except DataError:
            writer.discard()  # other data or other options are wanted, and those are another build
            raise
        index = writer.finish(state)
    seconds = time.perf_counter() - started
    return PackReport(index, num_processes, seconds, index.num_tokens - before, build.num_bytes, went_on)


@contextmanager
def _where_writes_fail(out: Path) -> Iterator[None]:
    """A write to an open file says that the disk is full and not where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(out)
        raise


def make_encoder(renderer: Renderer, options: PackOptions, format: str) -> Encoder:
    """What turns blocks into tokens. Raises: DataError, as `RowEncoder` and `TextEncoder`."""
    if options.kind == "text":
        return TextEncoder(renderer, options)
    return RowEncoder(renderer, options, format=format)


class _Build:
    """The loop: blocks in order to windows, windows to parts."""

    def __init__(
        self,
        files: list[Path],
        options: PackOptions,
        encoder: Encoder,
        writer: ShardWriter,
        started: float,
        on_progress: Callable[[PackProgress], None] | None,
    ) -> None:
        self._files = files
        self._options = options
        self._encoder = encoder
        self._writer = writer
        self._started = started
        self._on_progress = on_progress
        self._meter = _Meter(files)
        self._num_tokens = 0

    @property
    def num_bytes(self) -> int:
        return self._meter.num_new_bytes

    def run(self, state: State, encode: Callable[[Iterator[Block]], Iterator[tuple[Block, EncodedBlock]]]) -> State:
        self._meter.begin(state.place)
        window = self._window(state)
        counts, place = Counts(), state.place
        for block, encoded in encode(self._blocks(state.place)):
            self._refuse_problems(encoded, state.counts.num_records + counts.num_records)
            window.add(encoded.segments)
            counts, place = counts.plus(encoded.counts), block.after
            self._tell(block, encoded, state.counts.num_records + counts.num_records)
            if window.is_full:
                state = self._commit(window, state, place, counts, is_last=False)
                counts = Counts()
        return self._commit(window, state, place, counts, is_last=True)

    def _window(self, state: State) -> RowWindow | _StreamWindow:
        if self._options.kind == "text":
            return _StreamWindow(self._options.shard_tokens, self._encoder.dtype)
        return RowWindow(
            capacity=self._options.max_length,
            num_tokens=self._options.window_tokens,
            waiting=state.waiting or Segments.empty(self._encoder.dtype),
        )

    def _blocks(self, start: Place) -> Iterator[Block]:
        if isinstance(self._encoder, TextEncoder):
            field = self._options.text_field
            split = Split(self._options.part, self._options.validation_share)
            return text_blocks(self._files, start, text_field=field, cut_place=self._encoder.cut_place, split=split)
        return row_blocks(self._files, start)

    def _commit(
        self, window: RowWindow | _StreamWindow, state: State, place: Place, counts: Counts, *, is_last: bool
    ) -> State:
        packed = window.close(is_last=is_last)
        waiting = None if is_last else window.waiting
        return self._writer.commit(packed, state, place=place, counts=counts, waiting=waiting)

    def _refuse_problems(self, encoded: EncodedBlock, num_before: int) -> None:
        bad = BadRows()
        for source, what in encoded.problems:
            bad.add(source, what)
        hint = encoded.hint or "Mend them, or leave them out and count them with bad_records=drop"
        bad.raise_if_any(num_rows=num_before + encoded.counts.num_records, path=None, hint=hint)

    def _tell(self, block: Block, encoded: EncodedBlock, num_records: int) -> None:
        self._num_tokens += len(encoded.segments.tokens)
        self._meter.read(block)
        if self._on_progress is not None:
            seconds = time.perf_counter() - self._started
            done, total = self._meter.num_bytes, self._meter.total_bytes
            self._on_progress(PackProgress(done, total, num_records, self._num_tokens, seconds))


class _StreamWindow:
    """Documents waiting to be written: a stream is not packed, and nothing stays behind."""

    waiting = None

    def __init__(self, num_tokens: int, dtype: np.dtype[Any]) -> None:
        self._max_tokens = num_tokens
        self._dtype = dtype
        self._added: list[Segments] = []
        self._num_added = 0

    @property
    def is_full(self) -> bool:
        return self._num_added >= self._max_tokens

    def add(self, segments: Segments) -> None:
        self._added.append(segments)
        self._num_added += len(segments.tokens)

    def close(self, *, is_last: bool) -> Packed:
        segments = Segments.joined([Segments.empty(self._dtype), *self._added])
        self._added, self._num_added = [], 0
        return Packed(segments, np.zeros(0, dtype=np.int64))


class _Meter:
    """Input bytes done: whole files exactly, and within a file as many as characters were seen."""

    def __init__(self, files: list[Path]) -> None:
        self._sizes = [file.stat().st_size for file in files]
        self._is_compressed = [is_compressed(file) for file in files]
        self.total_bytes = sum(self._sizes)
        self.num_bytes = self._first = 0
        self._file = 0
        self._in_file = 0

    def begin(self, place: Place) -> None:
        self._file = place.num_files
        self._first = self.num_bytes = sum(self._sizes[: place.num_files])

    @property
    def num_new_bytes(self) -> int:
        return self.total_bytes - self._first

    def read(self, block: Block) -> None:
        if block.after.num_files != self._file:
            self._file, self._in_file = block.after.num_files, 0
        self._in_file += block.num_chars // (4 if self._is_compressed[self._file] else 1)
        whole = sum(self._sizes[: self._file])
        self.num_bytes = max(self.num_bytes, whole + min(self._in_file, self._sizes[self._file]))


# -- processes -------------------------------------------------------------------------------------------------------


@contextmanager
def _encoding(
    num_processes: int, encoder: Encoder, source: RendererSource, options: PackOptions, format: str
) -> Iterator[Callable[[Iterator[Block]], Iterator[tuple[Block, EncodedBlock]]]]:
    """What encodes blocks and gives them back in order: here, or by processes that make their own renderer."""
    if num_processes == 1:
        yield lambda blocks: ((block, encoder.encode(block)) for block in blocks)
        return
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(source, options, format),
    )
    try:
        yield lambda blocks: _in_order(pool, blocks, ahead=_BLOCKS_A_PROCESS * num_processes)
    except BrokenProcessPool as error:
        hint = "Its memory may have run out: set processes lower; what is packed so far is kept"
        raise FoundryError("a process that encodes ended before its work was done", hint=hint) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, blocks: Iterator[Block], *, ahead: int
) -> Iterator[tuple[Block, EncodedBlock]]:
    """At most `ahead` blocks are under way, so that reading does not run away from writing."""
    under_way: deque[tuple[Block, Future[EncodedBlock]]] = deque()
    for block in blocks:
        under_way.append((replace(block, items=()), pool.submit(_encode, block)))
        if len(under_way) >= ahead:
            done, future = under_way.popleft()
            yield done, future.result()
    while under_way:
        done, future = under_way.popleft()
        yield done, future.result()


_encoder: Encoder | None = None


def _start_process(source: RendererSource, options: PackOptions, format: str) -> None:
    global _encoder
    end_with_parent()
    _encoder = make_encoder(source.load(), options, format)


def _encode(block: Block) -> EncodedBlock:
    if _encoder is None:
        raise RuntimeError("the process was not started by build_shards")
    return _encoder.encode(block)


def _choose_processes(num_bytes: int) -> int:
    if num_bytes < _SMALL_BYTES:  # starting a process takes as long as encoding some megabytes
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- what is read ----------------------------------------------------------------------------------------------------


def _plan_of(
    source: Path, files: list[Path], options: PackOptions, renderer: Renderer
) -> tuple[Plan, list[tuple[int, int]]]:
    stamps = [_stamp(file) for file in files]
    return make_plan(source, files, options, renderer), stamps


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _require_unchanged(files: list[Path], stamps: list[tuple[int, int]]) -> None:
    for file, stamp in zip(files, stamps, strict=True):
        if not file.exists() or _stamp(file) != stamp:
            hint = "Pack it again when nobody writes to it"
            raise DataError("the file was changed while it was packed", where=str(file), hint=hint)


def _require_some(state: State, options: PackOptions, source: Path) -> None:
    if state.counts.num_rows:
        return
    if state.counts.num_records == 0:
        what, hint = "the input holds no records", "Put one JSON object or one document in it at least"
        if options.part != "all" and next(_all_records(list_inputs(source)), None) is not None:
            what = f"no document falls on the side of {options.part} with validation_share={options.validation_share:g}"
            hint = "It takes more documents, another share, or held-out text of its own in a file"
        raise DataError(what, where=str(source), hint=hint)
    why = "; ".join(f"{count:,} {reason}" for reason, count in state.counts.lost.items())
    named = "".join(f"\n  {line}" for line in state.counts.first_lost)
    text = "Give documents that hold text"
    hint = text if options.kind == "text" else "Raise max_length or set overlength=truncate"
    raise DataError(f"nothing is left to pack: {why}{named}", where=str(source), hint=hint)


def _all_records(files: list[Path]) -> Iterator[Any]:
    for file in files:
        yield from iter_records(file)
