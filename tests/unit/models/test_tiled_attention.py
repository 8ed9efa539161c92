"""Attention by tiles: as exact as bfloat16 allows, and each row by itself."""

from __future__ import annotations

import math

import pytest
import torch

from model_foundry.engine.continuous_attention import Span, plan_prompts
from model_foundry.models import fused
from model_foundry.models.attention import PackedAttention, attend_packed
from model_foundry.models.packed_rows import PackedRows
from model_foundry.models.small_products import have_products
from model_foundry.models.tiled_attention import TiledAttention, attend_prompts, fits, is_for

TILED = pytest.mark.skipif(not have_products(), reason="this processor multiplies no bfloat16")
Parts = tuple[torch.Tensor, ...]


def parts(lengths: list[int], heads: int, kv: int, width: int, *, rope: torch.dtype = torch.float32) -> Parts:
    """q, k, v as neighbours in one matrix, the gradient of the answer, and the four tables of the rotation."""
    make, total = torch.Generator().manual_seed(0), sum(lengths)
    both = torch.randn(total, (heads + 2 * kv) * width, generator=make).bfloat16()
    q, k, v = both.split([heads * width, kv * width, kv * width], dim=1)
    grad = torch.randn(total, heads, width, generator=make).bfloat16()
    angle = torch.rand(total, 1, width // 2, generator=make) * 6
    cos, sin, scale = angle.cos(), angle.sin(), width**-0.5
    tables = (each.to(rope) for each in (cos * scale, sin * scale, cos, sin))
    return (q.view(total, heads, width), k.view(total, kv, width), v.view(total, kv, width), grad, *tables)


def answer_and_gradients(own: Parts, lengths: list[int], window: int | None) -> Parts:
    leaves, rows = [x.detach().requires_grad_() for x in own[:3]], PackedRows.of(lengths)
    assert may_be_tiled(own, rows)
    out = TiledAttention.apply(*leaves, own[4:], rows, window)
    assert isinstance(out, torch.Tensor)
    return (out.detach(), *torch.autograd.grad(out, leaves, own[3]))


def may_be_tiled(own: Parts, rows: PackedRows) -> bool:
    q, k, v = own[:3]
    return fits(q, k, v, own[4:], rows)


def exactly(own: Parts, lengths: list[int], window: int | None) -> Parts:
    leaves, rope = [x.detach().double().requires_grad_() for x in own[:3]], tuple(x.double() for x in own[4:])
    out = PackedAttention.apply(*leaves, rope, PackedRows.of(lengths), window, None)
    assert isinstance(out, torch.Tensor)
    return (out.detach(), *torch.autograd.grad(out, leaves, own[3].double()))


@pytest.mark.slow
@TILED
@pytest.mark.parametrize("rope", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv", "width", "window"),
    [
        ([1, 31, 32, 33, 100], 4, 2, 64, None),
        ([300, 5], 3, 3, 32, None),
        ([150], 6, 2, 64, 17),
        ([290], 2, 1, 64, 130),
        ([70, 40], 2, 2, 16, None),
        ([40, 65], 2, 1, 80, 2),
        ([161], 2, 1, 128, 500),
    ],
)
def test_answer_and_gradients_are_those_of_double_precision(
    lengths: list[int], heads: int, kv: int, width: int, window: int | None, rope: torch.dtype, threads: int
) -> None:
    own = parts(lengths, heads, kv, width, rope=rope)
    for found, wanted in zip(
        answer_and_gradients(own, lengths, window), exactly(own, lengths, window), strict=True
    ):  # fmt: skip
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2**-7
        assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 2**-5


@pytest.mark.slow
@TILED
@pytest.mark.parametrize("window", [None, 40])
def test_a_rows_bits_are_those_it_has_alone(window: int | None, threads: int) -> None:
    """Where company showed, a batch's losses would depend on how it was packed."""
    lengths = [70, 1, 33, 200, 32]
    own = parts(lengths, 4, 2, 64)
    together = [x.split(lengths) for x in answer_and_gradients(own, lengths, window)]
    for place, row in enumerate(zip(*(x.split(lengths) for x in own), strict=True)):
        alone = answer_and_gradients(row, [lengths[place]], window)
        for mine, whole in zip(alone, together, strict=True):
            assert torch.equal(mine, whole[place])


@TILED
@pytest.mark.parametrize("window", [None, 20])
def test_what_stands_later_or_too_far_back_has_no_effect_at_all(window: int | None) -> None:
    own = parts([100], 2, 1, 64)
    answer, *_ = answer_and_gradients(own, [100], window)
    changed = tuple(x.clone() for x in own)
    for x in changed[:3]:
        x[60:] *= -3
    answer_to_others, *_ = answer_and_gradients(changed, [100], window)
    assert torch.equal(answer[:60], answer_to_others[:60])
    assert not torch.equal(answer[60:], answer_to_others[60:])
    if window is not None:
        assert torch.equal(exactly(own, [100], window)[0][:60], exactly(changed, [100], window)[0][:60])
        changed = tuple(x.clone() for x in own)
        for x in changed[1:3]:
            x[:30] *= -3
        assert torch.equal(answer[50:], answer_and_gradients(changed, [100], window)[0][50:])
        assert not torch.equal(answer[:49], answer_and_gradients(changed, [100], window)[0][:49])


@TILED
def test_what_is_no_number_stays_in_its_row() -> None:
    lengths = [40, 40, 40]
    own = parts(lengths, 2, 1, 64)
    clean = answer_and_gradients(own, lengths, None)
    broken = tuple(x.clone() for x in own)
    broken[0][50, 1, 3] = math.nan
    for found, wanted in zip(answer_and_gradients(broken, lengths, None), clean, strict=True):
        assert not found[40:80].isfinite().all()
        assert torch.equal(found[:40], wanted[:40])
        assert torch.equal(found[80:], wanted[80:])


@TILED
def test_large_scores_do_not_overflow() -> None:
    own = parts([64], 2, 1, 64)
    own[0].mul_(200)
    found = answer_and_gradients(own, [64], None)
    assert all(x.isfinite().all() for x in found)
    assert float(found[0].abs().max()) <= float(own[2].abs().max())
    assert torch.equal(found[0][0], own[2][0].expand(2, -1))  # the first token sees itself alone


def test_other_types_branches_and_devices_go_another_way() -> None:
    own = parts([8], 2, 1, 64)
    rows = PackedRows.of([8])
    assert may_be_tiled(own, rows) == have_products()
    assert not may_be_tiled(tuple(x.float() for x in own), rows)
    assert not may_be_tiled(own, PackedRows.of([8], branches=[(2, 3)]))
    for place, odd in ((2, own[2][..., :32]), (1, own[1][:, :, :32]), (6, own[6].bfloat16()), (4, own[4][..., :16])):
        assert not may_be_tiled((*own[:place], odd, *own[place + 1 :]), rows)
    assert not is_for(torch.device("cuda"), torch.bfloat16)
    with torch.no_grad():
        out = attend_packed(own[0], own[1], own[2], own[4:], rows, None)
    assert float((out.double() - exactly(own, [8], None)[0]).abs().max()) < 0.05


@pytest.mark.parametrize("shape", [(64, 96), (1, 1), (33, 70), (5, 32), (200, 31)])
def test_a_transposition_moves_every_number(shape: tuple[int, int], threads: int) -> None:
    wide = torch.randn(shape[0], shape[1] + 3).bfloat16()
    wide[0, 0] = math.nan
    x = wide[:, : shape[1]]
    assert torch.equal(fused.transposed(x).view(torch.int16), x.t().contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_inputs", [16, fused.MIN_INPUTS_TO_TRANSPOSE])
def test_the_gradient_of_a_weight(num_inputs: int, dtype: torch.dtype) -> None:
    grad, x = torch.randn(70, 40).to(dtype), torch.randn(70, num_inputs).to(dtype)
    wanted = grad.double().t() @ x.double()
    assert float((fused.weight_gradient(grad, x).double() - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.slow
@TILED
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv", "width"), [(6, 2, 64), (2, 2, 16), (3, 1, 80)])
def test_blocks_of_prompts_see_their_own_keys(
    heads: int, kv: int, width: int, window: int | None, threads: int
) -> None:
    """Three sequences whose segments lie anywhere; blocks that begin anywhere; a row between them that is nobody's."""
    make, length = torch.Generator().manual_seed(1), 64
    cache = torch.randn(9, 2 * kv, length, width, generator=make).bfloat16()
    q = torch.randn(30 + 1 + 64 + 5, heads, width, generator=make).bfloat16()
    spans = [Span(0, 30, 0, [4]), Span(31, 64, 150, [2, 7, 0, 8]), Span(95, 5, 62, [5, 1])]
    found = attend_prompts(q, cache, plan_prompts(spans, window), width**-0.5)
    assert not found[30].any()
    for span in spans:
        last = span.position + span.num_rows
        kept = torch.cat([cache[segment] for segment in span.segments], dim=1)[:, :last].double()
        keys, values = kept.repeat_interleave(heads // kv, 0).chunk(2)
        mine = q[span.first_row : span.first_row + span.num_rows].double().transpose(0, 1)
        scores = mine @ keys.transpose(1, 2) * width**-0.5
        place, key = torch.arange(span.position, last)[:, None], torch.arange(last)[None]
        hidden = (key > place) | (key <= place - (window or last))
        wanted = (torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ values).transpose(0, 1)
        mine = found[span.first_row : span.first_row + span.num_rows].double()
        assert float((mine - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.slow
@TILED
@pytest.mark.parametrize("window", [None, 40])
def test_how_a_prompt_is_cut_does_not_show(window: int | None) -> None:
    """A prompt whose beginning somebody else has asked is read from where that ends."""
    make = torch.Generator().manual_seed(2)
    cache, q = torch.randn(3, 4, 64, 64, generator=make).bfloat16(), torch.randn(130, 6, 64, generator=make).bfloat16()
    whole = attend_prompts(q, cache, plan_prompts([Span(0, 130, 0, [1, 0, 2])], window), 0.125)
    for cut in (1, 31, 64, 100):
        spans = [Span(0, cut, 0, [1, 0, 2]), Span(cut, 130 - cut, cut, [1, 0, 2])]
        assert torch.equal(attend_prompts(q, cache, plan_prompts(spans, window), 0.125), whole)
