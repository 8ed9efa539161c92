"""The flat AdamW takes torch's steps, skips what is not finite, and keeps or loads its state whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_foundry.engine.optimizer import FlatAdamW, norm_of
from model_foundry.errors import ArchitectureMismatchError, EngineError
from model_foundry.types import AdamParams

SHAPES = {"bias": (5,), "matrix": (3, 5), "cube": (2, 2, 3), "norm": (7,), "wide": (2, 40)}
STEPS = [
    AdamParams(learning_rate=1e-2, weight_decay=0.3),
    AdamParams(learning_rate=3e-2, weight_decay=0.1, grad_clip_norm=0.5),
    AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.95, eps=1e-5),
    AdamParams(learning_rate=2e-2, beta1=0.0, beta2=0.5, eps=1e-6, weight_decay=0.01, grad_clip_norm=100.0),
    AdamParams(learning_rate=5e-3, grad_clip_norm=1e-3),
]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.grad is None:
            parameter.grad = drawn
        else:
            parameter.grad.copy_(drawn)


@pytest.mark.slow  # torch's optimizers import its compiler
def test_steps_are_torchs_whatever_changes_between_them() -> None:
    """Learning rate, betas, eps, decay and clipping come with each step; vectors are not decayed."""
    mine, theirs = parameters(), parameters()
    optimizer = FlatAdamW(mine)
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2]},
        {"params": [p for p in theirs.values() if p.ndim < 2]},
    ]
    peer = torch.optim.AdamW(groups)
    for number, params in enumerate(STEPS):
        set_gradients(mine, number)
        set_gradients(theirs, number)
        for group in peer.param_groups:
            group |= {"lr": params.learning_rate, "betas": (params.beta1, params.beta2), "eps": params.eps}
            group["weight_decay"] = params.weight_decay if group is peer.param_groups[0] else 0.0
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), params.grad_clip_norm or float("inf"))
        peer.step()
        output = optimizer.apply(params)
        assert (output.skipped, output.step) == (False, number + 1)
        assert output.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        for name in SHAPES:
            assert torch.allclose(mine[name], theirs[name], rtol=1e-6, atol=1e-7), (number, name)


def test_parameters_keep_their_values_and_their_gradients_are_collected() -> None:
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = FlatAdamW(named)
    assert all(torch.equal(named[name], before[name]) for name in SHAPES)
    loss = sum((p * p).sum() for p in named.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert float(optimizer.grad.norm()) == pytest.approx(2 * float(optimizer.flat.norm()), rel=1e-6)
    optimizer.apply(AdamParams())
    assert all(p.grad is not None and not p.grad.any() for p in named.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(value: float) -> None:
    """One bad row would turn every weight and both moments into NaN, for good."""
    named = parameters()
    optimizer = FlatAdamW(named)
    set_gradients(named, 1)
    optimizer.apply(STEPS[0])
    kept = [t.clone() for t in (optimizer.flat, optimizer.exp_avg, optimizer.exp_avg_sq)]
    set_gradients(named, 2)
    grad = named["norm"].grad
    assert grad is not None
    grad[3] = value
    output = optimizer.apply(STEPS[1])
    assert output.skipped
    assert output.step == optimizer.step == 1
    assert output.grad_norm != output.grad_norm or output.grad_norm == float("inf")
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (optimizer.flat, optimizer.exp_avg, optimizer.exp_avg_sq), strict=True)
    )
    assert not optimizer.grad.any()


def test_large_finite_gradients_are_clipped_and_not_skipped() -> None:
    """A norm summed in float32 overflows at 1e19 and calls a finite gradient infinite."""
    named = parameters()
    optimizer = FlatAdamW(named)
    set_gradients(named, 1)
    optimizer.grad.mul_(1e25)
    output = optimizer.apply(AdamParams(grad_clip_norm=1.0))
    assert not output.skipped
    assert torch.isfinite(optimizer.flat).all()


@pytest.mark.parametrize("size", [1, 1023, 1024, 5000, 3_000_000])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e25, 0.0])
def test_a_norm_is_that_of_float64(size: int, scale: float) -> None:
    """In float32 that of millions is off by 1e-5, and squares of 1e-25 are nothing and those of 1e25 infinite."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    assert norm_of(values) == pytest.approx(float(torch.linalg.vector_norm(values.double())), rel=1e-7)


def test_state_goes_from_one_optimizer_to_another_bit_by_bit() -> None:
    first, second = FlatAdamW(parameters()), FlatAdamW(parameters())
    for number, params in enumerate(STEPS[:2]):
        set_gradients(first.parameters, number)
        first.apply(params)
    second.flat.copy_(first.flat)
    second.load_state_tensors({n: t.clone() for n, t in first.state_tensors().items()}, first.step, where="here")
    for optimizer in (first, second):
        set_gradients(optimizer.parameters, 9)
        optimizer.apply(STEPS[2])
    assert torch.equal(first.flat, second.flat)
    assert torch.equal(first.exp_avg_sq, second.exp_avg_sq)


@pytest.mark.parametrize("change", ["missing", "left over", "reshaped"])
def test_a_state_that_does_not_fit_changes_nothing(change: str) -> None:
    optimizer = FlatAdamW(parameters())
    set_gradients(optimizer.parameters, 0)
    optimizer.apply(STEPS[0])
    tensors = {name: torch.zeros_like(tensor) for name, tensor in optimizer.state_tensors().items()}
    if change == "left over":
        tensors["exp_avg.more"] = torch.zeros(1)
    else:
        value = tensors.pop("exp_avg_sq.wide")
        if change == "reshaped":
            tensors["exp_avg_sq.wide"] = value[:1]
    with pytest.raises(ArchitectureMismatchError, match="exp_avg"):
        optimizer.load_state_tensors(tensors, 7, where="here")
    assert optimizer.step == 1
    assert optimizer.exp_avg.any()


def test_a_reset_optimizer_takes_the_steps_of_a_new_one() -> None:
    used, fresh = FlatAdamW(parameters()), FlatAdamW(parameters())
    set_gradients(used.parameters, 0)
    used.apply(STEPS[0])
    used.flat.copy_(fresh.flat)
    used.reset()
    for optimizer in (used, fresh):
        set_gradients(optimizer.parameters, 1)
        assert optimizer.apply(STEPS[1]).step == 1
    assert torch.equal(used.flat, fresh.flat)


WRONG = [
    ("learning_rate", float("nan")),
    ("learning_rate", -1e-3),
    ("learning_rate", 1e308),
    ("eps", 1e-50),
    ("eps", 1e39),
    ("beta2", 1.0),
    ("eps", 0.0),
    ("weight_decay", -1.0),
]


@pytest.mark.parametrize("name, value", [*WRONG, ("grad_clip_norm", float("inf"))])
def test_a_hyper_parameter_that_ruins_the_weights_is_refused(name: str, value: float) -> None:
    optimizer = FlatAdamW(parameters())
    set_gradients(optimizer.parameters, 0)
    before = optimizer.flat.clone()
    with pytest.raises(EngineError, match=name):
        optimizer.apply(AdamParams(**{name: value}))
    assert torch.equal(optimizer.flat, before)
    assert optimizer.grad.any()
