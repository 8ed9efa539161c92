"""One pass of the native decoder over rows of many sequences, with their keys and values in shared segments.

A pass is cut into pieces of rows, and every operation but attention sees one piece: all rows at once in the free mode;
in the invariant mode as many rows as ever, padded, so that each row meets the same kernels in whatever company. That is
needed: a BLAS chooses its kernel, and so its order of summation, by the number of rows. Attention is
`continuous_attention`'s, and depends on the sequence's own length alone.

Shapes: N rows of a pass, R rows of a piece, D width, H heads, K key/value heads, G = H // K, W head width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from model_foundry.engine.continuous_adapters import ServedAdapter
from model_foundry.engine.continuous_answers import AnswerLoop
from model_foundry.engine.continuous_attention import (
    MOST_TOGETHER,
    QUERY_BLOCK,
    AnswerReach,
    BlockReach,
    Span,
    Together,
    attend_answers,
    attend_block,
    find_together,
    plan_answers,
    plan_block,
    plan_prompts,
)
from model_foundry.engine.continuous_cache import BLOCK_TOKENS, SEGMENT_TOKENS
from model_foundry.engine.continuous_products import Product, blocks_together, cancelling_rows, check_places
from model_foundry.engine.platform import join_pages
from model_foundry.models import fused
from model_foundry.models.config import HEAD_LAYER
from model_foundry.models.decoder import Decoder, DecoderLayer
from model_foundry.models.experts import ExpertMLP
from model_foundry.models.lora import Linear
from model_foundry.models.mlp import gated
from model_foundry.models.packing import PackedLinear
from model_foundry.models.tiled_attention import PromptReach, attend_prompts, is_for
from model_foundry.models.tiles import ROWS

logger = logging.getLogger(__name__)

ANSWER_ROWS = 16
"""Answers in a piece of the invariant mode, and rows of one expert's product: as many as cost little more than one
where bfloat16 is native."""

MOST_BLOCKS = 4
"""Blocks of prompts in a piece of the invariant mode, where the machine's products allow it."""

Adapted = Sequence[tuple[ServedAdapter, torch.Tensor | None]]
"""Adapters of a piece's rows: (adapter, bool [R, 1] of its rows; None: all of them)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows to compute.

    Attributes:
        tokens: int64 [N], positions: int64 [N].
        spans: which rows belong together; rows of none are padding. In a pass of prompts each is a whole block, in one
            of answers each is one row.
        piece_rows: rows of a piece; the last may have fewer.
        adapted: for each piece.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    spans: Sequence[Span]
    piece_rows: int
    adapted: Sequence[Adapted]


class _Projection:
    """Layers that read the same input, as one product."""

    def __init__(self, layers: Sequence[Linear], names: Sequence[str], dtype: torch.dtype) -> None:
        self.names = names
        self.sizes, self.num_in = [layer.shape[0] for layer in layers], layers[0].shape[1]
        self._layers = layers
        self.product: Product | None = None
        biases = [torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias.detach() for layer in layers]
        has_bias = any(layer.bias is not None for layer in layers)
        self._bias = torch.cat([bias.to(layers[0].device, dtype) for bias in biases]) if has_bias else None
        if not any(isinstance(layer, PackedLinear) for layer in layers):
            self.product = Product(self.matrix(dtype), self._bias)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """[sum of out, in], from the layers: the product has given its own away."""
        return torch.cat([layer.matrix.detach().to(dtype) for layer in self._layers])

    def __call__(self, x: torch.Tensor, adapted: Adapted) -> torch.Tensor:
        """x [R, in] → [R, sum of out]."""
        if self.product is not None:
            out = self.product(x)
        else:
            out = torch.cat([layer.product(x) for layer in self._layers], dim=1)
            out = out if self._bias is None else out + self._bias
        for adapter, rows in adapted:
            first = 0
            for name, size in zip(self.names, self.sizes, strict=True):
                if (part := adapter.parts.get(name)) is not None:
                    base = out[:, first : first + size]
                    changed = part.apply(x, base)
                    base.copy_(changed if rows is None else torch.where(rows, changed, base))
                first += size
        return out


class _Experts:
    """The router and its experts, expert by expert; in the invariant mode each product has `ANSWER_ROWS` rows."""

    def __init__(self, mlp: ExpertMLP, name: str, *, invariant: bool) -> None:
        self.mlp, self.name, self.invariant = mlp, name, invariant
        self.router = _Projection([mlp.gate], [f"{name}.gate"], mlp.gate.matrix.dtype)
        self.projections = (self.router,)

    def __call__(self, x: torch.Tensor, adapted: Adapted) -> torch.Tensor:
        """x [R, D] → [R, D]."""
        mixture = self.mlp.mixture
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, chosen = torch.softmax(self.router(x, adapted), dim=-1, dtype=wide).topk(mixture.num_experts_per_tok)
        if mixture.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        slots = x.new_zeros(*chosen.shape, x.shape[1])
        for expert in chosen.unique().tolist():
            rows, slot = (chosen == expert).nonzero(as_tuple=True)
            size = ANSWER_ROWS if self.invariant else len(rows)
            for first in range(0, len(rows), size):
                some = rows[first : first + size]
                slots[some, slot[first : first + size]] = self._expert(expert, x, some, size, adapted)
        return (slots * weights.to(x.dtype)[..., None]).sum(1)

    def _expert(self, expert: int, x: torch.Tensor, rows: torch.Tensor, size: int, adapted: Adapted) -> torch.Tensor:
        """One expert's answer to some rows of x: [rows, D]."""
        mine = functional.pad(x[rows], (0, 0, 0, size - len(rows)))
        masks = [
            (adapter, None if mask is None else functional.pad(mask[rows], (0, 0, 0, size - len(rows))))
            for adapter, mask in adapted
        ]
        gate, up = (self._product(expert, name, mine, masks) for name in ("gate_proj", "up_proj"))
        return self._product(expert, "down_proj", gated(gate, up, self.mlp.activation), masks)[: len(rows)]

    def _product(self, expert: int, projection: str, x: torch.Tensor, adapted: Adapted) -> torch.Tensor:
        stack: Any = self.mlp.experts[projection]
        out = functional.linear(x, stack.matrix(expert))
        for adapter, rows in adapted:
            if (part := adapter.parts.get(f"{self.name}.experts.{expert}.{projection}")) is not None:
                changed = part.apply(x, out)
                out = changed if rows is None else torch.where(rows, changed, out)
        return out


class _GatedMLP:
    def __init__(self, mlp: Any, name: str, dtype: torch.dtype) -> None:
        self.activation = mlp.activation
        self.inner = _Projection([mlp.gate_proj, mlp.up_proj], [f"{name}.gate_proj", f"{name}.up_proj"], dtype)
        self.outer = _Projection([mlp.down_proj], [f"{name}.down_proj"], dtype)
        self.projections = (self.inner, self.outer)

    def __call__(self, x: torch.Tensor, adapted: Adapted) -> torch.Tensor:
        gate, up = self.inner(x, adapted).chunk(2, dim=1)
        return self.outer(gated(gate, up, self.activation), adapted)


class _Layer:
    """A decoder layer's parts as a pass calls them."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype, *, invariant: bool) -> None:
        name = f"model.layers.{layer.index}"
        attn: Any = layer.self_attn
        of_attention = [getattr(attn, part) for part in ("q_proj", "k_proj", "v_proj")]
        self.qkv = _Projection(of_attention, [f"{name}.self_attn.{part}_proj" for part in "qkv"], dtype)
        self.out = _Projection([attn.o_proj], [f"{name}.self_attn.o_proj"], dtype)
        self.norms: Any = (layer.input_layernorm, layer.post_attention_layernorm)
        self.head_norms: Any = (attn.q_norm, attn.k_norm) if layer.config.qk_norm else None
        self.mlp = (
            _Experts(layer.mlp, f"{name}.mlp", invariant=invariant)
            if isinstance(layer.mlp, ExpertMLP)
            else _GatedMLP(layer.mlp, f"{name}.mlp", dtype)
        )
        self.projections = (self.qkv, self.out, *self.mlp.projections)


def add_norm(x: torch.Tensor, more: torch.Tensor | None, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, D] with `more` added, perhaps in place; and its norm."""
    if more is None:
        return x, norm(x)
    if fused.fits(x, more, norm.weight) and x.dtype == more.dtype:
        return fused.add_rms_norm(x, more, norm.weight, norm.eps, in_place=True)
    x = x + more
    return x, norm(x)


class BatchedDecoder:
    """The decoder's weights and the segments of keys and values."""

    def __init__(self, decoder: Decoder, *, num_segments: int, num_positions: int, invariant: bool) -> None:
        config, self.decoder = decoder.config, decoder
        self.dtype, self.device = decoder.compute_dtype, decoder.embed_tokens.device
        self.invariant = invariant
        self.layers = [
            _Layer(layer, self.dtype, invariant=invariant)  # pyright: ignore[reportArgumentType]
            for layer in decoder.layers
        ]
        self.num_heads, self.num_kv, self.width = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.group = self.num_heads // self.num_kv
        self.head = Product(decoder.head_weight.to(self.dtype))
        if self.device.type == "cpu":
            join_pages()
        # Keys and values beside each other. Not filled: pages are taken from the system when they are first written.
        shape = (num_segments, 2 * self.num_kv, SEGMENT_TOKENS, self.width)
        self.cache = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.layers]
        self.windows = [config.window(index) for index in range(config.num_hidden_layers)]
        # From a table, or a position's cosine would depend on its place in a vector of them.
        _, _, cos, sin = decoder.rope(torch.arange(num_positions, device=self.device))
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        self.scale = 1.0 / config.head_dim**0.5
        self.answers = None
        if AnswerLoop.fits(decoder):
            products = [
                [each.product for each in layer.projections if each.product is not None] for layer in self.layers
            ]
            self.answers = AnswerLoop(decoder, products, self.cache, (self.cos, self.sin))
        self._together = Together(MOST_TOGETHER, max(1, QUERY_BLOCK // self.group))
        self.blocks_together = 1
        if invariant:
            self._check_products()
            like = self.cos.new_empty(0, dtype=self.dtype)
            self._together = find_together(self.num_kv, self.group, self.width, like=like)
            if self._together.rows == 1:
                logger.warning("attention of several answers in one call depends on their number here: one by one")

    def _check_products(self) -> None:
        """Raises EngineError where one of the model's products is not the same in every row; each shape once."""
        projections = [part for layer in self.layers for part in layer.projections]
        products = {(sum(part.sizes), part.num_in): part for part in projections if part.product is not None}
        sizes = set(range(1, MOST_BLOCKS + 1))
        for part in products.values():
            assert part.product is not None
            rows = cancelling_rows(part.matrix(self.dtype), MOST_BLOCKS * BLOCK_TOKENS)
            check_places(part.product, rows[torch.linspace(0, len(rows) - 1, ANSWER_ROWS).long()])
            sizes &= blocks_together(part.product, rows, BLOCK_TOKENS)
        if all(part.product is not None for part in projections):
            self.blocks_together = next(size for size in range(1, MOST_BLOCKS + 1) if size + 1 not in sizes)
        check_places(self.head, cancelling_rows(self.decoder.head_weight.detach().to(self.dtype), ANSWER_ROWS))

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """The first tokens of a segment into another."""
        self._clear(target)
        for kept in self.cache:
            kept[target, :, :num_tokens] = kept[source, :, :num_tokens]

    def _clear(self, segment: int) -> None:
        """What a masked key holds must be a number: nothing times what somebody's overflow left is not nothing."""
        for kept in self.cache:
            kept[segment].zero_()

    def _clear_new(self, spans: Sequence[Span]) -> None:
        """The segments that these rows begin."""
        for span in spans:
            if span.position % SEGMENT_TOKENS == 0:
                self._clear(span.segments[span.position // SEGMENT_TOKENS])

    @torch.inference_mode()
    def run(self, work: Pass) -> torch.Tensor:
        """Hidden states [N, D] before the final norm; keys and values of all spans are written."""
        self._clear_new(work.spans)
        xs = list(self.decoder.embed(work.tokens).split(work.piece_rows))
        pieces = list(zip(range(0, len(work.tokens), work.piece_rows), work.adapted, strict=True))
        # What a layer adds is added where the next norm reads it.
        more: list[torch.Tensor | None] = [None] * len(xs)
        reaches = {window: self._plan(work, window) for window in set(self.windows)}
        places = self._places(work)
        fused.check_within(work.positions, len(self.cos))
        fused.check_within(places, self.cache[0].numel() // self.width)
        for index, layer in enumerate(self.layers):
            q = xs[0].new_empty(len(work.tokens), self.num_heads, self.width)
            for piece, (first, adapted) in enumerate(pieces):
                xs[piece], x = add_norm(xs[piece], more[piece], layer.norms[0])
                rows = slice(first, first + work.piece_rows)
                self._heads(layer, x, work.positions[rows], adapted, q[rows], self.cache[index], places[rows])
            q = q.unflatten(1, (self.num_kv, -1))
            attended = self._attend(self.cache[index], q, work.spans, reaches[self.windows[index]])
            for piece, (first, adapted) in enumerate(pieces):
                part = layer.out(attended[first : first + work.piece_rows], adapted)
                xs[piece], x = add_norm(xs[piece], part, layer.norms[1])
                more[piece] = layer.mlp(x, adapted)
        ends = [x if part is None else x + part for x, part in zip(xs, more, strict=True)]
        return torch.cat(ends) if len(ends) > 1 else ends[0]

    @torch.inference_mode()
    def answer(
        self, tokens: torch.Tensor, spans: Sequence[Span], adapters: Sequence[ServedAdapter | None]
    ) -> torch.Tensor:
        """As `run`, by the loop, of one row for each span, whose adapters it takes: [R, D] of tokens int64 [R]."""
        assert self.answers is not None
        self._clear_new(spans)
        x = self.decoder.embed(tokens)
        segments = torch.full((len(spans), max(len(span.segments) for span in spans)), -1)
        for row, span in enumerate(spans):
            segments[row, : len(span.segments)] = torch.tensor(span.segments)
        self.answers.run(x, torch.tensor([span.position for span in spans]), segments, adapters)
        return x

    def fills_up(self, adapters: Sequence[ServedAdapter | None], size: int) -> bool:
        """Whether rows of logits are filled up to so many: for their bits to be the same in any company, and for few
        sizes of oneDNN's kernels."""
        return (
            size > ROWS
            or not self.head.is_by_rows()
            or any(each is not None and HEAD_LAYER in each.parts for each in adapters)
        )

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, adapted: Adapted = ()) -> torch.Tensor:
        """[R, V] of hidden states [R, D] before the final norm."""
        x: torch.Tensor = self.decoder.norm(hidden)  # pyright: ignore[reportAssignmentType]
        out = self.head(x)
        for adapter, rows in adapted:
            if (part := adapter.parts.get(HEAD_LAYER)) is not None:
                changed = part.apply(x, out)
                out = changed if rows is None else torch.where(rows, changed, out)
        return out

    def _heads(
        self, layer: _Layer, x: torch.Tensor, positions: torch.Tensor, adapted: Adapted, out: torch.Tensor,
        cache: torch.Tensor, places: torch.Tensor,
    ) -> None:  # fmt: skip
        """Queries of x [R, D] into out [R, H, W], keys and values to their places; queries and keys rotated."""
        heads = layer.qkv(x, adapted).view(x.shape[0], -1, self.width)
        q, k, v = heads.split([self.num_heads, self.num_kv, self.num_kv], dim=1)
        if layer.head_norms is not None:
            q, k = layer.head_norms[0](q.contiguous()), layer.head_norms[1](k.contiguous())
        if fused.fits(heads, cache) and heads.dtype == cache.dtype == out.dtype == self.cos.dtype:
            fused.turn_and_keep(q, k, v, positions, (self.cos, self.sin), out=out, cache=cache, places=places)
            return
        cos, sin, half = self.cos[positions], self.sin[positions], self.width // 2
        for part, to in ((q, out), (k, k)):
            # `models.attention.rotate` in fewer operations.
            to.copy_(torch.addcmul(part * cos, part.roll(half, -1), sin))
        kv = torch.cat([k, v], dim=1)[: len(places)]
        cache.view(-1, self.width).index_copy_(0, places.view(-1), kv.reshape(-1, self.width))

    def _places(self, work: Pass) -> torch.Tensor:
        """Where the keys and the values of each row that belongs to a span go, which are the first; int64 [M, 2 K]."""
        starts = []
        for span in work.spans:
            for position in range(span.position, span.position + span.num_rows):
                segment, offset = span.segments[position // SEGMENT_TOKENS], position % SEGMENT_TOKENS
                starts.append(segment * 2 * self.num_kv * SEGMENT_TOKENS + offset)
        heads = torch.arange(0, 2 * self.num_kv * SEGMENT_TOKENS, SEGMENT_TOKENS, device=self.device)
        return torch.tensor(starts, device=self.device)[:, None] + heads

    def _plan(self, work: Pass, window: int | None) -> AnswerReach | PromptReach | list[BlockReach]:
        like = self.cos.new_empty(0, dtype=self.dtype)
        if work.spans[0].num_rows == 1:
            shape = (len(work.tokens), self.num_kv, self.group, self.width)
            return plan_answers(work.spans, window, shape=shape, like=like, most=self._together)
        if is_for(self.device, self.dtype):
            return plan_prompts(work.spans, window)
        return [plan_block(span, window, group=self.group, like=like) for span in work.spans]

    def _attend(self, cache: torch.Tensor, q: torch.Tensor, spans: Sequence[Span], reaches: Any) -> torch.Tensor:
        """q [N, K, G, W] → [N, H · W]."""
        if spans[0].num_rows == 1:
            return attend_answers(q, cache, reaches, self.scale).reshape(q.shape[0], -1)
        if isinstance(reaches, PromptReach):
            return attend_prompts(q.flatten(1, 2), cache, reaches, self.scale).view(q.shape[0], -1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for span, reach in zip(spans, reaches, strict=True):
            rows = slice(span.first_row, span.first_row + span.num_rows)
            out[rows] = attend_block(q[rows], cache, reach, self.scale)
        return out.view(out.shape[0], -1)
