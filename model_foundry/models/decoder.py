"""The native decoder of the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM, and Qwen3-MoE.

It reads and writes Hugging Face tensor names, takes packed rows of tokens, and stops at the last hidden state: who
needs logits computes the head where a loss is due. It knows nothing of losses, optimizers or text.

Shapes: N packed tokens, D width, H heads, K key/value heads, V vocabulary, B sequences being decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.models.attention import Attention, attend_packed, choose_attention, rotate
from model_foundry.models.balance import RouterBalance
from model_foundry.models.config import HEAD_LAYER, ModelConfig
from model_foundry.models.experts import ExpertMLP
from model_foundry.models.head import HeadLayer
from model_foundry.models.lora import Adaptable, Linear, project
from model_foundry.models.mlp import GatedMLP
from model_foundry.models.norm import RMSNorm, add_and_norm
from model_foundry.models.packed_rows import PackedRows
from model_foundry.models.packing import PackedLinear, PackedStack, Packing, ParameterMaker
from model_foundry.models.randomness import AttentionDropout, DropoutCounter, drop, salt
from model_foundry.models.rope import rope_frequencies

SHAPE_TOKENS = 32
"""On a CPU, sizes come in multiples of this: for every number of tokens it meets, oneDNN compiles kernels and keeps
them, 20 MB for a model of 30 layers."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [N, H, D], k [N, K, D], v [N, K, D], not yet rotated) → [N, H, D]."""
Thin = Callable[[torch.Tensor, str], torch.Tensor]
"""Residual dropout: (x [N, D], name of its place) → [N, D]."""


class DecoderLayer(nn.Module):
    """Pre-norm attention and a gated MLP, or experts. Parameter names are those of a Hugging Face folder.

    Args:
        make: makes parameters by their full names.
    """

    def __init__(self, config: ModelConfig, index: int, make: ParameterMaker) -> None:
        super().__init__()
        self.index, self.config = index, config
        prefix = f"model.layers.{index}."

        def linear(name: str) -> Linear:
            return make.linear(f"{prefix}{name}", has_bias=config.has_bias(name))

        def norm(name: str) -> RMSNorm:
            return RMSNorm(make.tensor(f"{prefix}{name}.weight"), config.rms_norm_eps)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, linear(f"self_attn.{name}"))
        if config.qk_norm:
            self.self_attn.add_module("q_norm", norm("self_attn.q_norm"))
            self.self_attn.add_module("k_norm", norm("self_attn.k_norm"))
        self.post_attention_layernorm = norm("post_attention_layernorm")
        if config.experts is not None and config.is_sparse(index):
            mixture, place = config.experts, f"{prefix}mlp."
            self.mlp = ExpertMLP(
                mixture, config.hidden_act, make.router(f"{place}gate"),
                lambda name: make.stack(f"{place}experts", name, mixture.num_experts),
            )  # fmt: skip
        else:
            self.mlp = GatedMLP(config.hidden_act, lambda name: linear(f"mlp.{name}"))

    def forward(self, x: torch.Tensor, attend: Attend, thin: Thin) -> torch.Tensor:
        """x [N, D] → [N, D]."""
        attn: Any = self.self_attn
        width = self.config.head_dim
        h = self.input_layernorm(x)
        q, k, v = (y.view(y.shape[0], -1, width) for y in project(h, (attn.q_proj, attn.k_proj, attn.v_proj)))
        if self.config.qk_norm:
            q, k = attn.q_norm(q), attn.k_norm(k)
        more = thin(attn.o_proj(attend(self.index, q, k, v).reshape(x.shape[0], -1)), f"{self.index}.self_attn")
        x, h = add_and_norm(x, more, self.post_attention_layernorm)
        return x + thin(self.mlp(h), f"{self.index}.mlp")


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape.
        tensors: weights by Hugging Face name, any float type; taken one after the other and not kept.
        dtype: compute type.
        packing: keep the linear layers but head and routers packed in fewer bits; they cannot be trained then.
        where: the folder, for errors.

    Attributes:
        attention: back end, see `attention.choose_attention`.
        compiled_layers: the layers as training passes compute them, see `compiled`; empty: as they are.
        attend: `attend_packed`, or a form of it that a compiler goes around.
        counter: what dropout masks are drawn by in training; None where nothing is dropped.
        balance: the load-balancing loss, where the model has one.

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
        packing: Packing | None = None,
        where: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, dtype
        self.gradient_checkpointing = False
        self.compiled_layers: list[Any] = []
        self.attend: Callable[..., torch.Tensor] = attend_packed
        self.attention: Attention = choose_attention("auto", torch.device(device), dtype).chosen
        self.counter: DropoutCounter | None = None
        make = ParameterMaker(expected_shapes(config), dtype, torch.device(device), packing)
        self.embed_tokens = nn.Parameter(make.tensor("model.embed_tokens.weight"), requires_grad=False)
        self.layers = nn.ModuleList([DecoderLayer(config, index, make) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(make.tensor("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Parameter(make.tensor("lm_head.weight"), requires_grad=False)
        self.head_layer = HeadLayer((config.vocab_size, config.hidden_size), torch.device(device))
        self._fill(tensors, where)
        frequencies, self.rope_gain = rope_frequencies(config)
        self.frequencies = frequencies.to(device)
        self.balance = self._balanced()

    def _balanced(self) -> RouterBalance | None:
        mixture, blocks = self.config.experts, [m for m in self.modules() if isinstance(m, ExpertMLP)]
        if mixture is None or not blocks or not mixture.balance_coefficient:
            return None
        balance = RouterBalance(
            mixture.balance_coefficient, num_experts=mixture.num_experts, num_layers=len(blocks)
        )  # fmt: skip
        for block in blocks:
            block.balance = balance
        return balance

    @torch.no_grad()
    def _fill(self, tensors: Iterable[tuple[str, torch.Tensor]], where: str | None) -> None:
        """Copy every weight in."""
        slots = self._slots()
        left: list[str] = []
        filled: set[str] = set()
        tied_head = None
        for name, tensor in tensors:
            if name == "lm_head.weight" and self.lm_head is None:
                tied_head = tensor
            elif name not in slots:
                left += [] if name.endswith("rotary_emb.inv_freq") else [name]
            elif tuple(tensor.shape) != slots[name][0]:
                what = f"{name} has shape {tuple(tensor.shape)}; config.json asks for {slots[name][0]}"
                raise ArchitectureMismatchError(what, where=where)
            else:
                slots[name][1](tensor)
                filled.add(name)
        if tied_head is not None and "model.embed_tokens.weight" not in filled:
            # Old folders store the shared matrix under the head's name alone.
            self.embed_tokens.copy_(tied_head)
            filled.add("model.embed_tokens.weight")
        missing = [name for name in slots if name not in filled]
        if missing:
            raise ArchitectureMismatchError(f"the weights lack the tensor {missing[0]}", where=where)
        if tied_head is not None:
            _check_tied_head(tied_head, self.embed_tokens, where)
        if left:
            what = f"the weights hold {len(left)} tensors that the model lacks, {left[0]} first"
            raise ArchitectureMismatchError(what, where=where)

    def _slots(self) -> dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], object]]]:
        """By Hugging Face name: the shape a stored tensor must have, and what to do with it."""
        slots: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], object]]] = {}
        for name, tensor in self.weights():
            slots[name] = (tuple(tensor.shape), tensor.copy_)
        for name, module in self.named_modules():
            if isinstance(module, PackedLinear):
                slots[f"model.{name}.weight"] = (module.shape, module.pack)
            elif isinstance(module, PackedStack):
                for expert in range(module.shape[0]):
                    slots[_of_expert(f"model.{name}.weight", expert)] = (module.shape[1:], partial(module.pack, expert))
        return slots

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, D]; the embedding itself where they are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def linears(self) -> dict[str, Adaptable]:
        """Every layer that can carry an adapter, by its full Hugging Face name (without `.weight`)."""
        found: dict[str, Adaptable] = {}
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                found[f"model.{name}"] = module
            elif isinstance(module, ExpertMLP):
                found |= {f"model.{name}.{part}": layer for part, layer in module.expert_linears()}
        return {**found, HEAD_LAYER: self.head_layer}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The base weights by Hugging Face name, experts one by one; packed ones are left out."""
        for name, parameter, expert in self.named_weights():
            yield name, parameter.detach() if expert is None else parameter.detach()[expert]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """(Hugging Face name, the parameter that holds it, its number in a stack of experts)."""
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                continue
            if name == "embed_tokens":
                yield "model.embed_tokens.weight", parameter, None
            elif name == "lm_head":
                yield "lm_head.weight", parameter, None
            elif parameter.ndim == 3:
                yield from ((_of_expert(f"model.{name}", each), parameter, each) for each in range(parameter.shape[0]))
            else:
                yield f"model.{name}", parameter, None

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(cos, sin) for queries, with the attention scale 1/√D in them, and for keys: [N, 1, D / 2]."""
        angles = positions.float()[:, None] * self.frequencies[None, :]
        cos, sin = angles.cos().mul_(self.rope_gain)[:, None], angles.sin().mul_(self.rope_gain)[:, None]
        scale = 1.0 / math.sqrt(self.config.head_dim)
        return tuple(part.to(self.compute_dtype) for part in (cos * scale, sin * scale, cos, sin))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.embed_tokens).to(self.compute_dtype)

    @property
    def drops(self) -> bool:
        """Whether a training pass drops anything, by the model's own rates or its adapters'."""
        own = self.config.dropout or self.config.attention_dropout
        return bool(own) or any(isinstance(module, Linear) and module.dropout for module in self.modules())

    def forward(self, tokens: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Last hidden states [N, D], after the final norm, of packed tokens int64 [N]."""
        rope = self.rope(rows.positions)
        thin = self._thin if self.training and self.config.dropout else keep_all

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.attend(
                q, k, v, rope, rows, self.config.window(layer),
                backend=self.attention, dropout=self._attention_dropout(layer),
            )  # fmt: skip

        x = thin(self.embed(tokens), "embed_tokens")
        layers = self.compiled_layers if self.training and self.compiled_layers else self.layers
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Re-entrant checkpointing needs an input that asks for gradients; this form does not.
            for layer in layers:
                x = checkpoint(layer, x, attend, thin, use_reentrant=False)
        else:
            for layer in layers:
                x = layer(x, attend, thin)
        return self.norm(x)  # pyright: ignore[reportReturnType]

    def _thin(self, x: torch.Tensor, place: str) -> torch.Tensor:
        return drop(x, self.config.dropout, self.counter, salt(place), field="dropout in config.json")

    def _attention_dropout(self, layer: int) -> AttentionDropout | None:
        rate = self.config.attention_dropout
        if not (self.training and rate):
            return None
        if self.counter is None:
            raise ModelError("dropout was asked for on a batch whose rows are not known", hint="Use model.eval().")
        return AttentionDropout(rate, self.counter, salt(f"{layer}.attention"))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[.., V] in the compute type."""
        logits = functional.linear(hidden, self.head_weight.to(hidden.dtype))
        update = self.head_layer.update
        return logits if update is None else update.add(logits, hidden)


def keep_all(x: torch.Tensor, place: str) -> torch.Tensor:
    """No residual dropout."""
    return x


def _of_expert(name: str, number: int) -> str:
    """`…experts.up_proj.weight`, the name of a stack, as the file's name of one expert: `…experts.3.up_proj.weight`."""
    before, projection, last = name.rsplit(".", 2)
    return f"{before}.{number}.{projection}.{last}"


def fill_up(
    rows: Sequence[torch.Tensor], device: torch.device, branches: Sequence[tuple[int, ...]] = ()
) -> tuple[torch.Tensor, PackedRows]:
    """Pack rows; on a CPU up to a multiple of SHAPE_TOKENS, by a last row that nobody reads."""
    lengths, parts, forks = [int(row.shape[0]) for row in rows], list(rows), list(branches)
    spare = -sum(lengths) % SHAPE_TOKENS if device.type == "cpu" else 0
    if spare:
        lengths.append(spare)
        parts.append(torch.zeros(spare, dtype=torch.int64))
        forks += [()] if forks else []
    return torch.cat(parts), PackedRows.of(lengths, device, forks)


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
        x = layer(x, attend, keep_all)
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
        x = layer(x, attend, keep_all)
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
        for name, (num_out, num_in) in config.layer_linears(index).items():
            shapes[f"{prefix}{name}.weight"] = (num_out, num_in)
            if config.has_bias(name):
                shapes[f"{prefix}{name}.bias"] = (num_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (config.hidden_size,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes
