"""Loops on several threads: whoever is interrupted waits for the others, and nobody waits for one that never starts."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
import torch

from model_foundry.models import fused
from model_foundry.models.compiled_loop import loop
from model_foundry.models.primitives import count_up, seen, write


def test_an_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors were freed under a loop that still wrote to them."""
    monkeypatch.setattr(fused, "_pools", {1: ThreadPoolExecutor(1)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ended, waits = threading.Event(), iter([KeyboardInterrupt, None])

    def interrupted(futures: Any) -> None:
        if (error := next(waits)) is not None:
            raise error
        wait(futures)

    def slow(on_thread: bool) -> None:
        if on_thread:
            time.sleep(0.2)
            ended.set()

    monkeypatch.setattr(fused, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fused._run(slow, [(False,), (True,)])
    assert ended.is_set()


class _Stops:
    """A pool that fails at a submit."""

    def __init__(self, pool: ThreadPoolExecutor, error: type[BaseException]) -> None:
        self.pool, self.error, self.left = pool, error, 1

    def submit(self, *given: Any) -> Any:
        if not self.left:
            raise self.error
        self.left -= 1
        return self.pool.submit(*given)


@loop("int64*", "x*", "int")
def waits(counter: Any, x: Any, mark: int, first: int, last: int) -> None:
    count_up(counter)
    while seen(counter) < last:
        pass
    write(x, first, np.float32(mark))


def test_threads_that_wait_for_each_other() -> None:
    x, counter = torch.zeros(3), torch.zeros(1, dtype=torch.int64)
    for mark in (1, 2):
        fused.run_together(waits, x, (counter.data_ptr(), x.data_ptr(), mark), counter=counter, num_threads=3)
        assert x.tolist() == [mark] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_who_waits_for_one_that_never_starts_is_let_go(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It span for ever on memory that had been given away, and no interrupt ended it."""
    x, counter = torch.zeros(3), torch.zeros(1, dtype=torch.int64)
    pool = ThreadPoolExecutor(2)
    with monkeypatch.context() as patch:
        stops = _Stops(pool, error)
        patch.setattr(fused, "_pool", lambda number: stops)
        with pytest.raises(error):
            fused.run_together(waits, x, (counter.data_ptr(), x.data_ptr(), 1), counter=counter, num_threads=3)
    assert x.tolist() == [0, 1, 0]  # it has ended
    pool.shutdown(wait=True)
    fused.run_together(waits, x, (counter.data_ptr(), x.data_ptr(), 2), counter=counter, num_threads=3)
    assert x.tolist() == [2, 2, 2]


def test_a_thread_that_cannot_start_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_pools", {})
    starts = iter([None, None, RuntimeError("can't start new thread")])
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if (error := next(starts)) is not None:
            raise error
        start(thread)

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", limited)
        with pytest.raises(RuntimeError, match="can't start"):
            fused._pool(3)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert not fused._pools


def test_threads_are_as_many_as_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool for every number of shares would be hundreds of threads on a large machine."""
    monkeypatch.setattr(fused, "MIN_SHARE_ELEMENTS", 64)
    monkeypatch.setattr(fused, "_pools", {})
    before, mine = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(5)
    try:
        for num_rows in range(1, 40):
            fused.rms_norm(torch.ones(num_rows, 64), torch.ones(64), 1e-6)
    finally:
        torch.set_num_threads(before)
    assert threading.active_count() - mine <= 4
