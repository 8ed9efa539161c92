"""Threads with rows of their own: who computes what, and that it is the same as one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from model_foundry.engine.side_by_side import even_shares, run_side_by_side, worthwhile_shares
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import OutOfMemoryError
from model_foundry.types import AdamParams, LoraConfig
from tests.tiny_models import random_comparisons, random_data

TinyFolder = Callable[[str], Path]
WITH_HEAD, HEAD = LoraConfig(r=4, target_modules=("v_proj", "lm_head")), LoraConfig(r=4, target_modules=("lm_head",))
LENGTHS = (140, 150, 145, 150)
PAIRS = ((60, 50, 40), (90, 30, 30), (1, 70, 70), (80, 40, 20))
"""(shared, better, worse); the third is read as two rows."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_shares_are_even_and_hold_every_row_once() -> None:
    shares = even_shares([512, 10, 500, 30, 20], 2)
    assert shares == [[0, 4], [1, 2, 3]]


@pytest.mark.parametrize(
    ("lengths", "num_threads"), [([512, 512], 1), ([512], 2), ([512, 128], 2), ([100, 100], 2)],
    ids=["one thread", "one row", "uneven", "short"],
)  # fmt: skip
def test_rows_that_would_leave_threads_waiting_are_computed_together(lengths: list[int], num_threads: int) -> None:
    assert worthwhile_shares(lengths, num_threads) is None


def test_each_task_has_one_thread_and_the_callers_setting_of_gradients(two_threads: None) -> None:
    met = threading.Barrier(2)

    def task() -> tuple[int, bool]:
        met.wait(timeout=30)  # both run at the same time
        return torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert run_side_by_side([task, task]) == [(1, False)] * 2
    assert run_side_by_side([task, task]) == [(1, True)] * 2
    assert torch.get_num_threads() == 2


def test_the_first_error_in_order_is_raised_when_all_have_ended(two_threads: None) -> None:
    ended = []

    def fail() -> None:
        raise ValueError("first")

    def finish() -> None:
        ended.append(True)

    with pytest.raises(ValueError, match="first"):
        run_side_by_side([fail, finish])
    assert ended == [True]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(r=4), None, WITH_HEAD, HEAD], ids=["lora", "full", "with head", "head"])
@pytest.mark.parametrize(
    ("kind", "loss_fn"),
    [("llama", "cross_entropy"), ("llama-tied", "cross_entropy"), ("llama", "dpo_sigmoid"), ("llama-tied", "dpo_ipo")],
)
def test_a_step_equals_that_of_one_thread_and_repeats_bit_for_bit(
    kind: str, loss_fn: str, lora: LoraConfig | None, tiny_folder: TinyFolder, two_threads: None
) -> None:
    """Prevents, with pairs, a thread that counts those of all threads, and answers of one pair on two of them."""
    data = random_comparisons(PAIRS) if loss_fn.startswith("dpo_") else random_data(LENGTHS)
    shares = worthwhile_shares([row.num_tokens for row in data], 2)
    assert shares is not None
    assert sorted(map(len, shares)) == [2, 2]

    def train(num_threads: int) -> tuple[list[float], list[np.ndarray], dict[str, torch.Tensor]]:
        engine = TorchEngine(device="cpu", dtype="float32", num_threads=num_threads)
        model_id = engine.create_model(tiny_folder(kind), lora=lora, seed=1)
        losses = []
        for _ in range(3):
            output = engine.forward_backward(model_id, data, loss_fn=loss_fn)
            losses.append(output.loss_sum)
            engine.optim_step(model_id, AdamParams(learning_rate=1e-2))
        return losses, list(output.logprobs), {k: v.clone() for k, v in engine.trained_tensors(model_id).items()}

    alone, shared, again = train(1), train(2), train(2)
    assert shared[0] == again[0]
    assert all(torch.equal(shared[2][name], again[2][name]) for name in shared[2])
    assert shared[0] == pytest.approx(alone[0], rel=1e-4)
    for one, other in zip(shared[1], alone[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.slow
def test_a_thread_that_fails_leaves_the_gradients_as_they_were(
    tiny_folder: TinyFolder, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(device="cpu", dtype="float32", num_threads=2)
    model_id = engine.create_model(tiny_folder("llama"), lora=LoraConfig(r=4))
    engine.forward_backward(model_id, random_data(LENGTHS))
    optimizer = engine._get(model_id).optimizer  # pyright: ignore[reportPrivateUsage]
    assert optimizer is not None
    before = optimizer.grad.clone()
    model = engine.language_model(model_id)
    hidden = model.hidden

    def fail_on_one(rows: list[torch.Tensor], branches: Sequence[tuple[int, ...]]) -> torch.Tensor:
        if any(len(row) == 161 for row in rows):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return hidden(rows, branches)

    monkeypatch.setattr(model, "hidden", fail_on_one)
    with pytest.raises(OutOfMemoryError):
        engine.forward_backward(model_id, random_data((160, 161)))
    assert torch.equal(optimizer.grad, before)


def test_two_numbers_of_threads_take_turns(two_threads: None) -> None:
    """Prevents a pool that is shut down by whoever asks for another number, while somebody is about to use it."""
    for number in (2, 3, 2, 3):
        assert run_side_by_side([threading.current_thread] * number)
    assert torch.get_num_threads() == 2


def test_an_interrupt_is_raised_when_nothing_writes_any_more(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a pass that still adds gradients while the caller brings them back to what they were."""
    ended, begun = [], threading.Event()

    def finish() -> None:
        begun.wait(timeout=30)
        time.sleep(0.2)
        ended.append(True)

    def interrupt(future: Future[None], timeout: float | None = None) -> None:
        begun.set()
        raise KeyboardInterrupt

    run_side_by_side([int, int])
    monkeypatch.setattr(Future, "exception", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([finish, finish])
    assert ended == [True, True]
