"""Answers' tokens through all layers at once, by the compiled loop of `models.answer_loops`.

It knows a decoder's weights and where keys and values are kept. It does not know sequences or prompts.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model_foundry.engine.continuous_adapters import ServedAdapter
from model_foundry.engine.continuous_products import Product
from model_foundry.models import answer_loops, fused
from model_foundry.models.answer_plan import PLAN, TABLE_ROW
from model_foundry.models.answer_products import AT_ONCE, AT_ONCE_BY_TILES
from model_foundry.models.decoder import Decoder
from model_foundry.models.lora import Linear
from model_foundry.models.mlp import GatedMLP
from model_foundry.models.packing import PackedLinear
from model_foundry.models.primitives import LANES, TOGETHER
from model_foundry.models.small_products import ROWS_AT_ONCE
from model_foundry.models.tiles import DEPTH, ROWS, tile_shapes

_NAMES = (
    *(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)  # fmt: skip
"""Of `answer_plan.PROJECTIONS`, in a layer."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    num_rows: int
    padded: int
    most_keys: int
    most_rank: int


class AnswerLoop:
    """The loop for one decoder.

    Args:
        products: of each layer's queries, keys and values, output, gate and up, and down.
        cache: of each layer [segments, 2 K, segment_tokens, W], keys and then values.
        tables: cosines and sines [positions, .., W] whose second half counts.
    """

    def __init__(
        self, decoder: Decoder, products: Sequence[Sequence[Product]], cache: Sequence[torch.Tensor],
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> None:  # fmt: skip
        config = decoder.config
        self._eps, self._num_kv, self._width = config.rms_norm_eps, config.num_key_value_heads, config.head_dim
        self._cache, self._tables, self._products = cache, tables, products
        block = _block(decoder, products)
        self.by_tiles = block is not None
        rows = []
        for index, (layer, kept) in enumerate(zip(decoder.layers, cache, strict=True)):
            found = {**_addresses(layer), "cache": kept.data_ptr(), "window": config.window(index) or 0}
            found |= _addresses_of_tiles(layer, products[index]) if self.by_tiles else {}
            rows.append([found[name] for name in TABLE_ROW])
        self._weights = [each.detach() for each in decoder.layers.parameters()]  # as long as their addresses
        self._table = torch.tensor(rows)
        self._group = config.num_attention_heads // self._num_kv
        self._adapters: dict[int, torch.Tensor] = {}
        self._counter = torch.zeros(8, dtype=torch.int64)
        self._shapes = torch.from_numpy(tile_shapes())
        self._room = torch.zeros(0, dtype=torch.float32)
        self._at_once = AT_ONCE_BY_TILES if self.by_tiles else AT_ONCE
        self._sizes = {
            "layers": len(rows), "width": config.hidden_size, "heads": config.num_attention_heads,
            "kv_heads": self._num_kv, "head_width": self._width, "inner": config.intermediate_size,
            "segment_tokens": cache[0].shape[2],
            "table": self._table.data_ptr(), "cos": tables[0].data_ptr(), "sin": tables[1].data_ptr(),
            "counter": self._counter.data_ptr(), "give_way": _give_way(), "tile_shapes": self._shapes.data_ptr(),
            "block_outputs": block or 0,
        }  # fmt: skip

    @staticmethod
    def fits(decoder: Decoder) -> bool:
        """Whether the loop does what this decoder's layers do."""
        return (
            sys.platform != "win32"
            and decoder.config.head_dim % LANES == 0
            and all(side % AT_ONCE == 0 for side in _sides(decoder))
            and all(_fits(layer, decoder.compute_dtype) for layer in decoder.layers)
        )

    def takes(self, adapter: ServedAdapter) -> bool:
        """Whether it does what this adapter does: DoRA it does not, and the head is not its affair."""
        return not adapter.rescales

    def run(
        self, x: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor,
        adapters: Sequence[ServedAdapter | None],
    ) -> None:  # fmt: skip
        """One token of each row through all layers, in place; its keys and values are kept.

        Args:
            x: [R, D], without gaps.
            positions: int64 [R], segments: int64 [R, S], of each row's sequence in their order; what lies beyond its
                position is not looked at.
            adapters: of each row, if any; those that it takes.

        Raises:
            IndexError: a position or a segment is none.
        """
        num_rows, num_threads = x.shape[0], torch.get_num_threads()
        segment_tokens = self._sizes["segment_tokens"]
        fused.check_within(positions, min(len(self._tables[0]), segments.shape[1] * segment_tokens))
        looked_at = torch.arange(segments.shape[1]) <= (positions // segment_tokens)[:, None]
        fused.check_within(segments[looked_at], self._cache[0].shape[0])
        # Of those in use alone: a table must not outlive what it points to.
        self._adapters = {each.number: self._table_of(each) for each in adapters if each is not None}
        owned = torch.tensor([0 if each is None else self._adapters[each.number].data_ptr() for each in adapters])
        ranks = [int(table[:, :, 2].max()) for table in self._adapters.values()]
        step = ROWS_AT_ONCE if self.by_tiles else 4
        sizes = _Sizes(
            num_rows, -(-num_rows // step) * step, -(-(int(positions.max()) + 1) // 256) * 256, max(ranks, default=0)
        )
        plan = {**self._sizes, **self._rooms(sizes, num_threads)}
        plan |= {
            "rows": num_rows, "padded_rows": sizes.padded, "max_segments": segments.shape[1],
            "adapters": owned.data_ptr(), "most_rank": sizes.most_rank,
            "positions": positions.data_ptr(), "segments": segments.data_ptr(),
        }  # fmt: skip
        numbers = torch.tensor([plan[name] for name in PLAN])
        loop = answer_loops.answer_by_tiles if self.by_tiles else answer_loops.answer
        fused.run_together(
            loop, x, (numbers.data_ptr(), x.data_ptr(), self._eps), counter=self._counter, num_threads=num_threads
        )

    def _table_of(self, adapter: ServedAdapter) -> torch.Tensor:
        """int64 [layers, projections, 3], see `answer_plan.PROJECTIONS`."""
        if (known := self._adapters.get(adapter.number)) is not None:
            return known
        rows = []
        for index in range(self._sizes["layers"]):
            for name in _NAMES:
                part = adapter.parts.get(f"model.layers.{index}.{name}")
                rows.append((0, 0, 0) if part is None else (part.down.data_ptr(), part.up.data_ptr(), len(part.down)))
        return torch.tensor(rows).view(self._sizes["layers"], len(_NAMES), 3)

    def _rooms(self, sizes: _Sizes, num_threads: int) -> dict[str, int]:
        """Where threads put what they make, in one stretch of memory that is kept; sizes in float32, on lines of 64
        bytes."""
        of_heads = self._num_kv * self._group * self._width
        num_rows, padded, most_keys = sizes.num_rows, sizes.padded, sizes.most_keys
        shared = {
            "qkv": num_rows * (of_heads + 2 * self._num_kv * self._width),
            "attended": padded * of_heads,
            "acted": padded * self._sizes["inner"],
        }
        for_adapters = _lines(3 * num_rows * sizes.most_rank)
        for_products = 2 * self._at_once * padded + for_adapters + (1 + padded) * self._sizes["width"]
        queries = -(-self._group // TOGETHER) * TOGETHER
        for_heads = 2 * queries * self._width + ROWS * (self._width + ROWS) + queries * most_keys
        own = _lines(max(for_products, for_heads))
        needed = sum(map(_lines, shared.values())) + own * num_threads + 16
        if len(self._room) < needed:
            self._room = torch.zeros(needed, dtype=torch.float32)
        place, rooms = -(-self._room.data_ptr() // 64) * 64, {}
        for name, size in shared.items():
            rooms[name] = place
            place += _lines(size) * 4
        return {**rooms, "own": place, "own_bytes": own * 4, "most_keys": most_keys}


def _lines(size: int) -> int:
    return -(-size // 16) * 16


def _fits(layer: Any, dtype: torch.dtype) -> bool:
    attn, mlp = layer.self_attn, layer.mlp
    if not isinstance(mlp, GatedMLP) or mlp.activation != "silu":
        return False
    linears = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if any(not isinstance(each, Linear) or isinstance(each, PackedLinear) or each.transposed for each in linears):
        return False
    if any(each.bias is not None for each in linears[3:]):
        return False
    tensors = list(layer.parameters())
    return fused.fits(*tensors) and all(each.dtype == dtype and each.is_contiguous() for each in tensors)


def _addresses(layer: Any) -> dict[str, int]:
    """Of a layer's weights as they are; 0 where there is none."""
    attn, mlp = layer.self_attn, layer.mlp
    found = {
        "input_norm": layer.input_layernorm.weight, "q": attn.q_proj.weight, "k": attn.k_proj.weight,
        "v": attn.v_proj.weight, "q_bias": attn.q_proj.bias, "k_bias": attn.k_proj.bias, "v_bias": attn.v_proj.bias,
        "q_norm": attn.q_norm.weight if layer.config.qk_norm else None,
        "k_norm": attn.k_norm.weight if layer.config.qk_norm else None,
        "out": attn.o_proj.weight, "mlp_norm": layer.post_attention_layernorm.weight,
        "gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight,
    }  # fmt: skip
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in found.items()}


def _addresses_of_tiles(layer: Any, products: Sequence[Product]) -> dict[str, int]:
    """Matrices that share a product follow each other."""
    attn, mlp, found = layer.self_attn, layer.mlp, {}
    together = [
        {"q": attn.q_proj, "k": attn.k_proj, "v": attn.v_proj}, {"out": attn.o_proj},
        {"gate": mlp.gate_proj, "up": mlp.up_proj}, {"down": mlp.down_proj},
    ]  # fmt: skip
    for product, linears in zip(products, together, strict=True):
        assert product.tiles is not None
        address = product.tiles.address
        for name, linear in linears.items():
            found[name] = address
            address += 2 * linear.shape[0] * linear.shape[1]
    return found


def _sides(decoder: Decoder) -> tuple[int, ...]:
    config = decoder.config
    of_heads = [config.head_dim * number for number in (config.num_attention_heads, config.num_key_value_heads)]
    return (config.hidden_size, config.intermediate_size, *of_heads)


def _block(decoder: Decoder, products: Sequence[Sequence[Product]]) -> int | None:
    """The outputs of a block of every matrix, where all can be read as tiles and have the same."""
    config = decoder.config
    tiles = [product.tiles for of_layer in products for product in of_layer]
    blocks = {None if each is None else each.outputs for each in tiles}
    sides = _sides(decoder)
    fits = config.head_dim % DEPTH == 0 and all(side % max(AT_ONCE_BY_TILES, DEPTH) == 0 for side in sides)
    few_queries = config.num_attention_heads // config.num_key_value_heads <= ROWS
    block = blocks.pop() if len(blocks) == 1 else None
    if block is None or not (fits and few_queries):
        return None
    # A matrix begins where a block does, and its part of the product is whole blocks.
    return block if all(side % block == 0 for side in sides) else None


def _give_way() -> int:
    address = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
    assert address is not None
    return address
