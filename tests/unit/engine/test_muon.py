"""Muon's steps: orthogonal updates in AdamW's measure, each matrix of a stack for itself, state kept bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_foundry.engine import muon
from model_foundry.engine.muon import FlatMuon, orthogonalised
from model_foundry.engine.optimizer import FlatAdamW
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import CheckpointError, EngineError
from model_foundry.types import AdamParams, LoraConfig, MuonParams
from tests.tiny_models import random_data

TinyFolder = Callable[[str], Path]
SHAPES = {"norm": (8,), "wide": (6, 12), "embedding": (20, 8), "experts": (3, 6, 12), "tall": (12, 6), "bias": (4,)}
HIDDEN = {"wide", "experts", "tall"}
STEP = MuonParams(learning_rate=1e-2, momentum=0.9, weight_decay=0.1, grad_clip_norm=1.0)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in SHAPES:
        grad = named[name].grad
        assert grad is not None
        grad.copy_(torch.randn(grad.shape, generator=generator))


@pytest.mark.parametrize("shape", [(2, 24, 64), (3, 64, 24), (1, 40, 40)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_singular_values_come_near_one_whatever_the_gradients_size(shape: tuple[int, int, int], scale: float) -> None:
    """A gradient of a large batch is tiny: without the norm, or with an epsilon above it, nothing would be learnt."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    done = orthogonalised(matrices * scale, torch.float32)
    values = torch.linalg.svdvals(done)
    assert values.max() < 1.25
    assert values.median() > 0.6
    # The directions are those of the matrix itself: u vᵀ.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.norm(done - u @ vh) < 0.35 * torch.linalg.norm(u @ vh)


def test_a_matrix_without_a_gradient_gets_no_update() -> None:
    """An expert that no token came to: dividing by its norm gives NaN, which the next step spreads."""
    matrices = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0
    done = orthogonalised(matrices, torch.float32)
    assert torch.isfinite(done).all()
    assert not done[1].any()


def test_a_step_is_the_published_one_and_the_rest_is_adamws() -> None:
    mine, theirs = parameters(), parameters()
    optimizer = FlatMuon(mine, hidden=HIDDEN)
    rest = FlatAdamW({name: p for name, p in theirs.items() if name not in HIDDEN})
    momentum = {name: torch.zeros(SHAPES[name]) for name in HIDDEN}
    params = MuonParams(learning_rate=1e-2, momentum=0.9, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    other = AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    for number in range(3):
        set_gradients(mine, number)
        grads = {name: mine[name].grad.clone() for name in SHAPES}  # pyright: ignore[reportOptionalMemberAccess]
        for name in HIDDEN:
            momentum[name] = 0.9 * momentum[name] + 0.1 * grads[name]
            direction = (0.1 * grads[name] + 0.9 * momentum[name]).view(-1, *SHAPES[name][-2:])
            # One matrix at a time, an expert like any other.
            update = torch.cat([orthogonalised(one[None], torch.float32) for one in direction])
            with torch.no_grad():
                theirs[name].mul_(1 - 1e-2 * 0.1).sub_(1e-2 * 0.2 * math.sqrt(12) * update.view(SHAPES[name]))
        for name in rest.parameters:
            rest.parameters[name].grad.copy_(grads[name])  # pyright: ignore[reportOptionalMemberAccess]
        rest.apply(other)
        assert optimizer.apply(params).step == number + 1
        for name in SHAPES:
            assert torch.allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6), (number, name)


def test_the_update_has_adamws_size() -> None:
    """The promise that AdamW's learning rates carry over: an update's root mean square is about 0.2 of the rate."""
    named = {"hidden": nn.Parameter(torch.zeros(64, 256))}
    optimizer = FlatMuon(named, hidden={"hidden"})
    optimizer.grad.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.apply(MuonParams(learning_rate=1.0))
    assert 0.15 < named["hidden"].square().mean().sqrt() < 0.25


def test_pieces_of_a_large_stack_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (1 << 24, 1):
        monkeypatch.setattr(muon, "STACK_ELEMENTS", limit)
        optimizer = FlatMuon(parameters(), hidden=HIDDEN)
        set_gradients(optimizer.parameters, 0)
        optimizer.apply(STEP)
        results.append(optimizer.flat.clone())
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_hyper_parameters_of_another_optimizer_or_out_of_range_change_nothing() -> None:
    ours, other = FlatMuon(parameters(), hidden=HIDDEN), FlatAdamW(parameters())
    for optimizer, params, words in (
        (ours, AdamParams(), "muon.*AdamParams"),
        (other, MuonParams(), "adamw.*MuonParams"),
        (ours, MuonParams(momentum=1.0), "momentum is 1.0"),
    ):
        before = optimizer.flat.clone()
        set_gradients(optimizer.parameters, 1)
        with pytest.raises(EngineError, match=words):
            optimizer.apply(params)
        assert torch.equal(optimizer.flat, before)


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def train(own: TorchEngine, model_id: str, *, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        losses.append(own.forward_backward(model_id, random_data((12, 30, 7), seed=step)).loss_sum)
        own.optim_step(model_id, STEP)
    return losses


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe"])
def test_a_saved_state_continues_bit_by_bit(kind: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own = engine()
    straight = own.create_model(tiny_folder(kind), lora=None, optimizer="muon")
    train(own, straight, first=0, steps=2)
    own.save_state(straight, tmp_path)
    losses = train(own, straight, first=2, steps=2)
    resumed = own.create_model(tiny_folder(kind), lora=None, optimizer="muon")
    train(own, resumed, first=5, steps=1)
    assert own.load_state(resumed, tmp_path, optimizer=True) == ()
    assert train(own, resumed, first=2, steps=2) == losses
    for tensors in (own.trained_tensors, own.state_tensors):
        want = tensors(straight)
        assert all(torch.equal(value, want[name]) for name, value in tensors(resumed).items())
    other = own.create_model(tiny_folder(kind), lora=None)
    with pytest.raises(CheckpointError, match=r"muon's.*adamw"):
        own.load_state(other, tmp_path, optimizer=True)
    own.load_state(other, tmp_path, optimizer=False)


def test_hidden_matrices_are_the_layers_own(tiny_folder: TinyFolder) -> None:
    """An orthogonal step on an embedding moves rare tokens as far as frequent ones; on a router, every expert."""
    own = engine()
    model_id = own.create_model(tiny_folder("qwen3-moe"), lora=None, optimizer="muon")
    names = set(own.state_tensors(model_id))
    layer = "decoder.layers.0."
    assert f"momentum.{layer}self_attn.o_proj.weight" in names
    assert f"momentum.{layer}mlp.experts.up_proj.weight" in names
    for name in (f"{layer}mlp.gate.weight", "decoder.embed_tokens", "decoder.lm_head", "decoder.norm.weight"):
        assert {f"exp_avg.{name}", f"exp_avg_sq.{name}"} <= names
    moments = sum(tensor.numel() for tensor in own.state_tensors(model_id).values())
    facts = own.describe(model_id)
    assert facts["checkpoint_bytes"] == 4 * (facts["trained_parameters"] + moments)


def test_an_adapter_is_refused(tiny_folder: TinyFolder) -> None:
    with pytest.raises(EngineError, match="factors"):
        engine().create_model(tiny_folder("llama"), lora=LoraConfig(r=2), optimizer="muon")
