"""The dense decoder of the Llama family on MLX: Llama, Mistral, Qwen2, Qwen3, SmolLM, with LoRA and DoRA.

The same functions as `models.decoder`, written for a library whose arrays never change: weights stand in a dict by the
names that they have in the files, and what is trained is handed in with each pass, so that MLX can differentiate by it.

Shapes: N packed tokens, D width, H heads, K key/value heads, V vocabulary, B sequences, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch

from model_foundry.engine.mlx_arrays import to_mlx, to_torch
from model_foundry.errors import ArchitectureMismatchError
from model_foundry.models.adapter import PREFIX
from model_foundry.models.config import ModelConfig
from model_foundry.models.decoder import expected_shapes
from model_foundry.models.lora import fresh_A
from model_foundry.models.randomness import DropoutCounter, drop, salt
from model_foundry.models.rope import rope_frequencies
from model_foundry.types import LoraConfig

Weights = Mapping[str, mx.array]
Attend = Callable[[int, mx.array, mx.array, mx.array], mx.array]
"""(layer, q [N, H, D], k [N, K, D], v [N, K, D], not yet rotated) → [N, H × D]."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}


class MlxLinear:
    """One linear layer, by its full name, as the code that reads and writes adapters sees it (`lora.Adaptable`)."""

    transposed = False
    is_router = is_head = False
    group = None

    def __init__(self, name: str, weights: dict[str, mx.array]) -> None:
        self.name, self._weights = name, weights
        self.scaling = self.dropout = 0.0
        self.salt = 0
        self.counter: DropoutCounter | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        """The adapter's tensors as their file names them: A [r, in], B [out, r], magnitude [out]."""
        stem = f"{PREFIX}{self.name}.lora_"
        return f"{stem}A.weight", f"{stem}B.weight", f"{stem}magnitude_vector"

    @property
    def lora_A(self) -> torch.Tensor | None:
        return self._view(self.names[0])

    @property
    def lora_B(self) -> torch.Tensor | None:
        return self._view(self.names[1])

    @property
    def lora_magnitude(self) -> torch.Tensor | None:
        return self._view(self.names[2])

    def _view(self, name: str) -> torch.Tensor | None:
        return to_torch(self._weights[name]) if name in self._weights else None

    def adapt(self, lora: LoraConfig, *, name: str, seed: int, counter: DropoutCounter) -> None:
        """Add an adapter that changes nothing yet, of the very numbers that torch's engine starts with."""
        weight = self._weights[f"{self.name}.weight"]
        num_out, num_in = weight.shape
        down, up, magnitude = self.names
        self._weights[down] = to_mlx(fresh_A(lora.r, num_in, seed=seed, name=name))
        self._weights[up] = mx.zeros((num_out, lora.r))
        if lora.use_dora:
            self._weights[magnitude] = mx.linalg.norm(weight.astype(mx.float32), axis=1)
        self.scaling, self.dropout, self.counter, self.salt = lora.scaling, lora.lora_dropout, counter, salt(name)


class MlxDecoder:
    """A decoder-only language model.

    Attributes:
        weights: by the names in the files; adapters by PEFT's. Entries are replaced, arrays never change.
        linears: the layers that can carry an adapter, by full name.
        training: whether adapters drop anything.
    """

    implementation = "native"
    balance = None
    reads_branches = False

    def __init__(self, config: ModelConfig, weights: dict[str, mx.array], *, compute: mx.Dtype) -> None:
        self.config, self.compute, self.weights = config, compute, weights
        self.vocab_size, self.max_position_embeddings = config.vocab_size, config.max_position_embeddings
        self.linears = {
            f"model.layers.{index}.{name}": MlxLinear(f"model.layers.{index}.{name}", weights)
            for index in range(config.num_hidden_layers)
            for name in config.layer_linears(index)
        }
        frequencies, self._rope_gain = rope_frequencies(config)
        self._frequencies = to_mlx(frequencies)
        self.gradient_checkpointing = False
        self.training = False

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.training = False

    def base_names(self) -> list[str]:
        """The base's weights by name; a tied head is not among them."""
        return [name for name in self.weights if not name.startswith(PREFIX)]

    def head(self, weights: Weights) -> mx.array:
        """[V, D]; the embedding itself where they are tied."""
        return weights[EMBEDDING if self.config.tie_word_embeddings else HEAD]

    def hidden(self, tokens: mx.array, lengths: Sequence[int], trained: Weights) -> mx.array:
        """Last hidden states [N, D], after the final norm, of packed tokens [N] in rows of these lengths.

        Args:
            trained: what takes the place of weights of the same name.
        """
        positions = mx.concatenate([mx.arange(length) for length in lengths])
        cos, sin = self.rope(positions[:, None])
        ends = [sum(lengths[: row + 1]) for row in range(len(lengths))]

        def attend(layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            q, k, window = rotate(q, cos, sin), rotate(k, cos, sin), self.config.window(layer)
            rows = []
            for length, end in zip(lengths, ends, strict=True):
                row = slice(end - length, end)
                rows.append(self.attention(q[row][None], k[row][None], v[row][None], _row_mask(length, window))[0])
            return mx.concatenate(rows) if len(rows) > 1 else rows[0]

        return self.run(tokens, attend, trained)

    def run(self, tokens: mx.array, attend: Attend, trained: Weights) -> mx.array:
        """Every layer over packed tokens [N]; [N, D] after the final norm."""
        weights: Weights = {**self.weights, **trained} if trained else self.weights
        x = weights[EMBEDDING][tokens].astype(self.compute)
        for index in range(self.config.num_hidden_layers):
            if self.gradient_checkpointing and trained:
                x = self._layer_again(index, x, attend, trained)
            else:
                x = self._layer(index, x, attend, weights)
        return self._norm(x, weights["model.norm.weight"])

    def _layer_again(self, index: int, x: mx.array, attend: Attend, trained: Weights) -> mx.array:
        """A layer that keeps its input alone, and is computed a second time for the gradients."""
        prefixes = (f"model.layers.{index}.", f"{PREFIX}model.layers.{index}.")
        own = {name: value for name, value in trained.items() if name.startswith(prefixes)}

        def layer(x: mx.array, own: dict[str, mx.array]) -> mx.array:
            return self._layer(index, x, attend, {**self.weights, **own})

        return mx.checkpoint(layer)(x, own)

    def _layer(self, index: int, x: mx.array, attend: Attend, weights: Weights) -> mx.array:
        """Pre-norm attention and a gated MLP: [N, D] → [N, D]."""
        place, width = f"model.layers.{index}.", self.config.head_dim
        h = self._norm(x, weights[f"{place}input_layernorm.weight"])
        q, k, v = (
            self._project(h, f"{place}self_attn.{name}_proj", weights).reshape(h.shape[0], -1, width) for name in "qkv"
        )
        if self.config.qk_norm:
            q = self._norm(q, weights[f"{place}self_attn.q_norm.weight"])
            k = self._norm(k, weights[f"{place}self_attn.k_norm.weight"])
        x = x + self._project(attend(index, q, k, v), f"{place}self_attn.o_proj", weights)
        h = self._norm(x, weights[f"{place}post_attention_layernorm.weight"])
        gate, up = (self._project(h, f"{place}mlp.{name}_proj", weights) for name in ("gate", "up"))
        return x + self._project(ACTIVATIONS[self.config.hidden_act](gate) * up, f"{place}mlp.down_proj", weights)

    def _norm(self, x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight.astype(x.dtype), self.config.rms_norm_eps)

    def _project(self, x: mx.array, name: str, weights: Weights) -> mx.array:
        """[N, in] → [N, out]: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, or DoRA's (see `models.lora`)."""
        layer, weight, bias = self.linears[name], weights[f"{name}.weight"].astype(x.dtype), weights.get(f"{name}.bias")
        down, up, magnitude = (weights.get(each) for each in layer.names)
        out = x @ weight.T
        if down is not None and up is not None:
            dropped = self._dropped(x, layer)
            update = layer.scaling * ((dropped @ down.T.astype(x.dtype)) @ up.T.astype(x.dtype))
            if magnitude is None:
                out = out + update
            else:
                norm = mx.linalg.norm(weight.astype(mx.float32) + layer.scaling * (up @ down), axis=1)
                gain = (magnitude / mx.stop_gradient(norm)).astype(x.dtype)
                product = out if dropped is x else dropped @ weight.T
                out = gain * (product + update) + (out - product if dropped is not x else 0)
        return out if bias is None else out + bias.astype(x.dtype)

    def _dropped(self, x: mx.array, layer: MlxLinear) -> mx.array:
        """`x` with the mask that torch's engine would draw for this row, step and layer."""
        if not (layer.dropout and self.training):
            return x
        ones = torch.ones(x.shape)
        return x * to_mlx(drop(ones, layer.dropout, layer.counter, layer.salt, field="lora.lora_dropout"), x.dtype)

    def attention(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
        """[B, T, H, D] over [B, S, K, D] → [B, T, H × D]."""
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(self.config.head_dim), mask=mask)
        return out.transpose(0, 2, 1, 3).flatten(2)

    def rope(self, positions: mx.array) -> tuple[mx.array, mx.array]:
        """(cos, sin) of positions [..]: [.., D / 2] in the compute type."""
        angles = positions.astype(mx.float32)[..., None] * self._frequencies
        cos, sin = mx.cos(angles) * self._rope_gain, mx.sin(angles) * self._rope_gain
        return cos.astype(self.compute), sin.astype(self.compute)

    def decoding(self, num_sequences: int, capacity: int) -> Any:
        from model_foundry.engine.mlx_sampling import MlxDecoding

        del num_sequences, capacity  # mlx-lm's cache grows by itself
        return MlxDecoding(self)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding of x [.., D] by halves, as Hugging Face's weights want it; cos and sin [.., D / 2]."""
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _row_mask(length: int, window: int | None) -> mx.array | str:
    """What the queries of one row see; a window counts the query itself."""
    if window is None or window >= length:
        return "causal"
    query, key = mx.arange(length)[:, None], mx.arange(length)[None, :]
    return (key <= query) & (key > query - window)


def load_decoder(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]], *, compute: mx.Dtype,
                 stored: mx.Dtype) -> MlxDecoder:  # fmt: skip
    """A decoder of these weights, kept as `stored`.

    Raises:
        ArchitectureMismatchError: a tensor is missing, left over, of another shape, or a tied head is not tied.
    """
    weights = {name: to_mlx(tensor, stored) for name, tensor in fitting_tensors(config, tensors, where=str(folder))}
    mx.eval(weights)
    return MlxDecoder(config, weights, compute=compute)


def fitting_tensors(
    config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]], *, where: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model folder one by one; a tied head is compared and left out. Raises: as `load_decoder`."""
    shapes = expected_shapes(config)
    found: set[str] = set()
    embedding = tied_head = None
    for name, tensor in tensors:
        if name == HEAD and config.tie_word_embeddings:
            tied_head = tensor
            continue
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in shapes:
            raise ArchitectureMismatchError(f"the weights hold {name}, which the model lacks", where=where)
        if tuple(tensor.shape) != shapes[name]:
            what = f"{name} has shape {tuple(tensor.shape)}; config.json asks for {shapes[name]}"
            raise ArchitectureMismatchError(what, where=where)
        embedding = tensor if name == EMBEDDING else embedding
        found.add(name)
        yield name, tensor
    if tied_head is not None and embedding is None:
        # Old folders store the shared matrix under the head's name alone.
        found.add(EMBEDDING)
        yield EMBEDDING, tied_head
    elif tied_head is not None and embedding is not None and not torch.equal(tied_head, embedding):
        hint = "Set tie_word_embeddings to false in config.json."
        what = "lm_head.weight differs from the embedding that config.json ties it to"
        raise ArchitectureMismatchError(what, where=where, hint=hint)
    if missing := [name for name in shapes if name not in found]:
        raise ArchitectureMismatchError(f"the weights lack the tensor {missing[0]}", where=where)
