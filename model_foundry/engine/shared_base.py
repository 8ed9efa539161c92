"""One pass over rows of several adapters: the frozen layers multiply all rows at once, adapters each their own.

Rows of an adapter are a segment. Its part of a pass, to the last bit, is what it would be alone: the base's products
are steady (see `steady_products`), and everything else sees a segment's rows alone or is row by row. Gradients go to
the adapters directly; autograd sees the base only.

Each thread computes rows of its own with operations of one thread: hundreds of small products are not handed out and
gathered again one by one, and nobody waits for a core that a client is using. A large segment is cut into units, one
for each thread, by its own rows' lengths alone; their gradients are added in order.

It knows the native decoder and losses. It does not know model ids, optimizers, or what is done where memory runs out.

Shapes: N rows of a pass, padding included, n of a segment, D width, r rank, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from model_foundry.engine.alike_rows import AlikeRows
from model_foundry.engine.losses import CHUNK_LOGITS, Inputs, Loss, score
from model_foundry.engine.shared_head import SEGMENT_ROWS, HeadPart
from model_foundry.engine.side_by_side import even_shares, run_side_by_side, worthwhile_shares
from model_foundry.engine.steady_products import LEAST_ROWS, STEP_ROWS, Sizes, SteadyProduct, steady_pair
from model_foundry.engine.unit_adapters import (
    Adapted,
    Factors,
    Gradients,
    LargeUnit,
    SmallUnits,
    Update,
    compile_loops,
    fill,
    settle,
)
from model_foundry.errors import EngineError
from model_foundry.models.experts import ExpertMLP
from model_foundry.models.head import HeadUpdate
from model_foundry.models.language_model import LanguageModel, NativeModel, share_weights
from model_foundry.models.lora import Linear
from model_foundry.models.memory import MAX_OWN_GRADIENT_BYTES
from model_foundry.models.packed_rows import PackedRows
from model_foundry.types import Datum

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same input, in one product with all their A's."""


def adapts_whole_groups(layers: Mapping[str, Linear]) -> bool:
    """Whether of layers that read the same input all carry an adapter or none; others are not computed here."""
    adapted = {name for name, layer in layers.items() if layer.lora_A is not None}
    places = ((name.rpartition("."), group) for name in layers for group in TOGETHER)
    return all(
        len({f"{where}.{part}" in adapted for part in group}) == 1
        for (where, _, last), group in places
        if last in group
    )


class AdapterLayers:
    """An adapter's layers by their Hugging Face names, and their weights as the base's products need them.

    Call `changed` whenever the weights have.

    Attributes:
        head: what it adds to the logits.
    """

    def __init__(self, layers: Mapping[str, Linear], head: HeadUpdate | None = None) -> None:
        self._layers, self.head = layers, head
        self._adapted: dict[tuple[str, ...], Adapted | None] = {}
        self._ready: dict[tuple[str, ...], Factors] = {}
        self._head_factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._is_stale = False

    def changed(self) -> None:
        self._is_stale = True

    @staticmethod
    def refresh(every: Iterable[AdapterLayers], dtype: torch.dtype) -> None:
        """Read the weights again where they have changed; before threads use them."""
        every = list(every)
        stale = [each for each in every if each._is_stale]
        fill(factors for each in stale for factors in each._ready.values())
        for each in stale:
            each._head_factors, each._is_stale = None, False
        for each in every:
            if each.head is not None and each._head_factors is None:
                each._head_factors = each.head.factors(dtype)

    @property
    def num_parameters(self) -> int:
        layers = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in self._layers.values()
                     if layer.lora_A is not None and layer.lora_B is not None)  # fmt: skip
        return layers + (0 if self.head is None else self.head.down.numel() + self.head.up.numel())

    def adapted(self, names: tuple[str, ...]) -> Adapted | None:
        """Layers that read the same input; None where they carry no adapter."""
        if names not in self._adapted:
            self._adapted[names] = Adapted.of([self._layers[name] for name in names])
        return self._adapted[names]

    def factors(self, names: tuple[str, ...], dtype: torch.dtype) -> Factors:
        """Of layers that carry one."""
        if names not in self._ready:
            adapted = self.adapted(names)
            assert adapted is not None
            self._ready[names] = Factors.of(adapted, dtype)
        return self._ready[names]

    def head_part(self, *, backward: bool) -> HeadPart | None:
        """Of one unit, after `refresh`; None where the head carries no adapter."""
        if self.head is None:
            return None
        assert self._head_factors is not None
        return HeadPart.of(self.head, self._head_factors, backward=backward)


@dataclass(frozen=True, slots=True)
class Segment:
    """One adapter's rows of a pass."""

    adapter: AdapterLayers
    data: Sequence[Datum]
    loss: Loss


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """loss: float64 sum; logprobs: float32 by row, of every token."""

    loss: float
    logprobs: list[np.ndarray]


@dataclass(slots=True)
class _Unit:
    """Rows of a segment that one thread computes.

    Attributes:
        number: the segment.
        rows: of the segment.
        kept: (gradient buffer, what is to be added) of a segment with several units; None: it is added at once.
    """

    number: int
    rows: list[int]
    segment: Segment
    kept: Gradients | None
    loss: float = 0.0
    logprobs: list[np.ndarray] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(datum.num_tokens for datum in self.segment.data)


class _Work(threading.local):
    """The pass at hand, of each thread its own: where each unit's rows are."""

    places: tuple[tuple[slice, _Unit], ...] = ()


class SharedBase:
    """A frozen base that passes of several adapters share.

    Args:
        base: the native decoder without an adapter; its weights are shared, and in bfloat16 on a CPU the linear layers
            are kept twice more, in the order of the kernels.

    Raises:
        EngineError: this base, device or number of threads is not computed so.
    """

    def __init__(self, base: LanguageModel, *, device: torch.device) -> None:
        if (obstacle := _obstacle(base, device)) is not None:
            raise EngineError(obstacle)
        assert isinstance(base, NativeModel)
        model = share_weights(base)
        assert isinstance(model, NativeModel)
        self.decoder, self.device = model.decoder, device
        self._work = _Work()
        self.num_threads = torch.get_num_threads()
        self._names: dict[Linear, str] = {}
        self._products: dict[str, tuple[SteadyProduct, SteadyProduct]] = {}
        known: dict[tuple[int, int, str], Sizes] = {}
        for name, layer in self.decoder.linears().items():
            if layer.is_head:
                continue
            assert isinstance(layer, Linear)
            self._names[layer], layer.together = name, self._project
            self._products[name] = steady_pair(layer.matrix.detach(), layer.bias, known)
        self._head = steady_pair(self.decoder.head_weight.detach().to(self.decoder.compute_dtype), None, known)
        self._alike = AlikeRows(self.decoder.config, dtype=self.decoder.compute_dtype, device=device)
        # What a pass begins with: its gradient is asked for, so that the layers' backward passes are run.
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._on_threads([self._try, *([_nothing] * (self.num_threads - 1))])
        compile_loops(self.decoder.compute_dtype)

    def _try(self) -> None:
        """Raises EngineError where this machine's products cannot be relied on; every shape once."""
        every = (product for pair in (*self._products.values(), self._head) for product in pair)
        for product in {product.sizes: product for product in every}.values():
            # Every number of rows is made of these two.
            for num_rows in (LEAST_ROWS, LEAST_ROWS + STEP_ROWS):
                product.try_rows(num_rows)

    def run(self, segments: Sequence[Segment], *, backward: bool) -> list[SegmentResult]:
        """One pass; with `backward`, gradients are added to the adapters' own. No adapter may come twice."""
        units: list[_Unit] = []
        AdapterLayers.refresh((segment.adapter for segment in segments), self.decoder.compute_dtype)
        for number, segment in enumerate(segments):
            units += _units(number, segment, self.num_threads)
        shares = even_shares([unit.num_tokens for unit in units], self.num_threads)
        self._on_threads(
            [partial(self._pass, [units[place] for place in share], backward=backward) for share in shares]
        )
        for unit in units:
            for buffer, gradient in unit.kept or ():
                buffer.add_(gradient)
        return [_joined(segment, [u for u in units if u.number == number]) for number, segment in enumerate(segments)]

    def _on_threads(self, tasks: Sequence[Callable[[], None]]) -> None:
        if self.num_threads == 1:
            for task in tasks:
                task()
        else:
            run_side_by_side(tasks)

    def _pass(self, units: Sequence[_Unit], *, backward: bool) -> None:
        """One thread's rows."""
        if not units:
            return
        # Neighbours that are alike are computed in one call.
        units = sorted(units, key=lambda unit: [datum.num_tokens for datum in unit.segment.data])
        packed = [_packed(unit.segment.data, self.device) for unit in units]
        sizes = [int(tokens.shape[0]) for tokens, _ in packed]
        if (spare := max(LEAST_ROWS - sum(sizes), -sum(sizes) % STEP_ROWS)) > 0:
            packed.append((torch.zeros(spare, dtype=torch.int64), PackedRows.of([spare])))
        ends = np.cumsum([0, *sizes]).tolist()
        self._work.places = tuple(zip([slice(*pair) for pair in pairwise(ends)], units, strict=True))
        try:
            with torch.set_grad_enabled(backward):
                hidden = self.decoder(
                    torch.cat([tokens for tokens, _ in packed]),
                    PackedRows.joined([rows for _, rows in packed], alike=self._alike),
                )
            gradient = self._heads(hidden.detach(), backward=backward)
            if gradient is not None:
                hidden.backward(gradient)
        finally:
            self._work.places = ()

    @torch.no_grad()
    def _heads(self, hidden: torch.Tensor, *, backward: bool) -> torch.Tensor | None:
        """The losses of all units, some rows of logits at a time, and the gradient of the hidden states."""
        there, back = self._head
        places = self._work.places
        inputs = [_inputs(unit.segment, self.device) for _, unit in places]
        gradient = torch.zeros_like(hidden) if backward else None
        adapted = [unit.segment.adapter.head_part(backward=backward) for _, unit in places]
        values = [torch.zeros_like(each["target_tokens"], dtype=torch.float32) for each in inputs]
        logprobs = [torch.zeros_like(value) for value in values]
        for first, last in self._chunks(hidden.shape[0]):
            logits = there(hidden[first:last])
            within = [slice(max(place.start, first), min(place.stop, last)) for place, _ in places]
            parts = [
                (part, rows) for part, rows in zip(adapted, within, strict=True) if part and rows.stop > rows.start
            ]
            for part, rows in parts:
                part.add(logits[rows.start - first : rows.stop - first], hidden[rows])
            d_logits = torch.zeros_like(logits) if backward else None
            for number, (place, unit) in enumerate(places):
                size = int(inputs[number]["target_tokens"].shape[0])
                begin, end = max(place.start, first), min(place.start + size, last)
                if begin >= end:
                    continue
                part, own = slice(begin - first, end - first), slice(begin - place.start, end - place.start)
                chunk = {name: value[own] for name, value in inputs[number].items()}
                scored = score(logits[part], unit.segment.loss, chunk, backward=backward)
                values[number][own], logprobs[number][own] = scored.values, scored.logprobs
                if d_logits is not None and scored.d_logits is not None:
                    d_logits[part] = scored.d_logits
            if gradient is not None and d_logits is not None:
                gradient[first:last] = back(d_logits)
                for part, rows in parts:
                    part.back(d_logits[rows.start - first : rows.stop - first], hidden[rows], gradient[rows])
        for (_, unit), value, logprob in zip(places, values, logprobs, strict=True):
            unit.loss, unit.logprobs = float(value.double().sum()), _by_row(logprob, unit.segment.data)
        if backward:
            for part, (_, unit) in zip(adapted, places, strict=True):
                if part is not None:
                    part.settle(partial(settle, kept=unit.kept))
        return gradient

    def _chunks(self, num_rows: int) -> list[tuple[int, int]]:
        """Rows whose logits exist at once: multiples of 64, and at the end not fewer."""
        # All threads together have as many as one pass elsewhere.
        most = CHUNK_LOGITS // self.num_threads // self.decoder.config.vocab_size
        step = max(LEAST_ROWS, most // LEAST_ROWS * LEAST_ROWS)
        bounds = list(range(0, num_rows, step))
        if num_rows - bounds[-1] < LEAST_ROWS and len(bounds) > 1:
            bounds.pop()
        return list(zip(bounds, [*bounds[1:], num_rows], strict=True))

    def _project(self, x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]:
        names = tuple(self._names[layer] for layer in layers)
        products = [self._products[name] for name in names]
        updates = self._updates(x, names)
        if torch.is_grad_enabled():
            return _Project.apply(x, self._anchor, products, updates)  # pyright: ignore[reportReturnType]
        return _forward(x, products, updates)[0]

    def _updates(self, x: torch.Tensor, names: tuple[str, ...]) -> list[Update]:
        """What this thread's units add to layers that read x."""
        small: list[tuple[slice, Adapted]] = []
        large: list[Update] = []
        for rows, unit in self._work.places:
            adapter = unit.segment.adapter
            if (adapted := adapter.adapted(names)) is None:
                continue
            if unit.kept is None and adapted.goes_by_loop(rows.stop - rows.start):
                small.append((rows, adapted))
            else:
                large.append(LargeUnit(rows, adapter.factors(names, x.dtype), unit.kept))
        return [SmallUnits(small), *large] if small else large


_Products = Sequence[tuple[SteadyProduct, SteadyProduct]]


def _forward(
    x: torch.Tensor, products: _Products, updates: Sequence[Update]
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """One [N, out] a layer, and what every update needs again."""
    outs = tuple(there(x) for there, _ in products)
    return outs, [update.forward(x, outs) for update in updates]


class _Project(torch.autograd.Function):
    """Layers that read the same input, under all segments' adapters, whose gradients it adds by itself."""

    @staticmethod
    def forward(ctx: Any, x: Any, anchor: Any, products: Any, updates: Any) -> Any:
        outs, lows = _forward(x, products, updates)
        ctx.save_for_backward(x, *lows)
        ctx.products, ctx.updates = products, updates
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *lows = ctx.saved_tensors
        grads, dx = tuple(grad.contiguous() for grad in grads), None
        if ctx.needs_input_grad[0]:
            for grad, (_, back) in zip(grads, ctx.products, strict=True):
                dx = back(grad) if dx is None else dx.add_(back(grad))
        for update, low in zip(ctx.updates, lows, strict=True):
            update.backward(x, low, grads, dx)
        return dx, None, None, None


def _units(number: int, segment: Segment, num_threads: int) -> list[_Unit]:
    """A segment's rows as one unit, or one for each thread where all are large; by its own lengths and size alone."""
    shares = worthwhile_shares([datum.num_tokens for datum in segment.data], num_threads)
    if shares is None or 4 * segment.adapter.num_parameters * num_threads > MAX_OWN_GRADIENT_BYTES:
        return [_Unit(number, list(range(len(segment.data))), segment, None)]
    return [_Unit(number, share, replace(segment, data=[segment.data[row] for row in share]), []) for share in shares]


def _joined(segment: Segment, units: Sequence[_Unit]) -> SegmentResult:
    logprobs = {row: found for unit in units for row, found in zip(unit.rows, unit.logprobs, strict=True)}
    return SegmentResult(sum(unit.loss for unit in units), [logprobs[row] for row in range(len(segment.data))])


def _packed(data: Sequence[Datum], device: torch.device) -> tuple[torch.Tensor, PackedRows]:
    """A segment's tokens, int64 [n], and where its rows are; what fills it up is a part of the last row, at its end."""
    lengths = [datum.num_tokens for datum in data]
    spare = -sum(lengths) % SEGMENT_ROWS
    tokens = np.concatenate([*(datum.tokens for datum in data), np.zeros(spare, dtype=np.int32)])
    lengths[-1] += spare
    return torch.from_numpy(tokens.astype(np.int64)).to(device), PackedRows.of(lengths, device)


def _inputs(segment: Segment, device: torch.device) -> Inputs:
    inputs = {
        name: torch.from_numpy(np.concatenate([datum.loss_inputs[name] for datum in segment.data])).to(device)
        for name in segment.loss.inputs
    }
    return {**inputs, "target_tokens": inputs["target_tokens"].long()}


def _by_row(logprobs: torch.Tensor, data: Sequence[Datum]) -> list[np.ndarray]:
    ends = np.cumsum([datum.num_tokens for datum in data])[:-1]
    return np.split(logprobs.cpu().numpy(), ends)


def _obstacle(base: LanguageModel, device: torch.device) -> str | None:
    """Why passes over this base cannot be shared."""
    if not isinstance(base, NativeModel):
        return "transformers runs this model"
    decoder = base.decoder
    if base.quantization != "none":
        return f"{base.quantization} weights would be kept unpacked"
    if device.type != "cpu":
        return f"rows that are the same bits in every company are had on a CPU, and this is {device.type}"
    if decoder.compute_dtype == torch.float16:
        return "gradients in float16 are scaled, by each model's own number"
    if any(isinstance(module, ExpertMLP) for module in decoder.modules()):
        return "a router sends its rows to experts"
    if decoder.config.dropout or decoder.config.attention_dropout:
        return "config.json asks for dropout"
    return None


def _nothing() -> None:
    """What the other threads do meanwhile."""
