"""An adapter worked into its base's weights, in one pass: W + s B A, in float32, rounded once.

Reads and writes tensors one by one, so memory is bounded by one output shard. Refuses what would come out wrong:
another base than the adapter was trained on, an adapter that is in the weights already, parts of an adapter that no
weight takes up. It knows tensors and folders; it runs no model and judges no result (`export.parity` does).

LoRA: Hu et al. 2021; rank-stabilised: Kalajdzievski 2023; DoRA: Liu et al. 2024, section 4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model_foundry.checkpoint.manifest import read_manifest
from model_foundry.checkpoint.tensors import TensorEntry, read_entries
from model_foundry.errors import ArchitectureMismatchError, CheckpointError, ModelError
from model_foundry.models.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME, read_adapter_config, read_adapter_tensors
from model_foundry.models.folder import (
    fill_model_folder,
    fingerprint,
    read_config,
    read_json,
    read_tensors,
    stored_tensors,
    weight_files,
    write_json,
)
from model_foundry.models.hashes import file_sha256
from model_foundry.models.runs import trained_on

MARKER = "merge.json"
"""In a merged folder: which adapter lies in its weights."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 1 << 30
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to one weight.

    Attributes:
        down: A, [r, in]; up: B, [out, r].
        magnitude: DoRA's row lengths [out], or None.
        transposed: the weight is stored [in, out], as GPT-2's Conv1D does.
    """

    down: torch.Tensor
    up: torch.Tensor
    magnitude: torch.Tensor | None
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as it is stored."""
        num_out, num_in = self.up.shape[0], self.down.shape[1]
        return (num_in, num_out) if self.transposed else (num_out, num_in)

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight in float32; `weight` as it is stored, of any float type."""
        matrix = weight.float().t() if self.transposed else weight.float()
        merged = torch.addmm(matrix, self.up.float(), self.down.float(), alpha=self.scaling)
        if self.magnitude is not None:
            merged *= (self.magnitude.float() / merged.norm(dim=1))[:, None]
        return (merged.t() if self.transposed else merged).contiguous()


@dataclass(slots=True)
class Rounding:
    """How much of what the adapter does is lost to rounding: sums of squares over the adapted weights."""

    lost: float = 0.0
    changed: float = 0.0
    num_tensors: int = 0

    def add(self, *, base: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> None:
        self.lost += float((stored.float() - exact).square().sum(dtype=torch.float64))
        self.changed += float((exact - base.float()).square().sum(dtype=torch.float64))
        self.num_tensors += 1

    @property
    def share(self) -> float:
        """Length of the rounding error over length of the adapter's change; 0 where nothing was changed."""
        return (self.lost / self.changed) ** 0.5 if self.changed else 0.0


@dataclass(frozen=True)
class Merge:
    """A base and what is to be worked into it, held against each other.

    Attributes:
        updates: by the name of the weight.
        tensors: every weight of the base, from the headers alone.
        config: of the merged model; the head is untied where the adapter changes it.
    """

    base: Path
    adapter: Path | None
    updates: Mapping[str, Update]
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, Any]
    rounding: Rounding = field(default_factory=Rounding)

    @cached_property
    def places(self) -> dict[str, tuple[Path, TensorEntry]]:
        """Where each of the base's weights lies, in the order in which they are read."""
        return {
            name: (path, entry)
            for path in weight_files(self.base)
            for name, entry in sorted(read_entries(path).items(), key=lambda item: item[1].start)
        }

    @cached_property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """Which merged weights each stored one becomes: itself, both ends of a tied model, or (a tied copy) nothing."""
        head_here = HEAD in self.tensors
        if not read_config(self.base).get("tie_word_embeddings"):
            return {name: (name,) for name in self.tensors}
        # Old folders store the shared matrix under the head's name alone.
        shared = EMBEDDING if EMBEDDING in self.tensors or not head_here else HEAD
        both = (EMBEDDING, HEAD) if HEAD in self.updates else (EMBEDDING,)
        return {name: both if name == shared else () if name == HEAD else (name,) for name in self.tensors}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every merged weight, in the order of `weights`."""
        return {out: tuple(entry.shape) for name, (_, entry) in self.places.items() for out in self.outputs[name]}

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every merged weight by name, one at a time.

        Args:
            dtype: of floating-point weights; None keeps each one's own.

        Raises:
            ModelError: a value does not fit into `dtype`, or a file is damaged.
        """
        outputs = self.outputs
        for name, tensor in read_tensors(self.base):
            for out in outputs[name]:
                yield out, self._merged(out, tensor, dtype)

    def weight(self, name: str) -> torch.Tensor:
        """One merged weight in float32, whichever file it lies in.

        Raises:
            ModelError: the file ends within it.
        """
        stored = next(source for source, outs in self.outputs.items() if name in outs)
        path, entry = self.places[stored]
        with path.open("rb") as file:
            file.seek(entry.start)
            data = bytearray(entry.end - entry.start)
            if file.readinto(data) != len(data):
                raise ModelError(f"it ends within {stored}", where=str(path), hint="Fetch or copy it again.")
        tensor = torch.frombuffer(data, dtype=_FLOATS[entry.dtype]).reshape(entry.shape)
        return self._merged(name, tensor, torch.float32)

    def _merged(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        target = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        update = self.updates.get(name)
        exact = tensor if update is None else update.apply(tensor)
        stored = exact.to(target)
        if update is not None:
            self.rounding.add(base=tensor, exact=exact, stored=stored)
        if target is torch.float16 and not bool(torch.isfinite(stored).all()):
            what = f"{name} holds values that float16 cannot, up to {float(exact.abs().max()):g}"
            raise ModelError(what, where=str(self.base), hint="Use --dtype bfloat16 or float32.")
        return stored


def plan_merge(base: Path, adapter: Path | None) -> Merge:
    """Hold an adapter against a base: names, shapes, fingerprints. Writes nothing; without adapter it adds nothing.

    Raises:
        ModelError: the adapter is in these weights already, or holds what cannot be merged.
        ArchitectureMismatchError: it was trained on another base.
    """
    config = dict(read_config(base))
    tensors = stored_tensors(base)
    if config.get("quantization_config"):
        hint = "Merge into the model that the adapter's base was quantised from."
        raise ModelError("the base's weights are quantised", where=str(base), hint=hint)
    if adapter is None:
        return Merge(base, None, {}, tensors, config)
    updates = read_updates(adapter)
    tied = bool(config.get("tie_word_embeddings"))
    _refuse_misfit(updates, tensors, tied=tied, adapter=adapter, base=base)
    refuse_other_base(base, adapter)
    if tied and HEAD in updates:
        config["tie_word_embeddings"] = False
    return Merge(base, adapter, updates, tensors, config)


def read_updates(adapter: Path) -> dict[str, Update]:
    """What an adapter folder changes, by the name of the weight.

    Raises:
        ModelError: it is damaged, not LoRA, or holds parts that are not a low-rank update of a linear layer.
    """
    lora = read_adapter_config(adapter)
    transposed = bool(read_json(adapter / CONFIG_NAME).get("fan_in_fan_out"))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_adapter_tensors(adapter).items():
        match = _PART.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            what = f"it holds {name}, which is not a low-rank update of a linear layer"
            raise ModelError(what, where=str(adapter / WEIGHTS_NAME), hint="Such an adapter is merged with peft.")
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
    updates = {}
    for layer, found in parts.items():
        wanted = {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if lora.use_dora else set())
        if differing := sorted(wanted ^ found.keys()):
            which = "lacks" if differing[0] in wanted else "holds, with use_dora off,"
            raise ModelError(f"it {which} {layer}.{differing[0]}", where=str(adapter / WEIGHTS_NAME))
        down, up = found["lora_A.weight"], found["lora_B.weight"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            what = f"A and B of {layer} have shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not multiply"
            raise ModelError(what, where=str(adapter / WEIGHTS_NAME))
        magnitude = found.get("lora_magnitude_vector")
        updates[f"{layer}.weight"] = Update(down, up, magnitude, lora.scaling, transposed)
    if not updates:
        raise ModelError("it holds no tensors", where=str(adapter / WEIGHTS_NAME))
    return updates


def _refuse_misfit(
    updates: Mapping[str, Update], tensors: Mapping[str, TensorEntry], *, tied: bool, adapter: Path, base: Path
) -> None:
    hint = f"This adapter belongs to another model than {base}."
    for name, update in sorted(updates.items()):
        shared = tied and name == HEAD and EMBEDDING in tensors
        entry = tensors.get(EMBEDDING if shared else name)
        if entry is None:
            raise ArchitectureMismatchError(f"it changes {name}, which the base lacks", where=str(adapter), hint=hint)
        if entry.dtype not in _FLOATS:
            raise ModelError(f"{name} is stored as {entry.dtype}, which no update is added to", where=str(base))
        if tuple(entry.shape) != update.shape:
            what = f"it changes {name} of shape {update.shape}, the base's has {tuple(entry.shape)}"
            raise ArchitectureMismatchError(what, where=str(adapter), hint=hint)


def refuse_other_base(base: Path, adapter: Path) -> None:
    """The base must be the one that the adapter was trained on, and must not hold the adapter already.

    Raises:
        ModelError: it holds it. ArchitectureMismatchError: it is another one, byte for byte.
    """
    trained, digest = trained_on(adapter) or _exported_from(adapter), adapter_sha256(adapter)
    marker = read_json(base / MARKER) if (base / MARKER).exists() else {}
    if marker.get("adapter_sha256") == digest:
        hint = f"Merging it twice would double what it does. The base it was merged into: {marker.get('base')}"
        raise ModelError("this adapter is in these weights already", where=str(base), hint=hint)
    if trained is None:
        if marker:
            what = f"it is a merged model, and nothing says that {adapter} was trained on it rather than on its base"
            raise ModelError(what, where=str(base), hint=f"Merge into the base: {marker.get('base')}")
    elif trained != (found := fingerprint(base)):
        raise ArchitectureMismatchError(
            f"the adapter was trained on other weights (fingerprint {trained[:12]}, this base has {found[:12]})",
            where=str(base), hint="Merge it into the very base that the run used.",
        )  # fmt: skip


def _exported_from(adapter: Path) -> str | None:
    """Fingerprint of the base that an exported adapter's own manifest names."""
    try:
        origin = read_manifest(adapter).fields.get("origin")
    except CheckpointError:
        return None
    value = origin.get("base_fingerprint") if isinstance(origin, dict) else None
    return value if isinstance(value, str) else None


def adapter_sha256(adapter: Path) -> str:
    """Identifies an adapter by its tensors."""
    return file_sha256(adapter / WEIGHTS_NAME)


def fill_merged_folder(
    target: Path, merge: Merge, *, dtype: str | None = None, base_name: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a merged Hugging Face folder with its marker into an empty folder; atomicity is the caller's.

    Args:
        dtype: `float32`, `float16` or `bfloat16`; None keeps the base's.
        base_name: what the marker calls the base.

    Raises:
        ModelError: as `Merge.weights`. OSError: the disk is full.
    """
    config = dict(merge.config)
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    weights = merge.weights(None if dtype is None else DTYPES[dtype])
    fill_model_folder(target, config, weights, tokenizer_from=merge.base, max_shard_bytes=max_shard_bytes)
    if merge.adapter is not None:
        marker = {
            "format": 1,
            "base": base_name,
            "base_fingerprint": fingerprint(merge.base),
            "adapter_sha256": adapter_sha256(merge.adapter),
            "rounding_share": merge.rounding.share,
        }
        write_json(target / MARKER, marker)


def set_chat_template(folder: Path, text: str, stop_token_ids: tuple[int, ...]) -> None:
    """Give a folder the template that a model was trained with, and let generation end at its end of turn."""
    if text:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        path = folder / "tokenizer_config.json"
        write_json(path, (read_json(path) if path.exists() else {}) | {"chat_template": text})
        (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "generation_config.json"
    known = read_json(path) if path.exists() else {}
    stops = list(stop_token_ids)
    if stops:
        path.write_text(
            json.dumps(known | {"eos_token_id": stops if len(stops) > 1 else stops[0]}, indent=2) + "\n",
            encoding="utf-8",
        )
