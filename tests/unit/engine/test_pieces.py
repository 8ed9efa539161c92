"""Passes in pieces: what is split, what is done again when memory runs out, what is left when it cannot be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from model_foundry.engine.losses import LOSSES
from model_foundry.engine.optimizer import FlatAdamW
from model_foundry.engine.pieces import Passes, split_by_tokens
from model_foundry.errors import OutOfMemoryError
from model_foundry.models.decoder import Decoder
from model_foundry.models.language_model import NativeModel, load_language_model
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.types import Datum, ForwardBackwardOutput, LoraConfig
from tests.tiny_models import random_data

pytestmark = pytest.mark.slow

TinyFolder = Callable[[str], Path]
CROSS_ENTROPY = LOSSES["cross_entropy"]


class SmallMachine(NativeModel):
    """A model with memory for `room` tokens; beyond, it fails as torch does."""

    def __init__(self, decoder: Decoder, room: int) -> None:
        super().__init__(decoder)
        self.room = room
        self.sizes: list[int] = []
        self.fail: Callable[[int], Exception | None] = self._out_of_memory

    def _out_of_memory(self, num_tokens: int) -> Exception | None:
        return RuntimeError("DefaultCPUAllocator: can't allocate memory") if num_tokens > self.room else None

    def hidden(self, rows: Sequence[torch.Tensor], branches: Sequence[tuple[int, ...]] = ()) -> torch.Tensor:
        num_tokens = sum(len(row) for row in rows)
        self.sizes.append(num_tokens)
        error = self.fail(num_tokens)
        if error is not None:
            raise error
        return super().hidden(rows, branches)


def passes(folder: Path, *, room: int = 10**9, planned: int | None = None) -> tuple[Passes, SmallMachine]:
    loaded = load_language_model(folder, dtype=torch.float32)
    assert isinstance(loaded, NativeModel)
    model, counter = SmallMachine(loaded.decoder, room), DropoutCounter(seed=3)
    adapt(model.linears(), LoraConfig(r=4, lora_dropout=0.2), seed=0, counter=counter)
    generator = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    optimizer = FlatAdamW(trained)
    optimizer.flat.normal_(generator=generator).mul_(0.1)
    return Passes(model, counter, torch.device("cpu"), optimizer, planned_piece_tokens=planned), model


def run(own: Passes, data: Sequence[Datum]) -> ForwardBackwardOutput:
    return own.forward_backward(data, CROSS_ENTROPY, scope="due")


def gradient(own: Passes) -> torch.Tensor:
    assert own.optimizer is not None
    return own.optimizer.grad.clone()


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    "limit, want",
    [
        (None, [[0, 1, 2, 3]]),
        (12, [[0, 1], [2], [3]]),
        (11, [[0], [1], [2], [3]]),
        (1, [[0], [1], [2], [3]]),
        (99, [[0, 1, 2, 3]]),
    ],
)
def test_rows_stay_in_order_and_a_long_one_stands_alone(limit: int | None, want: list[list[int]]) -> None:
    assert split_by_tokens([5, 7, 20, 3], limit) == want


def test_out_of_memory_is_survived_with_the_same_gradients(tiny_folder: TinyFolder) -> None:
    """Dropout included: a row's mask must not depend on the piece that it lands in."""
    small, model = passes(tiny_folder("llama"), room=45)
    large, _ = passes(tiny_folder("llama"))
    data = random_data((10, 40, 20, 5, 30, 12))
    got, want = run(small, data), run(large, data)
    assert model.sizes[0] == 117
    assert got.num_micro_batches > 1
    assert got.loss_sum == pytest.approx(want.loss_sum, rel=1e-6)
    assert all(np.allclose(a, b, atol=1e-5, equal_nan=True) for a, b in zip(got.logprobs, want.logprobs, strict=True))
    assert_same(gradient(small), gradient(large))
    assert model.training


def test_what_was_learnt_is_kept_for_the_next_batches(tiny_folder: TinyFolder) -> None:
    own, model = passes(tiny_folder("llama"), room=45)
    run(own, random_data((30, 30, 30)))
    model.sizes.clear()
    run(own, random_data((30, 30, 30), seed=1))
    assert model.sizes == [30, 30, 30]


def test_memory_that_runs_out_later_replays_what_is_pending(tiny_folder: TinyFolder) -> None:
    """Accumulation: the gradients of the batches before are done again too, for a failed pass has mixed them up."""
    small, model = passes(tiny_folder("llama"))
    large, _ = passes(tiny_folder("llama"))
    batches = [random_data((10, 20), seed=1), random_data((8, 9), seed=2), random_data((25, 10, 15), seed=3)]
    for number, batch in enumerate(batches):
        model.room = 10**9 if number < 2 else 28
        run(small, batch)
        run(large, batch)
        assert_same(gradient(small), gradient(large))


def test_a_row_that_does_not_fit_is_an_error_that_leaves_everything_as_it_was(tiny_folder: TinyFolder) -> None:
    own, model = passes(tiny_folder("llama"), room=100)
    run(own, random_data((10, 20, 30)))
    before, learnt = gradient(own), own.max_piece_tokens
    model.room = 60
    with pytest.raises(OutOfMemoryError, match="single row of 61 tokens"):
        run(own, random_data((10, 61, 5)))
    assert torch.equal(gradient(own), before)
    assert (len(own.pending), own.max_piece_tokens, own.torn) == (1, learnt, False)
    run(own, random_data((12,)))
    reference, _ = passes(tiny_folder("llama"))
    run(reference, random_data((10, 20, 30)))
    run(reference, random_data((12,)))
    assert_same(gradient(own), gradient(reference))


def test_memory_too_small_even_for_what_was_pending_says_that_it_is_lost(tiny_folder: TinyFolder) -> None:
    own, model = passes(tiny_folder("llama"))
    run(own, random_data((30, 20)))
    model.room = 10
    with pytest.raises(OutOfMemoryError, match="1 batches before it, whose gradients are lost"):
        run(own, random_data((12,)))
    assert not gradient(own).any()
    assert own.pending == []


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("shapes do not match")])
def test_another_error_half_way_leaves_the_gradients_as_they_were(error: Exception, tiny_folder: TinyFolder) -> None:
    own, model = passes(tiny_folder("llama"), planned=25)
    run(own, random_data((10, 20)))
    before, healthy = gradient(own), model.fail
    model.fail = lambda num_tokens: error if num_tokens == 25 else None
    with pytest.raises(type(error), match=str(error)):
        run(own, random_data((10, 5, 25)))
    assert torch.equal(gradient(own), before)
    model.fail = healthy


def test_a_pass_broken_off_by_the_keyboard_is_mended_before_the_next(tiny_folder: TinyFolder) -> None:
    """Half a batch in the gradients, and the step after it trains on that half."""
    own, model = passes(tiny_folder("llama"), planned=25)
    run(own, random_data((10, 20)))
    before = gradient(own)

    def interrupt(num_tokens: int) -> None:
        if num_tokens == 25:
            raise KeyboardInterrupt

    healthy, model.fail = model.fail, interrupt
    with pytest.raises(KeyboardInterrupt):
        run(own, random_data((10, 5, 25)))
    model.fail = healthy
    assert not torch.equal(gradient(own), before)
    own.mend()
    assert torch.equal(gradient(own), before)


def test_the_loss_alone_survives_too_and_leaves_the_gradients(tiny_folder: TinyFolder) -> None:
    """Evaluation runs on batches of its own size."""
    own, _ = passes(tiny_folder("llama"), room=45)
    large, _ = passes(tiny_folder("llama"))
    run(own, random_data((10,)))
    before, data = gradient(own), random_data((40, 20, 30))
    got, want = (each.forward(data, CROSS_ENTROPY, scope="all") for each in (own, large))
    assert got.loss_sum == pytest.approx(want.loss_sum, rel=1e-6)
    assert torch.equal(gradient(own), before)
    with pytest.raises(OutOfMemoryError):
        own.forward(random_data((50,)), CROSS_ENTROPY, scope="due")


def test_a_failed_pass_is_gone_from_memory_before_it_is_tried_again(tiny_folder: TinyFolder) -> None:
    """The traceback of the failure holds every activation of the pass that did not fit."""
    import weakref

    own, model = passes(tiny_folder("llama"), room=45)
    seen: list[weakref.ref[torch.Tensor]] = []

    def fail(num_tokens: int) -> Exception | None:
        assert all(reference() is None for reference in seen)
        if num_tokens <= 45:
            return None
        large = torch.zeros(num_tokens)
        seen.append(weakref.ref(large))
        return model._out_of_memory(num_tokens)

    model.fail = fail
    run(own, random_data((20,) * 6))
    assert len(seen) == 2
