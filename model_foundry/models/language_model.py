"""One seam for every model: the native decoder, or transformers for what it does not know.

The engine sees tokens in, hidden states and a head out; it does not know which of the two it drives.

Shapes: N packed tokens, D width, V vocabulary, B sequences being decoded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.models.attention import Attention, choose_attention
from model_foundry.models.balance import RouterBalance
from model_foundry.models.compiled import compile_layers
from model_foundry.models.config import ModelConfig, native_obstacle
from model_foundry.models.decoder import Decoder, KeyValueCache, decode_step, fill_up, prefill
from model_foundry.models.experts import ExpertStack
from model_foundry.models.fallback import TransformersModel, load_transformers_model
from model_foundry.models.folder import read_config, read_tensors
from model_foundry.models.head import HeadUpdate
from model_foundry.models.lora import Adaptable, Linear
from model_foundry.models.packed_rows import PackedRows
from model_foundry.models.packing import Quantization, choose_packing
from model_foundry.models.randomness import DropoutCounter

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "native", "transformers"]


class DecodingState(Protocol):
    """Sequences being continued."""

    def start(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        """Read prompts int64 [T_i]; logits float32 [B, V] of the next token of each."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append int64 [B]; logits float32 [B, V]."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these sequences only (int64 indices)."""
        ...


class LanguageModel(nn.Module):
    """What the engine needs of a model.

    Attributes:
        quantization: how the frozen linear layers are kept; a model that packs them cannot be trained whole.
    """

    implementation: str
    vocab_size: int
    max_position_embeddings: int | None
    quantization: Quantization = "none"

    @property
    def balance(self) -> RouterBalance | None:
        """The load-balancing loss to add in training, where the model has one."""
        return None

    @property
    def has_no_pass_state(self) -> bool:
        """Whether several threads may compute passes at the same time: nothing is remembered beside the tensors."""
        return False

    @property
    def num_parameters(self) -> int:
        """Of the base model; tied ones once, packed ones by the weights they stand for."""
        return sum(parameter.numel() for parameter in self.base_parameters().values())

    def draw_dropout_by(self, counter: DropoutCounter) -> None:
        """Draw the model's own dropout masks in training by this counter."""

    @property
    def reads_branches(self) -> bool:
        """Whether `hidden` takes rows that end in branches; where not, each branch has to be a row of its own."""
        return False

    def hidden(self, rows: Sequence[torch.Tensor], branches: Sequence[tuple[int, ...]] = ()) -> torch.Tensor:
        """Rows of tokens int64 [T_i] → what `head` is applied to, [N, D] (or logits [N, V] without a head).

        Args:
            branches: of each row, the lengths of the parts that it ends with (see `Datum`); () for plain rows.
        """
        raise NotImplementedError

    @property
    def head(self) -> nn.Parameter | None:
        """[V, D], or None where `hidden` gives logits already."""
        raise NotImplementedError

    def opened_head(self) -> AbstractContextManager[nn.Parameter | None]:
        """`head`, to compute a loss and its gradient from; where a process holds a part of it, whole for that long."""
        return nullcontext(self.head)

    @property
    def head_update(self) -> HeadUpdate | None:
        """What an adapter adds to the logits that `head` gives, or None."""
        return None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] of what `hidden` gives, in its type."""
        return hidden

    def linears(self) -> Mapping[str, Adaptable]:
        """Every layer that can carry an adapter, by its Hugging Face name (without `.weight`)."""
        raise NotImplementedError

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Base weights by Hugging Face name; packed ones are left out."""
        raise NotImplementedError

    def fitting_weights(self, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of (base weight, value stored in a Hugging Face folder); nothing is changed.

        Raises:
            ModelError: the folder cannot be read.
            ArchitectureMismatchError: names or shapes differ.
        """
        raise NotImplementedError

    def compute_in(self, dtype: torch.dtype) -> None:
        """Activations in this type, even where the weights are kept in float32 to be trained."""
        raise NotImplementedError

    def compile_layers(self, on: bool) -> None:
        """Training passes by layers that torch.compile made, or by the layers as they are.

        Raises:
            ModelError: this model's cannot be compiled.
        """
        if on:
            what = "torch.compile is for the native decoder, and transformers runs this model"
            raise ModelError(what, where="training.compile", hint="Set training.compile=off.")

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Every base weight, for full fine-tuning; tied ones once."""
        return {name: p for name, p in self.named_parameters() if ".lora_" not in name}

    def hidden_matrices(self) -> set[str]:
        """Names, among `base_parameters`, of the linear layers' weights and the stacks of experts.

        Embeddings, head, routers, norms and biases are left out, and experts that transformers fuses into other things.
        """
        inner = {
            id(layer.group.weight if isinstance(layer.group, ExpertStack) else getattr(layer, "weight", None))
            for layer in self.linears().values()
            if not layer.is_router
        }
        return {name for name, parameter in self.base_parameters().items() if id(parameter) in inner}

    def decoding(self, num_sequences: int, capacity: int) -> DecodingState:
        raise NotImplementedError


class NativeModel(LanguageModel):
    implementation = "native"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.vocab_size = decoder.config.vocab_size
        self.max_position_embeddings = decoder.config.max_position_embeddings

    @property
    def reads_branches(self) -> bool:
        return self.decoder.attention != "flash"  # whose kernel knows no mask

    def hidden(self, rows: Sequence[torch.Tensor], branches: Sequence[tuple[int, ...]] = ()) -> torch.Tensor:
        device, lengths = self.decoder.embed_tokens.device, [int(row.shape[0]) for row in rows]
        if self.training and self.decoder.drops:
            # Dropout masks belong to the rows that the engine counted.
            return self.decoder(torch.cat(list(rows)), PackedRows.of(lengths, device, branches))
        return self.decoder(*fill_up(rows, device, branches))[: sum(lengths)]

    @property
    def balance(self) -> RouterBalance | None:
        return self.decoder.balance

    @property
    def has_no_pass_state(self) -> bool:
        decoder = self.decoder
        counts = self.training and (decoder.drops or decoder.compiled_layers)
        return not (counts or decoder.gradient_checkpointing or decoder.config.experts or self.quantization != "none")

    @property
    def num_parameters(self) -> int:
        return self.decoder.config.num_parameters

    def draw_dropout_by(self, counter: DropoutCounter) -> None:
        self.decoder.counter = counter

    @property
    def head(self) -> nn.Parameter | None:
        return self.decoder.head_weight

    @property
    def head_update(self) -> HeadUpdate | None:
        return self.decoder.head_layer.update

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.logits(hidden)

    def linears(self) -> Mapping[str, Adaptable]:
        return self.decoder.linears()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.decoder.weights()

    def fitting_weights(self, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return _pairs(dict(self.weights()), dict(read_tensors(folder)), folder)

    def compute_in(self, dtype: torch.dtype) -> None:
        self.decoder.compute_dtype = dtype

    def compile_layers(self, on: bool) -> None:
        compile_layers(self.decoder, on=on)

    def decoding(self, num_sequences: int, capacity: int) -> DecodingState:
        return _NativeDecoding(self.decoder, num_sequences, capacity)


class _NativeDecoding:
    def __init__(self, decoder: Decoder, num_sequences: int, capacity: int) -> None:
        self.decoder = decoder
        self.cache = KeyValueCache(decoder, num_sequences, capacity)

    @torch.no_grad()
    def start(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        return self.decoder.logits(prefill(self.decoder, prompts, self.cache)).float()

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder.logits(decode_step(self.decoder, tokens, self.cache)).float()

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.keep(rows)


class ForeignModel(LanguageModel):
    """A transformers model whose linear layers are ours, so that adapters are the same everywhere."""

    implementation = "transformers"

    def __init__(self, wrapped: TransformersModel, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.compute_dtype, self.weights_dtype = compute_dtype, wrapped.model.dtype
        self.vocab_size = wrapped.vocab_size
        limit = getattr(wrapped.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_position_embeddings = int(limit) if limit else None
        self._linears: dict[str, Linear] = {}
        for name, module in wrapped.linear_modules().items():
            transposed = type(module).__name__ == "Conv1D"
            weight: Any = module.weight
            bias: Any = module.bias
            linear = Linear(weight.detach(), None if bias is None else bias.detach(), transposed=transposed)
            # Code of transformers reads these of an nn.Linear.
            linear.in_features, linear.out_features = linear.matrix.shape[1], linear.matrix.shape[0]  # pyright: ignore
            parent, _, child = name.rpartition(".")
            setattr(wrapped.model.get_submodule(parent), child, linear)
            self._linears[name] = linear
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def hidden(self, rows: Sequence[torch.Tensor], branches: Sequence[tuple[int, ...]] = ()) -> torch.Tensor:
        assert not any(branches), "transformers reads plain rows"
        device = next(self.parameters()).device.type
        # Only float32 weights being trained need it: a frozen model is in the compute type already.
        mixed = self.compute_dtype != self.weights_dtype
        with torch.autocast(device, self.compute_dtype, enabled=mixed):
            return torch.cat(self.wrapped.logits(list(rows)))

    @property
    def head(self) -> nn.Parameter | None:
        return None

    def linears(self) -> Mapping[str, Adaptable]:
        return dict(self._linears)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in self.wrapped.tensors() if ".lora_" not in name)

    def fitting_weights(self, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # A folder may name and cut weights otherwise than the model does (experts): only transformers knows how.
        stored = load_transformers_model(folder, self.weights_dtype, "cpu")
        theirs = {f"wrapped.{name}": p.detach() for name, p in stored.named_parameters()}
        return _pairs({name: p.detach() for name, p in self.base_parameters().items()}, theirs, folder)

    def compute_in(self, dtype: torch.dtype) -> None:
        self.compute_dtype = dtype

    def decoding(self, num_sequences: int, capacity: int) -> DecodingState:
        return _ForeignDecoding(self)


class _ForeignDecoding:
    """One sequence after another: right for every architecture, fast for none."""

    def __init__(self, model: ForeignModel) -> None:
        self.model = model
        self.caches: list[Any] = []

    @torch.no_grad()
    def start(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        results = [self.model.wrapped.start(prompt) for prompt in prompts]
        self.caches = [cache for _, cache in results]
        return torch.stack([logits.float() for logits, _ in results])

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        pairs = zip(tokens.tolist(), self.caches, strict=True)
        results = [self.model.wrapped.step(token, cache) for token, cache in pairs]
        self.caches = [cache for _, cache in results]
        return torch.stack([logits.float() for logits, _ in results])

    def keep(self, rows: torch.Tensor) -> None:
        self.caches = [self.caches[row] for row in rows.tolist()]


def _pairs(
    mine: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], folder: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    wrong = sorted(mine.keys() ^ stored.keys()) or [name for name in mine if mine[name].shape != stored[name].shape]
    if wrong:
        raise ArchitectureMismatchError(f"the weights do not fit this model, {wrong[0]} first", where=str(folder))
    return [(value, stored[name]) for name, value in mine.items()]


def share_weights(model: LanguageModel) -> LanguageModel:
    """A second model on the same frozen weights, for an adapter of its own: modules are copied, weights are not."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def load_language_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    implementation: Implementation = "auto",
    attention: Attention = "auto",
    quantization: Quantization = "none",
    gradient_checkpointing: bool = False,
) -> LanguageModel:
    """Load a Hugging Face folder.

    Args:
        implementation: `auto` takes the native decoder where it knows the architecture.
        attention: the back end; what is taken instead, where it does not run, is logged.
        quantization: keep the linear layers packed; native decoder only.

    Raises:
        ModelError: the folder cannot be read, `native` was asked for and the decoder does not know it, or packed
            weights were asked for where they are not to be had.
    """
    config = read_config(folder)
    obstacle = native_obstacle(config)
    if implementation == "native" and obstacle is not None:
        raise ModelError(obstacle, where=str(folder), hint="Use model.implementation=transformers.")
    if implementation == "transformers" or obstacle is not None:
        if quantization != "none":
            why = "model.implementation=transformers" if obstacle is None else obstacle
            what = f"{quantization} is for the native decoder, which does not run this model ({why})"
            raise ModelError(what, where="model.quantization", hint="Set model.quantization=none.")
        wrapped = load_transformers_model(folder, dtype, device, attention=attention)
        for note in wrapped.notes:
            logger.warning("%s: %s", folder.name, note)
        if gradient_checkpointing:
            wrapped.enable_gradient_checkpointing()
        return ForeignModel(wrapped, dtype)
    shape = ModelConfig.from_hf(config, where=str(folder / "config.json"))
    packing = choose_packing(quantization, torch.device(device))
    decoder = Decoder(shape, read_tensors(folder), dtype=dtype, device=device, packing=packing, where=str(folder))
    decoder.gradient_checkpointing = gradient_checkpointing
    set_attention(decoder, attention, device=torch.device(device), dtype=dtype)
    model = NativeModel(decoder)
    model.quantization = quantization
    return model


def set_attention(decoder: Decoder, attention: Attention, *, device: torch.device, dtype: torch.dtype) -> None:
    """The back end asked for, or what is taken instead, which is logged."""
    choice = choose_attention(attention, device, dtype, attention_dropout=decoder.config.attention_dropout)
    decoder.attention = choice.chosen
    level = logging.DEBUG if attention in ("auto", choice.chosen) else logging.WARNING
    logger.log(level, "attention: %s (%s)", choice.chosen, choice.why)
