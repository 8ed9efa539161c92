"""Bins by position, read ahead by other processes where that is asked for.

What comes at a position is a function of the shards, the seed and the position: the number of processes changes when it
is ready and nothing else. A loader that is made anew at any position goes on as if it had never been gone.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from model_foundry.data.shards.processes import end_with_parent
from model_foundry.data.shards.reader import PackedShards
from model_foundry.errors import DataError, FoundryError
from model_foundry.types import Datum

AHEAD = 16
"""Bins under way for each process."""


class BinLoader:
    """The bins of packed shards in the order of training, epoch after epoch.

    Args:
        shards: where they lie; `shuffle` and `seed` decide the order together.
        mask_documents: keep the documents of a chunk apart, each a datum of its own.
        num_processes: reading ahead; 0 reads when asked.
    """

    def __init__(
        self,
        shards: PackedShards,
        *,
        seed: int,
        shuffle: bool = True,
        mask_documents: bool = False,
        num_processes: int = 0,
    ) -> None:
        self._shards, self._seed, self._shuffle, self._mask = shards, seed, shuffle, mask_documents
        self._under_way: dict[int, Future[tuple[Datum, ...]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._num_ahead = AHEAD * num_processes
        if num_processes:
            self._pool = ProcessPoolExecutor(
                num_processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(shards, seed, shuffle, mask_documents),
            )

    def __enter__(self) -> BinLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def datums(self, position: int) -> tuple[Datum, ...]:
        """What is trained at `position`, counted from 0 over all epochs.

        Raises:
            DataError: a shard's file has gone. FoundryError: a process ended before its work was done.
        """
        if self._pool is None:
            return read_datums(self._shards, position, seed=self._seed, shuffle=self._shuffle, mask=self._mask)
        try:
            for ahead in range(position, position + self._num_ahead):
                if ahead not in self._under_way:
                    self._under_way[ahead] = self._pool.submit(_read, ahead)
            # What was jumped over will not be asked for again.
            for passed in [each for each in self._under_way if each < position]:
                self._under_way.pop(passed).cancel()
            return self._under_way.pop(position).result()
        except BrokenProcessPool as error:
            hint = "Its memory may have run out: lower data.loader_processes, and go on from the last checkpoint"
            raise FoundryError("a process that reads shards ended before its work was done", hint=hint) from error

    def close(self) -> None:
        """End the processes; what they have under way is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._under_way.clear()


def read_datums(shards: PackedShards, position: int, *, seed: int, shuffle: bool, mask: bool) -> tuple[Datum, ...]:
    """Raises: DataError: a shard's file has gone."""
    try:
        return shards.datums(shards.bin_at(position, seed=seed, shuffle=shuffle), mask_documents=mask)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a map longer than what is left of its file
        hint = "Bring it back, and go on from the last checkpoint"
        raise DataError(f"a shard cannot be read any more ({error})", where=str(shards.folder), hint=hint) from error


_reading: tuple[PackedShards, int, bool, bool] | None = None


def _start(shards: PackedShards, seed: int, shuffle: bool, mask: bool) -> None:
    global _reading
    end_with_parent()
    _reading = (shards, seed, shuffle, mask)


def _read(position: int) -> tuple[Datum, ...]:
    if _reading is None:
        raise RuntimeError("the process was not started by BinLoader")
    shards, seed, shuffle, mask = _reading
    return read_datums(shards, position, seed=seed, shuffle=shuffle, mask=mask)
