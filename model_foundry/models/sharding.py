"""The native decoder divided over ranks by FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023).

Every parameter is cut along its first axis and each rank keeps one part. A layer is put together when it is computed,
forwards and backwards, and taken apart again; embedding and head see to themselves (`sharded_vocabulary`). Gradients
are summed over ranks as they arise, each rank keeping those of its part: losses here are sums, not means.

No rank ever holds the whole model: it is laid out without memory, divided, and each rank reads its rows of each tensor
from the files (`torch.distributed.checkpoint`'s reader of safetensors; nothing is unpickled). It knows no losses,
batches or optimizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from model_foundry.checkpoint.tensors import TensorEntry
from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.models.adapter import PREFIX
from model_foundry.models.attention import Attention
from model_foundry.models.config import ModelConfig, native_obstacle
from model_foundry.models.experts import ExpertLinear, ExpertStack
from model_foundry.models.folder import read_config, stored_tensors, weight_files
from model_foundry.models.language_model import DecodingState, NativeModel, set_attention
from model_foundry.models.lora import Linear, fresh_A
from model_foundry.models.rope import rope_frequencies
from model_foundry.models.sharded_vocabulary import DividedDecoder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor of the files, and where this rank keeps its rows.

    Attributes:
        holder: the parameter (divided along its first axis) that it is, or a stack that it is one matrix of.
        expert: its number in the stack.
        shape: of the whole tensor.
    """

    holder: DTensor
    expert: int | None
    shape: torch.Size

    @property
    def rows(self) -> range:
        """Of the holder's first axis, those that are here."""
        mesh = self.holder.device_mesh
        size = -(-self.holder.shape[0] // mesh.size())
        first = min(mesh.get_rank() * size, self.holder.shape[0])
        return range(first, min(first + size, self.holder.shape[0]))

    @property
    @torch.no_grad()
    def here(self) -> torch.Tensor | None:
        """This rank's rows, a view; None where another rank has the whole expert."""
        local = self.holder.to_local()
        if self.expert is None:
            return local
        return local[self.expert - self.rows.start] if self.expert in self.rows else None

    @property
    def target(self) -> torch.Tensor | None:
        """What the reader fills: it looks up which rows a divided tensor has here."""
        return self.holder.detach() if self.expert is None else self.here


class ShardedModel(NativeModel):
    """A decoder whose parameters are divided; the layers and the last norm are put together by FSDP's hooks.

    Call `settle` when weights are about to change, and after a pass that has no backward pass.
    """

    decoder: DividedDecoder

    @property
    def has_no_pass_state(self) -> bool:
        """Layers are put together for one pass at a time."""
        return False

    def opened_head(self) -> AbstractContextManager[nn.Parameter]:
        return self.decoder.opened_head()

    @property
    def _root(self) -> FSDPModule:
        root: Any = self.decoder
        return root

    def settle(self) -> None:
        """The last norm is taken apart again."""
        self._root.reshard()

    def decoding(self, num_sequences: int, capacity: int) -> DecodingState:
        return _ShardedDecoding(self, super().decoding(num_sequences, capacity))

    def base_shards(self) -> dict[str, Shard]:
        """Base weights by Hugging Face name."""
        return {name: _shard(parameter, expert) for name, parameter, expert in self.decoder.named_weights()}

    def adapter_shards(self) -> dict[str, Shard]:
        """Adapter tensors by PEFT's names."""
        shards: dict[str, Shard] = {}
        for name, layer in self.linears().items():
            holder, expert = (layer.stack, layer.expert) if isinstance(layer, ExpertLinear) else (layer, None)
            if not isinstance(holder, Linear | ExpertStack) or holder.lora_A is None or holder.lora_B is None:
                continue
            shards[f"{PREFIX}{name}.lora_A.weight"] = _shard(holder.lora_A, expert)
            shards[f"{PREFIX}{name}.lora_B.weight"] = _shard(holder.lora_B, expert)
            if isinstance(holder, Linear) and holder.lora_magnitude is not None:
                shards[f"{PREFIX}{name}.lora_magnitude_vector"] = _shard(holder.lora_magnitude, None)
        return shards

    @torch.no_grad()
    def start_adapter(self, *, seed: int) -> None:
        """A fresh adapter's values, this rank's rows of what a process alone would draw."""
        for name, shard in self.adapter_shards().items():
            here, layer = shard.here, name.removeprefix(PREFIX).rpartition(".lora_")[0]
            if here is None:
                continue
            if name.endswith("lora_A.weight"):
                fresh = fresh_A(shard.shape[0], shard.shape[1], seed=seed, name=layer)
                here.copy_(fresh if shard.expert is not None else fresh[shard.rows.start : shard.rows.stop])
            elif name.endswith("lora_B.weight"):
                here.zero_()
            else:
                linear: Any = self.decoder.get_submodule(layer.removeprefix("model."))
                here.copy_(linear.weight.to_local().float().norm(dim=1))


class _ShardedDecoding:
    """The last norm stands together while a step is computed; all else sees to itself."""

    def __init__(self, model: ShardedModel, inner: DecodingState) -> None:
        self.model, self.inner = model, inner

    def start(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        return self._together(self.inner.start, prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._together(self.inner.step, tokens)

    def keep(self, rows: torch.Tensor) -> None:
        self.inner.keep(rows)

    def _together(self, act: Any, argument: Any) -> torch.Tensor:
        self.model._root.unshard()
        try:
            return act(argument)
        finally:
            self.model.settle()


def lay_out(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention = "auto",
    gradient_checkpointing: bool = False,
) -> ShardedModel:
    """A model folder's decoder without memory for its weights: adapt it, then `divide` it, then `read_shards`.

    Raises:
        ModelError: the folder cannot be read, or the native decoder does not run it.
        ArchitectureMismatchError: tensors are missing, left over, or of another shape.
    """
    config = read_config(folder)
    if (obstacle := native_obstacle(config)) is not None:
        what = f"several processes divide the native decoder alone, which does not run this model ({obstacle})"
        raise ModelError(what, where=str(folder), hint="Train it in one process, without torchrun.")
    shape = ModelConfig.from_hf(config, where=str(folder / "config.json"))
    entries = stored_tensors(folder)
    outlines = (
        (name, torch.empty(entry.shape, device="meta"))
        for name, entry in entries.items()
        if not (shape.tie_word_embeddings and name == HEAD and EMBEDDING in entries)
    )
    decoder = DividedDecoder(shape, outlines, dtype=dtype, device="meta", where=str(folder))
    decoder.gradient_checkpointing = gradient_checkpointing
    decoder.frequencies = rope_frequencies(shape)[0].to(device)
    set_attention(decoder, attention, device=device, dtype=dtype)
    return ShardedModel(decoder)


def divide(model: ShardedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Cut every parameter over the ranks of `mesh` and make room for this rank's part; what trains is settled before.

    A collective call: the same on all ranks.
    """
    decoder = model.decoder
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    vocabulary = decoder.divide_vocabulary(mesh)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False, ignored_params=vocabulary)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    decoder.to_empty(device=device)


def read_base(model: ShardedModel, folder: Path) -> None:
    """Fill this rank's rows from a model folder.

    Raises:
        ArchitectureMismatchError: a head stored beside the embedding that it is tied to differs from it.
    """
    shards, entries = model.base_shards(), stored_tensors(folder)
    tied = model.decoder.config.tie_word_embeddings
    if tied and EMBEDDING not in entries:
        shards[HEAD] = shards.pop(EMBEDDING)
    read_shards(shards, weight_files(folder))
    if tied and HEAD in entries and EMBEDDING in entries:
        embedding = shards[EMBEDDING]
        copy = DTensor.from_local(
            torch.empty_like(embedding.holder.to_local()), embedding.holder.device_mesh, embedding.holder.placements,
            shape=embedding.shape, stride=embedding.holder.stride(),
        )  # fmt: skip
        read_shards({HEAD: _shard(copy, None)}, weight_files(folder))
        if not torch.equal(copy.to_local(), embedding.here):  # pyright: ignore[reportArgumentType]
            what = "lm_head.weight differs from the embedding that config.json ties it to"
            raise ArchitectureMismatchError(what, where=str(folder), hint="Set tie_word_embeddings to false.")


class _NamedFiles(FileSystem):
    """Shows the reader these files of a folder and no others."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__()
        self.files = files

    def ls(self, path: Any) -> list[str]:
        return [str(file) for file in self.files]


def read_shards(shards: Mapping[str, Shard], files: Sequence[Path]) -> None:
    """Fill this rank's rows of each tensor; each rank reads for itself, and no more than its rows.

    Raises:
        ModelError: a file cannot be read.
    """
    targets: dict[str, Any] = {name: shard.target for name, shard in shards.items() if shard.target is not None}
    reader = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs = _NamedFiles(files)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
            dcp.load(targets, storage_reader=reader, no_dist=True)
    except Exception as error:
        raise ModelError(f"cannot be read ({error})", where=str(files[0].parent)) from error


def require_fit(shards: Mapping[str, Shard], entries: Mapping[str, TensorEntry], *, kind: str, where: str) -> None:
    """Raises ArchitectureMismatchError where names or shapes differ; `kind` says of what."""
    wrong = sorted(shards.keys() ^ entries.keys())
    wrong = wrong or [name for name in shards if tuple(shards[name].shape) != entries[name].shape]
    if wrong:
        raise ArchitectureMismatchError(f"the {kind} do not fit this model, {wrong[0]} first", where=where)


def _shard(parameter: Any, expert: int | None) -> Shard:
    return Shard(parameter, expert, parameter.shape if expert is None else parameter.shape[1:])


def divided(parameters: Iterator[tuple[str, nn.Parameter]]) -> dict[str, Shard]:
    """Parameters as they are divided, by their own names."""
    return {name: _shard(parameter, None) for name, parameter in parameters}
