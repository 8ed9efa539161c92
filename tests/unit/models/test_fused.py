"""The loops between products: the same numbers as float64 gives, whatever the type, the layout and the threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from model_foundry.engine.losses import LOSSES, score
from model_foundry.errors import ModelError
from model_foundry.models import cpu_loops, fused
from model_foundry.models.attention import attend_packed
from model_foundry.models.compiled_loop import BFLOAT16, FLOAT32, loop
from model_foundry.models.packed_rows import PackedRows
from model_foundry.models.primitives import read, write

DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 48, 576])
def test_a_norm_and_its_gradients(width: int, dtype: torch.dtype, threads: int) -> None:
    x, grad = numbers(13, width, dtype=dtype), numbers(13, width, dtype=dtype, seed=1)
    weight = numbers(width, dtype=torch.float32, seed=2)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = functional.rms_norm(exact_x, (width,), exact_weight, 1e-5)
    wanted.backward(grad.double())
    dx, d_weight = fused.rms_norm_backward(x, weight, 1e-5, grad, weight_too=True)
    assert exact_x.grad is not None
    assert exact_weight.grad is not None
    assert d_weight is not None
    assert far(fused.rms_norm(x, weight, 1e-5), wanted) < BOUND[dtype]
    if width > 1:  # of one number alone the gradient is all but zero, and what is left is rounding
        assert far(dx, exact_x.grad) < BOUND[dtype]
    assert far(d_weight, exact_weight.grad) < 1e-6
    assert fused.rms_norm_backward(x, weight, 1e-5, grad, weight_too=False)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_silu_of_two_halves_of_one_matrix(dtype: torch.dtype, threads: int) -> None:
    """Its rows lie apart: read as if they did not, gate and up would be mixed."""
    gate, up = numbers(11, 2 * 37, dtype=dtype, scale=4).chunk(2, dim=1)
    grad = numbers(37, 11, dtype=dtype, seed=1).t()
    exact = [x.double().requires_grad_() for x in (gate, up)]
    wanted = functional.silu(exact[0]) * exact[1]
    wanted.backward(grad.double())
    assert far(fused.gated_silu(gate, up), wanted) < BOUND[dtype]
    for found, x in zip(fused.gated_silu_backward(gate, up, grad), exact, strict=True):
        assert x.grad is not None
        assert far(found, x.grad) < BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 9])
def test_a_causal_softmax_and_its_gradient(window: int | None, dtype: torch.dtype, threads: int) -> None:
    num_queries, before, num_keys = 8, 12, 20
    scores = numbers(2, 3 * num_queries, num_keys, dtype=dtype, scale=20)
    query, key = torch.arange(num_queries)[:, None] + before, torch.arange(num_keys)
    hidden = (key > query) if window is None else (key > query) | (key <= query - window)
    wanted = torch.softmax(scores.double().masked_fill(hidden.repeat(3, 1), -math.inf), -1)
    fused.causal_softmax_(scores, num_queries=num_queries, before=before, window=window)
    assert far(scores, wanted) < BOUND[dtype]
    assert not scores[hidden.repeat(3, 1).expand_as(scores)].any()
    grad = numbers(2, 3 * num_queries, num_keys, dtype=dtype, seed=1)
    p = scores.double()
    slope = p * (grad.double() - (p * grad.double()).sum(-1, keepdim=True))
    if window != 1:
        assert far(fused.softmax_backward_(grad, scores), slope) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_scores_with_a_target_twice(dtype: torch.dtype, threads: int) -> None:
    """A target that is named twice gets both slopes, and one that is all but certain keeps its small gradient."""
    logits, slopes = numbers(9, 101, dtype=dtype, scale=6), numbers(9, 3, dtype=torch.float32, seed=1)
    targets = torch.randint(0, 101, (9, 3), generator=torch.Generator().manual_seed(2))
    targets[:, 2] = targets[:, 1]
    logits[0, targets[0, 0]] = 40.0
    exact = logits.double()
    normaliser = fused.log_normaliser(logits)
    assert far(normaliser.double().sum(1), torch.logsumexp(exact, 1)) < 1e-6
    wanted = -slopes.double().sum(1, keepdim=True) * torch.softmax(exact, 1)
    wanted.scatter_add_(1, targets, slopes.double())
    assert far(fused.score_gradient_(logits, normaliser, targets, slopes), wanted) < BOUND[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("looked_up", [False, True])
def test_tokens_are_laid_out_by_head_and_back(looked_up: bool, dtype: torch.dtype, threads: int) -> None:
    num_rows, length, num_heads, width, start = 2, 5, 3, 8, 4
    x = numbers(20, 2 * num_heads, width, dtype=dtype)[:, num_heads:]
    angle = numbers(20, 1, width // 2, dtype=torch.float32, seed=1)
    rope = (angle.cos().to(dtype), angle.sin().to(dtype))
    index = torch.randperm(20, generator=torch.Generator().manual_seed(2))[: num_rows * length] if looked_up else None
    valid = torch.ones(num_rows, length, dtype=torch.bool)
    valid[1, 3:] = False
    chosen = index if index is not None else torch.arange(start, start + num_rows * length)
    half, (cos, sin) = width // 2, (part[chosen].double() for part in rope)
    first, second = x[chosen].double().split(half, dim=-1)
    wanted = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    wanted = wanted.view(num_rows, length, num_heads, width).transpose(1, 2) * valid[:, None, :, None]

    places = {"start": start, "index": index if index is None else index.view(num_rows, length), "valid": valid}
    heads = fused.to_heads(x, num_rows, length, **places, rope=rope)
    assert far(heads, wanted) < BOUND[dtype]
    plain = fused.to_heads(x, num_rows, length, **{**places, "valid": None}, rope=None)
    assert torch.equal(plain.transpose(1, 2).reshape(-1, num_heads, width), x[chosen])

    back = torch.full((20, num_heads, width), 7.0, dtype=dtype)
    fused.from_heads(heads, back, **places, rope=rope)
    written = chosen[valid.view(-1)]
    norms = (cos.square() + sin.square())[valid.view(-1)]  # 1, but for their rounding
    assert far(back[written], x[written].double() * torch.cat([norms, norms], -1)) < BOUND[dtype]
    others = torch.ones(20, dtype=torch.bool)
    others[written] = False
    assert (back[others] == 7.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_and_its_norm(dtype: torch.dtype, threads: int) -> None:
    """The sum is rounded before its norm is taken, as it is where both are done for themselves."""
    x, more, weight = (numbers(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(9, 48), (9, 48), (48,)]))
    summed = x + more
    before = x.clone()
    total, normed = fused.add_rms_norm(x, more, weight, 1e-6)
    assert torch.equal(x, before)
    assert torch.equal(total, summed)
    assert torch.equal(normed, fused.rms_norm(summed, weight, 1e-6))
    assert torch.equal(fused.add_rms_norm(x, more, weight, 1e-6, in_place=True)[1], normed)
    assert torch.equal(x, summed)
    alone, with_more = (
        fused.rms_norm_backward(x, weight, 1e-6, more, weight_too=True, more=each) for each in (None, before)
    )
    assert far(with_more[0], alone[0].double() + before.double()) < BOUND[dtype]
    assert with_more[1] is not None
    assert alone[1] is not None
    assert torch.equal(with_more[1], alone[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_turned_and_keys_and_values_kept(dtype: torch.dtype, threads: int) -> None:
    """Rows of nobody write no keys: their places would be somebody's."""
    num_rows, num_kept, num_heads, num_kv, width = 7, 5, 4, 2, 8
    heads = numbers(num_rows, num_heads + 2 * num_kv, width, dtype=dtype)
    q, k, v = heads.split([num_heads, num_kv, num_kv], dim=1)
    angle = numbers(11, 1, width // 2, dtype=torch.float32, seed=1)
    rope = tuple(
        torch.cat([other, part], -1).to(dtype) for other, part in ((angle, angle.cos()), (-angle, angle.sin()))
    )
    positions = torch.tensor([3, 0, 10, 7, 3, 1, 1])
    places = torch.randperm(40, generator=torch.Generator().manual_seed(3))[: num_kept * 2 * num_kv].view(num_kept, -1)
    cache, out = torch.full((40, width), 7.0, dtype=dtype), torch.empty(num_rows, num_heads, width, dtype=dtype)
    fused.turn_and_keep(q, k, v, positions, rope, out=out, cache=cache, places=places)
    cos, sin = (part[positions, :, width // 2 :].double() for part in rope)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.double().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    assert far(out, turned(q)) < BOUND[dtype]
    assert far(cache[places[:, :num_kv]], turned(k)[:num_kept]) < BOUND[dtype]
    assert torch.equal(cache[places[:, num_kv:]], v[:num_kept])
    others = torch.ones(40, dtype=torch.bool)
    others[places.view(-1)] = False
    assert (cache[others] == 7.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_joined_from_its_stretches(dtype: torch.dtype, threads: int) -> None:
    """What a row does not have counts for nothing, whatever stands there; and longer rows do not show in it."""
    outs, sums = numbers(3, 6, 2, 8, dtype=dtype), numbers(3, 6, 2, dtype=torch.float32, seed=1, scale=9)
    sums[2, :4], outs[2, :4] = -math.inf, math.nan
    shares = torch.softmax(sums.double(), 0)[..., None]
    wanted = (torch.where(shares > 0, outs.double() * shares, 0.0)).sum(0)
    found = fused.join_answers(outs, sums)
    assert far(found, wanted) < BOUND[dtype]
    assert torch.equal(found[:4], fused.join_answers(outs[:2, :4].contiguous(), sums[:2, :4].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 576])
def test_a_row_has_the_same_bits_in_every_company(width: int, dtype: torch.dtype, threads: int) -> None:
    """Rounding that depended on neighbours or on the threads would make a resumed or a served run another."""
    x, weight = numbers(33, width, dtype=dtype, scale=3), numbers(width, dtype=dtype, seed=1)
    targets = torch.arange(33)[:, None] % width

    def everything(rows: slice) -> list[torch.Tensor]:
        mine, other = x[rows], x.flip(0)[rows]
        p = torch.softmax(mine.float(), 1).to(dtype)
        levels, scores = fused.log_normaliser(mine), mine.clone()
        fused.causal_softmax_(scores, num_queries=1, before=width - 1, window=None)
        slopes = torch.ones(len(mine), 1)
        return [
            fused.rms_norm(mine, weight, 1e-6), *fused.add_rms_norm(mine, other, weight, 1e-6),
            fused.rms_norm_backward(mine, weight, 1e-6, other, weight_too=False, more=mine)[0],
            fused.rms_norm_backward(mine, weight, 1e-6, other, weight_too=False)[0],
            fused.gated_silu(mine, other), *fused.gated_silu_backward(mine, other, mine), scores,
            fused.softmax_backward_(other.clone(), p), levels,
            fused.score_gradient_(mine.clone(), levels, targets[rows], slopes),
        ]  # fmt: skip

    whole = everything(slice(0, 33))
    for row in (0, 7, 32):
        for found, wanted in zip(everything(slice(row, row + 1)), whole, strict=True):
            assert torch.equal(found, wanted[row : row + 1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart_and_gradients_that_are_one_number(dtype: torch.dtype, threads: int) -> None:
    """A sum's gradient is expanded and has no strides; a slice of a product has larger ones."""
    wide, weight = numbers(9, 3 * 16, dtype=dtype), numbers(16, dtype=torch.float32, seed=1)
    x, grad = wide[:, 16:32], numbers(1, 1, dtype=dtype, seed=2).expand(9, 16)
    dense = x.contiguous()
    assert torch.equal(fused.rms_norm(x, weight, 1e-6), fused.rms_norm(dense, weight, 1e-6))
    for found, wanted in (
        (fused.rms_norm_backward(x, weight, 1e-6, grad, weight_too=True),
         fused.rms_norm_backward(dense, weight, 1e-6, grad.contiguous(), weight_too=True)),
        (fused.gated_silu_backward(x, dense, grad), fused.gated_silu_backward(dense, dense, grad.contiguous())),
    ):  # fmt: skip
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    wanted = fused.add_rms_norm(dense, dense, weight, 1e-6)
    to = wide.clone()[:, 16:32]
    for found in (fused.add_rms_norm(x, x, weight, 1e-6), fused.add_rms_norm(to, x, weight, 1e-6, in_place=True)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row_and_comes_out(dtype: torch.dtype, threads: int) -> None:
    """A maximum that passes over it, or a rounding that makes a number of it, would hide a diverged run."""
    x, weight = numbers(6, 64, dtype=dtype), numbers(64, dtype=dtype, seed=1)
    x[2, 5] = math.nan
    scores = x.clone()
    fused.causal_softmax_(scores, num_queries=1, before=63, window=None)
    for found in (fused.rms_norm(x, weight, 1e-6), scores, fused.log_normaliser(x)):
        assert [bool(row.isnan().any()) for row in found] == [row == 2 for row in range(6)]
    assert fused.gated_silu(x, x).isnan().sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_small_arrays_are_written_at_once_with_torchs_bits(dtype: torch.dtype, threads: int) -> None:
    xs = [
        numbers(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate([(8, 576), (576, 8), (1, 1)] * 20)
    ]
    scales = [1.0, 32 / 7, -0.3] * 20
    outs = [torch.empty(x.shape, dtype=dtype) for x in xs]
    fused.write_scaled(outs, xs, scales)
    for out, x, scale in zip(outs, xs, scales, strict=True):
        assert torch.equal(out, (x * scale).to(dtype))


def test_rounding_to_bfloat16_is_torchs() -> None:
    """Also of ties, of the smallest and the largest numbers, and of what is no number."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = [0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 1, 0x3F808000, 0x3F818000]
    x = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    given, found = torch.from_numpy(x), torch.empty(len(x), dtype=torch.bfloat16)
    rounded.of(BFLOAT16)(given.data_ptr(), found.data_ptr(), 0, len(x))
    assert bool(((found == given.to(torch.bfloat16)) | (found.isnan() & given.isnan())).all())


def test_powers_of_e_are_within_two_in_the_last_place() -> None:
    x = np.concatenate([-np.logspace(-9, math.log10(87), 100_000), [0.0]]).astype(np.float32)
    found, wanted = np.empty_like(x), np.exp(x.astype(np.float64))
    powers.of(FLOAT32)(x.ctypes.data, found.ctypes.data, 0, len(x))
    assert np.max(np.abs(found - wanted) / np.spacing(wanted.astype(np.float32))) <= 2
    edges = np.array([0.0, -0.0, -87.1, -1e30, -np.inf, np.nan], np.float32)
    found = np.empty_like(edges)
    powers.of(FLOAT32)(edges.ctypes.data, found.ctypes.data, 0, len(edges))
    np.testing.assert_array_equal(found, np.array([1, 1, 0, 0, 0, np.nan], np.float32))


@loop("float32*", "x*")
def rounded(x: Any, out: Any, first: int, last: int) -> None:
    for j in range(first, last):
        write(out, j, read(x, j))


@loop("x*", "float32*")
def powers(x: Any, out: Any, first: int, last: int) -> None:
    for j in range(first, last):
        write(out, j, cpu_loops.exp(read(x, j)))


def test_memory_that_a_loop_saw_can_be_given_back() -> None:
    """FSDP empties its tensors between layers; what `Tensor.numpy` has seen refuses."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    fused.rms_norm(x, weight, 1e-6)
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().size() == 0


@pytest.mark.slow
def test_a_target_outside_the_vocabulary_is_an_error_and_not_a_write_elsewhere() -> None:
    inputs = {"target_tokens": torch.tensor([3, 99]), "weights": torch.ones(2)}
    with pytest.raises((IndexError, RuntimeError)):
        score(torch.randn(2, 10), LOSSES["cross_entropy"], inputs, backward=True)


def test_large_logits_lose_nothing_to_their_height() -> None:
    """log Σ exp as one float32 is off by half its last place: 3e-5 at a thousand, in every log-probability."""
    inputs = {"target_tokens": torch.arange(8), "weights": torch.ones(8)}
    logits = numbers(8, 50, dtype=torch.float32) + 4096.0
    wanted = torch.log_softmax(logits.double(), 1).gather(1, inputs["target_tokens"][:, None])[:, 0]
    scored = score(logits.clone(), LOSSES["cross_entropy"], inputs, backward=True)
    assert scored.logprobs.double() == pytest.approx(wanted, abs=1e-6)
    assert scored.d_logits is not None
    assert far(scored.d_logits, torch.softmax(logits.double(), 1) - torch.eye(50, dtype=torch.float64)[:8]) < 1e-6


def test_rows_that_are_not_those_of_the_tokens_are_refused() -> None:
    """The loops do not look where they read and write: it would be somebody else's memory."""
    q, rope = torch.randn(64, 2, 8), tuple(torch.randn(64, 1, 4) for _ in range(4))
    with pytest.raises(ModelError, match="rows of 128 tokens"):
        attend_packed(q, q, q, rope, PackedRows.of([64, 64]), None, backend="eager")
    fused.check_within(torch.tensor([0, 9]), 10)
    for wrong in ([0, 10], [-1, 3]):
        with pytest.raises(IndexError, match="out of bounds for 10"):
            fused.check_within(torch.tensor(wrong), 10)


def test_nothing_of_nothing() -> None:
    empty, weight = torch.empty(0, 8), torch.ones(8)
    assert fused.rms_norm(empty, weight, 1e-6).shape == (0, 8)
    dx, d_weight = fused.rms_norm_backward(empty, weight, 1e-6, empty, weight_too=True)
    assert dx.shape == (0, 8)
    assert d_weight is not None
    assert not d_weight.any()
    assert fused.log_normaliser(empty).shape == (0, 2)
    fused.score_gradient_(empty, torch.empty(0, 2), torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1))
    fused.softmax_backward_(empty, empty)
    assert fused.gated_silu(empty, empty).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_and_compilers_of_graphs_go_another_way(dtype: torch.dtype) -> None:
    assert not fused.fits(torch.ones(2, 2, dtype=dtype))
    assert not fused.fits(torch.ones(2, 2), torch.ones(2, dtype=dtype))
    assert not fused.fits(torch.ones(2, device="meta"))
    assert fused.fits(torch.ones(2, 2), torch.ones(2, dtype=torch.bfloat16))
