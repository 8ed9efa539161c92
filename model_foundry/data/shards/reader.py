"""Packed shards as a data set: any bin by its number, and an order that is a function of seed and position alone.

Everything is read through memory maps, so opening costs nothing and memory is the system's to manage. A bin of rows is
as it was packed. A bin of text is a chunk of the stream, as long as whoever reads it likes. Knows no renderer; refuses
shards of another tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from model_foundry.data.shards.format import (
    PIECE_SHIFT,
    Index,
    array_names,
    array_type,
    check_files,
    map_array,
    read_index,
    shard_name,
)
from model_foundry.errors import DataError
from model_foundry.types import Datum

_MAPPED_SHARDS = 256
_COUNTED_AT_ONCE = 1 << 24
_ROW_BITS = np.uint64((1 << PIECE_SHIFT) - 1)


@dataclass(frozen=True, slots=True)
class Bin:
    """T tokens and the S rows or documents that they belong to.

    Attributes:
        tokens: int32 [T].
        weights: float32 [T], 1.0 where the token is trained; of text, everywhere.
        starts: int64 [S], where each row or document begins in this bin; the first is 0, though in text what begins
            there may be the rest of a document.
        rows: int64 [S], the record of the input each of them was.
        pieces: int64 [S], which piece of its row each is; 0 where the row was not split.
    """

    tokens: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    pieces: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """int32 [T]: each token's place in its row or document."""
        lengths = np.diff(self.starts, append=len(self.tokens))
        return (np.arange(len(self.tokens)) - np.repeat(self.starts, lengths)).astype(np.int32)

    @property
    def segments(self) -> np.ndarray:
        """int32 [T]: which of the rows or documents each token belongs to, counted from 0."""
        lengths = np.diff(self.starts, append=len(self.tokens))
        return np.repeat(np.arange(len(self.starts), dtype=np.int32), lengths)


@dataclass(frozen=True, slots=True)
class ShardStats:
    """What there is to train on. `lengths` are percentiles of tokens a row or document: 0, 5, 25, 50, 75, 95, 100."""

    num_tokens: int
    num_trained_tokens: int
    num_rows: int
    num_bins: int
    fill: float
    lengths: tuple[int, ...]

    def steps_per_epoch(self, bins_per_step: int) -> int:
        """Optimizer steps that one epoch makes; the last may be short."""
        return -(-self.num_bins // bins_per_step)


class PackedShards:
    """Shards on the disk. Made by `open`; may be pickled to other processes, which map the files themselves."""

    def __init__(self, folder: Path, index: Index, *, max_length: int) -> None:
        self.folder = folder
        self.index = index
        self.max_length = max_length
        self.num_bins = index.num_bins(max_length)
        is_rows = index.kind == "rows"
        self._starts_in_stream = np.cumsum([0, *(shard.num_tokens for shard in index.shards)])
        self._first_bins = np.cumsum([0, *(shard.num_bins for shard in index.shards)]) if is_rows else None
        self._order = lru_cache(maxsize=2)(self._compute_order)
        self._map = lru_cache(maxsize=_MAPPED_SHARDS)(self._map_shard)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        tokenizer: str | None = None,
        max_length: int | None = None,
        check_hashes: bool = False,
    ) -> PackedShards:
        """Open shards, with every file's size held against the index.

        Args:
            folder: what `build_shards` made.
            tokenizer: the fingerprint of the tokenizer that the model uses.
            max_length: tokens of a chunk of text; default as packed. Rows stay in the bins they were packed into.
            check_hashes: read every byte and hold it against the index too.

        Raises:
            DataError: no shards, a missing or damaged file (by name), another tokenizer, or another length for rows.
        """
        folder = Path(folder)
        index = read_index(folder)
        theirs = index.parameters["tokenizer"]
        if tokenizer is not None and tokenizer != theirs:
            raise DataError(
                f"the shards were made with another tokenizer: {theirs[:12]}…, the model has {tokenizer[:12]}…",
                where=str(folder),
                hint="Pack the data again with: foundry data pack FILE --out FOLDER model=NAME",
            )
        if index.kind == "rows" and max_length not in (None, index.max_length):
            what = f"the rows were packed into bins of {index.max_length:,} tokens, not {max_length:,}"
            raise DataError(what, where=str(folder), hint="Pack them again with max_length")
        check_files(folder, index.shards, hashes=check_hashes)
        return cls(folder, index, max_length=max_length or index.max_length)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, (self.folder, self.index, self.max_length)

    # -- bins --------------------------------------------------------------------------------------------------------

    def bin(self, number: int) -> Bin:
        """Bin `number`, counted from 0.

        Raises:
            IndexError: there is no such bin.
        """
        if not 0 <= number < self.num_bins:
            raise IndexError(f"bin {number} of {self.num_bins}")
        return self._chunk(number) if self._first_bins is None else self._bin_of_rows(number, self._first_bins)

    def datums(self, number: int, *, mask_documents: bool = False) -> tuple[Datum, ...]:
        """Bin `number` for the engine: one datum a row, or a chunk of text as one datum.

        The last token of a chunk has the first of the next chunk as its target, so that every token of the stream but
        the very first is one.

        Args:
            mask_documents: keep the documents of a chunk apart, each a datum of its own.
        """
        found = self.bin(number)
        ids, weights = found.tokens, found.weights
        if self._first_bins is not None or mask_documents:
            ends = [*found.starts[1:].tolist(), len(ids)]
            bounds = list(zip(found.starts.tolist(), ends, strict=True))
        else:
            bounds = [(0, len(ids) + 1)]
        if self._first_bins is None and number + 1 < self.num_bins:
            following = self.stream_tokens((number + 1) * self.max_length, (number + 1) * self.max_length + 1)
            ids, weights = np.append(ids, following), np.append(weights, np.float32(1))
            if mask_documents and not self._begins_document((number + 1) * self.max_length):
                bounds[-1] = (bounds[-1][0], len(ids))
        datums = [Datum.from_row(ids[start:end], weights[start:end]) for start, end in bounds]
        return tuple(datum for datum in datums if datum.num_tokens)

    def _bin_of_rows(self, number: int, first_bins: np.ndarray) -> Bin:
        shard = int(np.searchsorted(first_bins, number, side="right")) - 1
        arrays, entry = self._map(shard), self.index.shards[shard]
        inside = number - int(first_bins[shard])
        first = int(arrays["bins"][inside])
        last = int(arrays["bins"][inside + 1]) if inside + 1 < entry.num_bins else entry.num_starts
        start = int(arrays["starts"][first])
        end = int(arrays["starts"][last]) if last < entry.num_starts else entry.num_tokens
        rows = arrays["rows"][first:last]
        bits = np.unpackbits(arrays["weights"][start // 8 : -(-end // 8)], bitorder="little")
        return Bin(
            arrays["tokens"][start:end].astype(np.int32),
            bits[start % 8 : start % 8 + end - start].astype(np.float32),
            arrays["starts"][first:last].astype(np.int64) - start,
            (rows & _ROW_BITS).astype(np.int64),
            (rows >> np.uint64(PIECE_SHIFT)).astype(np.int64),
        )

    def _chunk(self, number: int) -> Bin:
        start = number * self.max_length
        end = min(start + self.max_length, self.index.num_tokens)
        starts: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        for shard, base in self._shards_between(start, end):
            arrays = self._map(shard)
            low, high = np.searchsorted(arrays["starts"], [max(start - base, 0), end - base])
            starts.append(arrays["starts"][low:high].astype(np.int64) + base - start)
            rows.append(arrays["rows"][low:high].astype(np.int64))
        found, numbers = np.concatenate(starts), np.concatenate(rows)
        if len(found) == 0 or found[0] > 0:
            found, numbers = np.append(0, found), np.append(self._row_at(start), numbers)
        ones = np.ones(end - start, dtype=np.float32)
        return Bin(self.stream_tokens(start, end), ones, found, numbers, np.zeros(len(found), dtype=np.int64))

    def stream_tokens(self, start: int, end: int) -> np.ndarray:
        """int32 [end - start]: tokens of the stream, over the borders of shards."""
        parts = [
            self._map(shard)["tokens"][max(start - base, 0) : end - base]
            for shard, base in self._shards_between(start, end)
        ]
        return np.concatenate(parts).astype(np.int32)

    def at(self, places: np.ndarray) -> np.ndarray:
        """int32 [N]: the token at each place of a stream of text."""
        shards = np.searchsorted(self._starts_in_stream, places, side="right") - 1
        found = np.empty(len(places), dtype=np.int32)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            found[chosen] = self._map_shard(shard)["tokens"][places[chosen] - int(self._starts_in_stream[shard])]
        return found

    def document_starts(self) -> np.ndarray:
        """int64 [documents]: where each document of a text begins in the stream."""
        bases = self._starts_in_stream[:-1].tolist()
        parts = [self._map_shard(number)["starts"].astype(np.int64) + base for number, base in enumerate(bases)]
        return np.concatenate(parts)

    def _shards_between(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The shards that hold tokens of [start, end), each with its place in the stream."""
        shard = int(np.searchsorted(self._starts_in_stream, start, side="right")) - 1
        while shard < len(self.index.shards) and (base := int(self._starts_in_stream[shard])) < end:
            yield shard, base
            shard += 1

    def _row_at(self, place: int) -> int:
        """The record whose document holds the token at `place` of the stream."""
        for shard in range(int(np.searchsorted(self._starts_in_stream, place, side="right")) - 1, -1, -1):
            inside = place - int(self._starts_in_stream[shard])
            before = int(np.searchsorted(self._map(shard)["starts"], inside, side="right"))
            if before:
                return int(self._map(shard)["rows"][before - 1])
        return 0

    def _begins_document(self, place: int) -> bool:
        shard, base = next(self._shards_between(place, place + 1))
        starts = self._map(shard)["starts"]
        index = int(np.searchsorted(starts, place - base))
        return index < len(starts) and int(starts[index]) == place - base

    def _map_shard(self, number: int) -> dict[str, np.ndarray]:
        return {
            name: map_array(self.folder / shard_name(number, name), array_type(name, self.index.token_bytes))
            for name in array_names(self.index.kind)
        }

    # -- order -------------------------------------------------------------------------------------------------------

    def epoch(self, number: int, *, seed: int, shuffle: bool = True) -> np.ndarray:
        """int64 [num_bins]: the bins of epoch `number` (from 0) in their order."""
        return self._order(number, seed) if shuffle else np.arange(self.num_bins)

    def bin_at(self, position: int, *, seed: int, shuffle: bool = True) -> int:
        """The number of the bin at `position`, counted from 0 over all epochs."""
        epoch, index = divmod(position, self.num_bins)
        return int(self.epoch(epoch, seed=seed, shuffle=shuffle)[index])

    def stream(
        self,
        *,
        seed: int,
        shuffle: bool = True,
        start: int = 0,
        stop: int | None = None,
        worker: int = 0,
        num_workers: int = 1,
    ) -> Iterator[tuple[int, Bin]]:
        """(position, bin) from position `start` on; without `stop` epoch after epoch without end.

        Of several loader processes each takes every `num_workers`-th position; put together in the order of their
        positions they give what one would.
        """
        position = start + (worker - start) % num_workers
        while stop is None or position < stop:
            yield position, self.bin(self.bin_at(position, seed=seed, shuffle=shuffle))
            position += num_workers

    def _compute_order(self, epoch: int, seed: int) -> np.ndarray:
        # Sorting a counter-based stream: Philox's bits are fixed across numpy versions, its permutations are not.
        draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(self.num_bins)
        return np.argsort(draws, kind="stable")

    # -- facts -------------------------------------------------------------------------------------------------------

    def stats(self) -> ShardStats:
        """Counts, and how long rows or documents are (reads where they start)."""
        lengths = [np.zeros(0, dtype=np.int64)]
        if self.index.kind == "rows":
            lengths += [
                np.diff(self._map_shard(number)["starts"].astype(np.int64), append=shard.num_tokens)
                for number, shard in enumerate(self.index.shards)
            ]
        else:  # a document may go on in the next shard
            lengths.append(np.diff(self.document_starts(), append=self.index.num_tokens))
        of_all = np.concatenate(lengths)
        percentiles = np.percentile(of_all, [0, 5, 25, 50, 75, 95, 100], method="nearest").astype(int)
        room = self.num_bins * self.max_length
        return ShardStats(
            num_tokens=self.index.num_tokens,
            num_trained_tokens=self.index.num_trained_tokens,
            num_rows=self.index.counts.num_rows,
            num_bins=self.num_bins,
            fill=self.index.num_tokens / room,
            lengths=tuple(percentiles.tolist()),
        )

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each token stands in the shards (reads all of them, a piece at a time)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(len(self.index.shards)):
            tokens = self._map_shard(number)["tokens"]
            for start in range(0, len(tokens), _COUNTED_AT_ONCE):
                counts += np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=vocab_size)[:vocab_size]
        return counts


def _reopened(folder: Path, index: Index, max_length: int) -> PackedShards:
    return PackedShards(folder, index, max_length=max_length)
