"""The native decoder of the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM.

It reads and writes Hugging Face tensor names, takes packed rows of tokens, and stops at the last hidden state: who
needs logits computes the head where a loss is due. It knows nothing of losses, optimizers or text.

Shapes: N packed tokens, D width, H heads, K key/value heads, V vocabulary, B sequences being decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model_foundry.errors import ArchitectureMismatchError
from model_foundry.models.attention import PackedRows, attend_packed, rotate
from model_foundry.models.config import ModelConfig
from model_foundry.models.lora import Linear, project
from model_foundry.models.rope import rope_frequencies

SHAPE_TOKENS = 32
"""On a CPU, sizes come in multiples of this: for every number of tokens it meets, oneDNN compiles kernels and keeps
them, 20 MB for a model of 30 layers."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [N, H, D], k [N, K, D], v [N, K, D], not yet rotated) → [N, H, D]."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) × weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """Saves its input alone; the normalised value is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return (x * _inverse_rms(x, eps)).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        inverse = _inverse_rms(x, ctx.eps)
        normed = x * inverse
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = grad * weight.to(x.dtype)
        shared = (scaled * normed).mean(-1, keepdim=True)
        return normed.mul_(-shared).add_(scaled).mul_(inverse).to(x.dtype), d_weight, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[.., 1], float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _GatedSilu(torch.autograd.Function):
    """silu(gate) × up (Shazeer 2020), keeping only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        d_up = functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


class DecoderLayer(nn.Module):
    """Pre-norm attention and a gated MLP. Parameter names are those of a Hugging Face folder."""

    def __init__(self, config: ModelConfig, index: int, take: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self.index, self.config = index, config
        prefix = f"model.layers.{index}."

        def linear(name: str) -> Linear:
            bias = take(f"{prefix}{name}.bias") if config.has_bias(name) else None
            return Linear(take(f"{prefix}{name}.weight"), bias)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(take(f"{prefix}{name}.weight"), config.rms_norm_eps)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, linear(f"self_attn.{name}"))
        if config.qk_norm:
            self.self_attn.add_module("q_norm", norm("self_attn.q_norm"))
            self.self_attn.add_module("k_norm", norm("self_attn.k_norm"))
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = nn.Module()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.mlp.add_module(name, linear(f"mlp.{name}"))

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """x [N, D] → [N, D]."""
        attn: Any = self.self_attn
        width = self.config.head_dim
        h = self.input_layernorm(x)
        q, k, v = (y.view(y.shape[0], -1, width) for y in project(h, (attn.q_proj, attn.k_proj, attn.v_proj)))
        if self.config.qk_norm:
            q, k = attn.q_norm(q), attn.k_norm(k)
        x = x + attn.o_proj(attend(self.index, q, k, v).reshape(x.shape[0], -1))
        mlp: Any = self.mlp
        gate, up = project(self.post_attention_layernorm(x), (mlp.gate_proj, mlp.up_proj))
        if self.config.hidden_act == "silu":
            inner = _GatedSilu.apply(gate, up)
        else:
            inner = ACTIVATIONS[self.config.hidden_act](gate) * up
        return x + mlp.down_proj(inner)


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape.
        tensors: weights by Hugging Face name, any float type; taken one after the other and not kept.
        dtype: compute type.
        where: the folder, for errors.

    Raises:
        ArchitectureMismatchError: a tensor is missing, left over, or of another shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        where: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, dtype
        self.gradient_checkpointing = False
        shapes = expected_shapes(config)

        def take(name: str) -> torch.Tensor:
            return torch.empty(shapes[name], dtype=dtype, device=device)

        self.embed_tokens = nn.Parameter(take("model.embed_tokens.weight"), requires_grad=False)
        self.layers = nn.ModuleList([DecoderLayer(config, index, take) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(take("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(take("lm_head.weight"), requires_grad=False)
        self._fill(tensors, where)
        frequencies, self.rope_gain = rope_frequencies(config)
        self.frequencies = frequencies.to(device)

    @torch.no_grad()
    def _fill(self, tensors: Iterable[tuple[str, torch.Tensor]], where: str | None) -> None:
        """Copy every weight in."""
        mine = dict(self.weights())
        left: list[str] = []
        filled: set[str] = set()
        tied_head = None
        for name, tensor in tensors:
            if name == "lm_head.weight" and self.lm_head is None:
                tied_head = tensor
            elif name not in mine:
                left += [] if name.endswith("rotary_emb.inv_freq") else [name]
            elif tensor.shape != mine[name].shape:
                what = f"{name} has shape {tuple(tensor.shape)}; config.json asks for {tuple(mine[name].shape)}"
                raise ArchitectureMismatchError(what, where=where)
            else:
                mine[name].copy_(tensor)
                filled.add(name)
        if tied_head is not None and "model.embed_tokens.weight" not in filled:
            # Old folders store the shared matrix under the head's name alone.
            self.embed_tokens.copy_(tied_head)
            filled.add("model.embed_tokens.weight")
        missing = [name for name in mine if name not in filled]
        if missing:
            raise ArchitectureMismatchError(f"the weights lack the tensor {missing[0]}", where=where)
        if tied_head is not None:
            _check_tied_head(tied_head, self.embed_tokens, where)
        if left:
            what = f"the weights hold {len(left)} tensors that the model lacks, {left[0]} first"
            raise ArchitectureMismatchError(what, where=where)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D]; the embedding itself where they are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def linears(self) -> dict[str, Linear]:
        """Every layer that can carry an adapter, by its full Hugging Face name (without `.weight`)."""
        return {f"model.{name}": m for name, m in self.named_modules() if isinstance(m, Linear)}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base weights by Hugging Face name."""
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                continue
            if name == "embed_tokens":
                name = "model.embed_tokens.weight"
            elif name == "lm_head":
                name = "lm_head.weight"
            else:
                name = f"model.{name}"
            yield name, parameter.detach()

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(cos, sin) for queries, with the attention scale 1/√D in them, and for keys: [N, 1, D / 2]."""
        angles = positions.float()[:, None] * self.frequencies[None, :]
        cos, sin = angles.cos().mul_(self.rope_gain)[:, None], angles.sin().mul_(self.rope_gain)[:, None]
        scale = 1.0 / math.sqrt(self.config.head_dim)
        return tuple(part.to(self.compute_dtype) for part in (cos * scale, sin * scale, cos, sin))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.embed_tokens).to(self.compute_dtype)

    def forward(self, tokens: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Last hidden states [N, D], after the final norm, of packed tokens int64 [N]."""
        rope = self.rope(rows.positions)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_packed(q, k, v, rope, rows, self.config.window(layer))

        x = self.embed(tokens)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Re-entrant checkpointing needs an input that asks for gradients; this form does not.
            for layer in self.layers:
                x = checkpoint(layer, x, attend, use_reentrant=False)
        else:
            for layer in self.layers:
                x = layer(x, attend)
        return self.norm(x)  # pyright: ignore[reportReturnType]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[.., V] in the compute type."""
        return functional.linear(hidden, self.head_weight.to(hidden.dtype))


def fill_up(rows: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, PackedRows]:
    """Pack rows; on a CPU up to a multiple of SHAPE_TOKENS, by a last row that nobody reads."""
    lengths, parts = [int(row.shape[0]) for row in rows], list(rows)
    spare = -sum(lengths) % SHAPE_TOKENS if device.type == "cpu" else 0
    if spare:
        lengths.append(spare)
        parts.append(torch.zeros(spare, dtype=torch.int64))
    return torch.cat(parts), PackedRows.of(lengths, device)


class KeyValueCache:
    """Keys (rotated) and values of B sequences, right-padded: [layers][B, capacity, K, D]; `lengths` int64 [B]."""

    def __init__(self, model: Decoder, num_sequences: int, capacity: int) -> None:
        config = model.config
        shape = (num_sequences, capacity, config.num_key_value_heads, config.head_dim)
        device = model.embed_tokens.device
        self.keys = [torch.zeros(shape, dtype=model.compute_dtype, device=device) for _ in model.layers]
        self.values = [torch.zeros(shape, dtype=model.compute_dtype, device=device) for _ in model.layers]
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64, device=device)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these sequences only (int64 indices)."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]


@torch.no_grad()
def prefill(model: Decoder, prompts: list[torch.Tensor], cache: KeyValueCache) -> torch.Tensor:
    """Read the prompts (int64 [T_i]) into an empty cache; the hidden state [B, D] of each one's last token."""
    device = model.embed_tokens.device
    lengths = [int(p.shape[0]) for p in prompts]
    tokens, rows = fill_up(prompts, device)
    rope = model.rope(rows.positions)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rotated, start = rotate(k, rope[2], rope[3]), 0
        for row, length in enumerate(lengths):
            cache.keys[layer][row, :length] = rotated[start : start + length]
            cache.values[layer][row, :length] = v[start : start + length]
            start += length
        return attend_packed(q, k, v, rope, rows, model.config.window(layer))

    x = model.embed(tokens)
    for layer in model.layers:
        x = layer(x, attend)
    cache.lengths += torch.tensor(lengths, device=device)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.norm(x[ends])


@torch.no_grad()
def decode_step(model: Decoder, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """Append one token to each sequence (int64 [B]); the hidden state [B, D] after it."""
    rope = model.rope(cache.lengths)
    # Sizes in steps, as in `fill_up`; what lies beyond a sequence's end is masked.
    size = -(-(int(cache.lengths.max()) + 1) // SHAPE_TOKENS) * SHAPE_TOKENS
    size = min(size, cache.keys[0].shape[1])
    place = torch.arange(size, device=tokens.device)[None, :]
    batch = torch.arange(tokens.shape[0], device=tokens.device)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache.keys[layer][batch, cache.lengths] = rotate(k, rope[2], rope[3])
        cache.values[layer][batch, cache.lengths] = v
        seen = place <= cache.lengths[:, None]
        window = model.config.window(layer)
        if window is not None:
            seen = seen & (place > cache.lengths[:, None] - window)
        keys = cache.keys[layer][:, :size].transpose(1, 2)
        values = cache.values[layer][:, :size].transpose(1, 2)
        grouped = rotate(q, rope[0], rope[1]).view(q.shape[0], keys.shape[1], -1, q.shape[2])
        scores = grouped @ keys.transpose(2, 3)
        scores.masked_fill_(~seen[:, None, None, :], float("-inf"))
        return (torch.softmax(scores, dim=-1) @ values).view(q.shape)

    x = model.embed(tokens)
    for layer in model.layers:
        x = layer(x, attend)
    cache.lengths += 1
    return model.norm(x)


def _check_tied_head(head: torch.Tensor, embedding: torch.Tensor, where: str | None) -> None:
    """Some folders store a tied matrix twice. A head of its own values is not tied to the embedding."""
    if not torch.equal(embedding, head.to(embedding.dtype)):
        raise ArchitectureMismatchError(
            "lm_head.weight differs from the embedding that config.json ties it to",
            where=where,
            hint="Set tie_word_embeddings to false in config.json.",
        )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its Hugging Face name."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name, (num_out, num_in) in config.layer_linears.items():
            shapes[f"{prefix}{name}.weight"] = (num_out, num_in)
            if config.has_bias(name):
                shapes[f"{prefix}{name}.bias"] = (num_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (config.hidden_size,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes
