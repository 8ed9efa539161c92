"""Rows of one pass computed at the same time on a CPU, each thread its share of them with operations of one thread.

Small operations cost more to hand out to threads and to gather again than to compute; a thread that keeps its rows for
the whole pass waits for the others once. Shares, and the order of their sum, depend on the rows' lengths alone: results
repeat bit for bit. It knows nothing of models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
MIN_SHARE_TOKENS = 128
"""Fewer tokens leave a weight's product waiting for its weight."""
MAX_UNEVEN = 1.15
"""The largest share over the mean; beyond it the threads would wait for each other longer than operations do."""

_pools: dict[int, ThreadPoolExecutor] = {}
_making_pool = threading.Lock()


def even_shares(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Rows of each share, in their order: the longest rows first, each to the share with the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        share = tokens.index(min(tokens))
        shares[share].append(row)
        tokens[share] += lengths[row]
    return [sorted(share) for share in shares]


def worthwhile_shares(lengths: Sequence[int], num_threads: int) -> list[list[int]] | None:
    """The rows of each thread; None where one after the other, with all threads an operation, is the better way."""
    if num_threads < 2 or len(lengths) < num_threads:
        return None
    shares = even_shares(lengths, num_threads)
    tokens = [sum(lengths[row] for row in share) for share in shares]
    uneven = max(tokens) * num_threads > MAX_UNEVEN * sum(tokens)
    return None if uneven or min(tokens) < MIN_SHARE_TOKENS else shares


def run_side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results in order, each task on a thread of its own whose torch operations use that one thread.

    Raises:
        Exception: what the first task in order raised, or Ctrl-C; after all have ended in any case, for they write what
            the caller may want to mend.
    """
    with_gradients = torch.is_grad_enabled()

    def on_thread(task: Callable[[], T]) -> T:
        # Whether gradients are recorded is a thread's own setting.
        with torch.set_grad_enabled(with_gradients):
            return task()

    pool = _threads(len(tasks))
    futures: list[Future[T]] = [pool.submit(on_thread, task) for task in tasks]
    try:
        errors = [future.exception() for future in futures]
    except BaseException:
        wait(futures)
        raise
    failed = next((error for error in errors if error is not None), None)
    if failed is not None:
        raise failed
    return [future.result() for future in futures]


def _threads(number: int) -> ThreadPoolExecutor:
    """As many threads, started once a process."""
    with _making_pool:
        if number not in _pools:
            mine, barrier = torch.get_num_threads(), threading.Barrier(number)
            pool = ThreadPoolExecutor(number, thread_name_prefix="pass")
            try:
                for future in [pool.submit(_use_one_thread, barrier) for _ in range(number)]:
                    future.result()
            except BaseException:
                barrier.abort()
                pool.shutdown(wait=False)
                raise
            finally:
                torch.set_num_threads(mine)  # what later threads begin with
            _pools[number] = pool
        return _pools[number]


def _use_one_thread(barrier: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first look at the number sets it to the process's
    torch.set_num_threads(1)
    barrier.wait()
