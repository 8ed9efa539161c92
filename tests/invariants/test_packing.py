"""However rows are packed, split or recomputed, the losses and gradients are those of the rows one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.models.attention import attend_packed, attend_row_by_row
from model_foundry.models.decoder import RMSNorm
from model_foundry.models.language_model import load_language_model
from model_foundry.models.lora import Linear, project
from model_foundry.models.mlp import GatedSilu
from model_foundry.models.packed_rows import STACK_TOKENS, PackedRows
from model_foundry.models.randomness import DropoutCounter
from model_foundry.types import AdamParams, Datum, LoraConfig
from tests.tiny_models import random_data

TinyFolder = Callable[[str], Path]
LENGTHS = (1, 70, 5, 13, 12, 300, 13, 40)
LONG = (257, 600, 3, 512, 513)
"""Beyond a block of queries, and beyond the length up to which probabilities are kept."""
LORA = LoraConfig(r=4, lora_alpha=8.0)
KINDS = ("llama-tied", "mistral", "qwen3-sliding")


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def trained(own: TorchEngine, folder: Path, lora: LoraConfig | None, *, seed: int = 0) -> str:
    """A model whose adapter already changes something."""
    model_id = own.create_model(folder, lora=lora, seed=seed)
    generator = torch.Generator().manual_seed(1)
    if lora is not None:
        for tensor in own.trained_tensors(model_id).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model_id


def gradient(own: TorchEngine, model_id: str) -> torch.Tensor:
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    return optimizer.grad.clone()


def assert_same(got: torch.Tensor, want: torch.Tensor, *, bound: float = 1e-5) -> None:
    assert float(want.abs().max()) > 0
    assert float((got - want).abs().max()) < bound * float(want.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "long"])
def test_a_packed_batch_gives_each_row_the_losses_it_has_alone(
    lengths: tuple[int, ...], kind: str, tiny_folder: TinyFolder
) -> None:
    """Rows that see each other train on answers that they are not shown later."""
    own = engine()
    model_id, data = trained(own, tiny_folder(kind), LORA), random_data(lengths)
    packed = own.forward_backward(model_id, data, logprobs="all")
    packed_gradient = gradient(own, model_id)
    own.discard_gradients(model_id)
    alone = [own.forward_backward(model_id, [datum], logprobs="all") for datum in data]
    for row, single in zip(packed.logprobs, alone, strict=True):
        assert np.abs(row - single.logprobs[0]).max() < 1e-5
    assert packed.loss_sum == pytest.approx(sum(single.loss_sum for single in alone), rel=1e-6)
    assert_same(packed_gradient, gradient(own, model_id))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_one_batch_of_eight_equals_eight_of_one(lora: LoraConfig | None, tiny_folder: TinyFolder) -> None:
    """A mean of means weighs rows by the batch they happen to be in."""
    data, results = random_data(LENGTHS), []
    for batches in ([data], [[datum] for datum in data], [data[:3], data[3:]]):
        own = engine()
        model_id = trained(own, tiny_folder("llama-tied"), lora)
        losses = []
        for _ in range(3):
            losses.append(sum(own.forward_backward(model_id, batch).loss_sum for batch in batches))
            own.optim_step(model_id, AdamParams(learning_rate=1e-3, eps=1e-4, grad_clip_norm=1.0))
        results.append((losses, torch.cat([t.flatten() for t in own.trained_tensors(model_id).values()]).clone()))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        assert_same(weights, results[0][1])


@pytest.mark.parametrize("limit, num_pieces", [(10_000, 1), (300, 3), (100, 4), (1, 8)])
def test_splitting_by_tokens_changes_no_loss_and_no_gradient(
    limit: int, num_pieces: int, tiny_folder: TinyFolder
) -> None:
    data, whole, split = random_data(LENGTHS), engine(), engine(micro_batch_tokens=limit)
    ids = [trained(own, tiny_folder("qwen3-sliding"), LORA) for own in (whole, split)]
    want, got = (own.forward_backward(i, data, logprobs="all") for own, i in zip((whole, split), ids, strict=True))
    assert (want.num_micro_batches, got.num_micro_batches) == (1, num_pieces)
    assert got.loss_sum == pytest.approx(want.loss_sum, rel=1e-6)
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(got.logprobs, want.logprobs, strict=True))
    assert_same(gradient(split, ids[1]), gradient(whole, ids[0]))


@pytest.mark.parametrize("lora", [LORA, LoraConfig(r=4, lora_dropout=0.3), None], ids=["lora", "dropout", "full"])
@pytest.mark.parametrize("kind", ["llama-biases", "mistral", "gpt2"])
def test_recomputing_layers_changes_nothing(kind: str, lora: LoraConfig | None, tiny_folder: TinyFolder) -> None:
    """A dropout mask drawn again, and differently, in the recomputation gives a gradient of nothing."""
    results = []
    for recompute in (False, True):
        own = engine(gradient_checkpointing=recompute)
        model_id = trained(own, tiny_folder(kind), lora)
        loss = own.forward_backward(model_id, random_data((30, 7, 61))).loss_sum
        results.append((loss, gradient(own, model_id)))
    assert results[0][0] == results[1][0]
    assert_same(results[1][1], results[0][1], bound=1e-6)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_masks_follow_the_row_and_the_step_alone(use_dora: bool, kind: str, tiny_folder: TinyFolder) -> None:
    """Masks from a generator's state differ with packing, splitting, accumulation and every resume."""
    lora = LoraConfig(r=4, lora_dropout=0.4, use_dora=use_dora)
    data, seen = random_data((1, 70, 5, 13, 12)), []
    for limit, batches in ((None, [data]), (90, [data]), (1, [data]), (None, [data[:2], data[2:]])):
        own = engine(micro_batch_tokens=limit)
        model_id, steps = trained(own, tiny_folder(kind), lora), []
        for _ in range(2):
            loss = sum(own.forward_backward(model_id, batch).loss_sum for batch in batches)
            steps.append((loss, gradient(own, model_id)))
            own.optim_step(model_id, AdamParams(learning_rate=1e-30))
        seen.append(steps)
    for steps in seen[1:]:
        for (loss, grad), (want_loss, want_grad) in zip(steps, seen[0], strict=True):
            assert loss == pytest.approx(want_loss, rel=1e-6)
            assert_same(grad, want_grad)
    (first, _), (second, _) = seen[0]
    assert abs(first - second) > 1e-4 * abs(first), "every step drew the same mask"


def test_dropout_is_off_where_nothing_is_trained_and_differs_by_seed(tiny_folder: TinyFolder) -> None:
    own, data = engine(), random_data((20, 9))
    lora = LoraConfig(r=4, lora_dropout=0.4)
    plain = own.forward(trained(own, tiny_folder("llama"), LoraConfig(r=4)), data).loss_sum
    ids = [trained(own, tiny_folder("llama"), lora), own.create_model(tiny_folder("llama"), lora=lora, seed=7)]
    assert own.forward(ids[0], data).loss_sum == plain
    assert own.forward_backward(ids[0], data).loss_sum != plain
    for mine, theirs in zip(*(own.trained_tensors(i).values() for i in ids), strict=True):
        theirs.copy_(mine)
    own.discard_gradients(ids[0])
    assert own.forward_backward(ids[0], data).loss_sum != own.forward_backward(ids[1], data).loss_sum


def test_dropped_share_and_scale_are_as_asked_for(tiny_folder: TinyFolder) -> None:
    layer = Linear(torch.zeros(8, 4000), None)
    counter = DropoutCounter(seed=1, rows=((0, 3), (1, 2)))
    layer.adapt(LoraConfig(r=8, lora_alpha=8.0, lora_dropout=0.25), name="x", seed=0, counter=counter)
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(8, 4000))
        layer.lora_B.copy_(torch.eye(8))
    layer.train()
    values = torch.cat([layer(torch.ones(5, 4000)).detach() for counter.step in range(200)])
    assert set(values.unique().tolist()) == {0.0, 1 / 0.75} or values.unique().numel() == 2
    assert float((values == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(values.mean()) == pytest.approx(1, abs=0.03)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Sequence[torch.Tensor],
    lengths: Sequence[int],
    window: int | None,
) -> torch.Tensor:
    """Row by row, with a whole mask, in plain operations."""
    cos_q, sin_q, cos_k, sin_k = rope

    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    q, k = turn(q, cos_q, sin_q), turn(k, cos_k, sin_k)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = []
    for rq, rk, rv in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        place = torch.arange(len(rq))
        seen = place[None, :] <= place[:, None]
        if window is not None:
            seen &= place[None, :] > place[:, None] - window
        scores = torch.einsum("qhd,khd->hqk", rq, rk).masked_fill(~seen, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), rv))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize("lengths", [(5,), (5, 5, 5), (5, 9, 6, 1), (600, 257, 5, 6), (256, 512, 513)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_packed_attention_equals_plain_autograd(
    heads: tuple[int, int], lengths: tuple[int, ...], window: int | None
) -> None:
    torch.manual_seed(0)
    num_tokens, width = sum(lengths), 6
    q, k, v = (
        torch.randn(num_tokens, count, width, dtype=torch.float64, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    angles = torch.randn(num_tokens, 1, width // 2, dtype=torch.float64)
    rope = (angles.cos() * 0.4, angles.sin() * 0.4, angles.cos(), angles.sin())
    grad = torch.randn(num_tokens, heads[0], width, dtype=torch.float64)
    want = plain_attention(q, k, v, rope, lengths, window)
    want_grads = torch.autograd.grad(want, (q, k, v), grad)
    for attend in (attend_packed, attend_row_by_row):
        got = attend(q, k, v, rope, PackedRows.of(lengths), window)
        assert_same(got, want, bound=1e-12)
        for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), grad), want_grads, strict=True):
            assert float((mine - theirs).abs().max()) < 1e-11


def test_layers_of_different_windows_share_a_pass_and_not_a_mask() -> None:
    """Masks are shared by all layers of a pass, and layers may have different windows."""
    rows, torch_rng = PackedRows.of((300,)), torch.Generator().manual_seed(0)
    q = torch.randn(300, 2, 4, dtype=torch.float64, generator=torch_rng)
    ones, zeros = torch.ones(300, 1, 2, dtype=torch.float64), torch.zeros(300, 1, 2, dtype=torch.float64)
    rope = (ones, zeros, ones, zeros)
    for window in (None, 5, 280, None, 5):
        assert_same(
            attend_packed(q, q, q, rope, rows, window), plain_attention(q, q, q, rope, (300,), window), bound=1e-12
        )


def test_grouping_covers_every_row_once_and_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 700, size=60).tolist()
    rows = PackedRows.of(lengths)
    every = torch.arange(sum(lengths))
    places = [g.of(every) if g.valid is None else g.of(every)[g.valid.view(-1)] for g in rows.groups]
    assert sorted(torch.cat(places).tolist()) == every.tolist()
    assert sum(g.num_rows * g.num_tokens for g in rows.groups) <= 1.15 * sum(lengths)
    assert max(g.num_rows * g.num_tokens for g in rows.groups if g.num_rows > 1) <= STACK_TOKENS


def test_rows_of_one_length_are_taken_as_they_lie() -> None:
    """Looking every token up costs a third of the attention of a pretraining batch."""
    (even,) = PackedRows.of([64] * 8).groups
    assert (even.index, even.num_rows) == (None, 8)
    mixed = PackedRows.of([64, 60, 64]).groups
    assert len(mixed) == 1
    assert mixed[0].index is not None


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_norm_equals_plain_autograd(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 3, 16, dtype=dtype) * 3).requires_grad_()
    norm = RMSNorm(torch.randn(16, dtype=dtype), 1e-5)
    norm.weight.requires_grad_(True)
    grad = torch.randn(7, 3, 16, dtype=dtype)
    want = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    want_grads = torch.autograd.grad(want, (x, norm.weight), grad)
    got = norm(x)
    assert_same(got, want, bound=bound)
    for mine, theirs in zip(torch.autograd.grad(got, (x, norm.weight), grad), want_grads, strict=True):
        assert_same(mine, theirs, bound=bound)


def test_the_gated_silu_equals_plain_autograd() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: GatedSilu.apply(a, b), (gate, up))
    assert torch.equal(GatedSilu.apply(gate, up), functional.silu(gate) * up)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(11,), (3, 4)])
def test_the_shared_projection_equals_plain_autograd(bias: bool, transposed: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = []
    for number, num_out in enumerate((6, 2, 4)):
        weight = torch.randn(5, num_out) if transposed else torch.randn(num_out, 5)
        layers.append(Linear(weight.double(), torch.randn(num_out).double() if bias else None, transposed=transposed))
        layers[-1].adapt(LoraConfig(r=number + 1), name=str(number), seed=number, counter=DropoutCounter())
        torch.nn.init.normal_(layers[-1].lora_B)
        layers[-1].double()
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    adapters: list[Any] = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    grads = [torch.randn(*shape, n, dtype=torch.float64) for n in (6, 2, 4)]
    want = []
    for layer in layers:
        matrix = layer.matrix + layer.scaling * layer.lora_B @ layer.lora_A  # pyright: ignore[reportOperatorIssue]
        want.append(functional.linear(x, matrix, layer.bias))
    got = project(x, layers)
    leaves = [x, *adapters]
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs, bound=1e-12)
    theirs = torch.autograd.grad(want, leaves, grads)
    # Adapters are float32 in use, so their gradients are handed over in float32.
    for mine, their, leaf in zip(torch.autograd.grad(got, leaves, grads), theirs, leaves, strict=True):
        assert_same(mine, their, bound=1e-12 if leaf is x else 1e-6)
    with torch.no_grad():
        for mine, their in zip(project(x, layers), want, strict=True):
            assert_same(mine, their, bound=1e-12)


def test_gradients_in_bfloat16_do_not_depend_on_padding(tiny_folder: TinyFolder) -> None:
    model = load_language_model(tiny_folder("llama"), dtype=torch.bfloat16)
    data: list[Datum] = random_data((20, 24, 22))
    rows = [torch.from_numpy(datum.tokens).long() for datum in data]
    with torch.no_grad():
        packed = model.hidden(rows).split([20, 24, 22])
        for row, got in zip(rows, packed, strict=True):
            assert_same(got.float(), model.hidden([row]).float(), bound=0.02)
