"""LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Experts are stored one by one (`mlp.experts.3.up_proj`), as PEFT stored them while transformers kept them so; PEFT fuses
them on loading, as transformers does with the weights. Options of PEFT that change what an adapter computes and that we
do not compute are refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model_foundry.checkpoint.tensors import write_tensors
from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.models.folder import read_json
from model_foundry.models.lora import Adaptable
from model_foundry.types import LoraConfig

PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# Options of PEFT that we read, and those that say how an adapter was made or kept but not what it computes. Any other
# one must be off: an option that we have never heard of may change the result as well.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"}
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# The other ways to start (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights; PEFT does so again on loading.
_STARTS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def adapter_tensors(linears: Mapping[str, Adaptable]) -> dict[str, torch.Tensor]:
    """Adapter tensors by PEFT's names, float32, in the order of the layers."""
    tensors: dict[str, torch.Tensor] = {}
    for name, linear in linears.items():
        if linear.lora_A is None or linear.lora_B is None:
            continue
        tensors[f"{PREFIX}{name}.lora_A.weight"] = linear.lora_A.detach()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = linear.lora_B.detach()
        if linear.lora_magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = linear.lora_magnitude.detach()
    return tensors


def write_adapter(
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor],
    lora: LoraConfig,
    targets: list[str],
    base_model: str,
    transposed: bool = False,
) -> None:
    """Write both files into an existing folder.

    Args:
        tensors: from `adapter_tensors`.
        targets: from `target_names`.
        base_model: name or folder of the base; what `peft` loads the adapter onto.
        transposed: the layers are GPT-2's Conv1D.
    """
    lora = _as_stored(lora, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_tensors(folder / WEIGHTS_NAME, tensors, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _as_stored(lora: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> LoraConfig:
    """The same function in words that PEFT understands alike.

    PEFT fuses an expert's gate and up projections into one of twice the rank and twice lora_alpha. That keeps
    lora_alpha / r, and not lora_alpha / √r: so the rank-stabilised scale is written as a plain one.
    """
    if not lora.use_rslora or not any(".experts." in name for name in tensors):
        return lora
    return replace(lora, use_rslora=False, lora_alpha=lora.lora_alpha * math.sqrt(lora.r))


def target_names(linears: Mapping[str, Adaptable]) -> list[str]:
    """Names that select exactly the adapted layers in `peft`: endings, or full names where an ending says too much."""
    adapted = [name for name, linear in linears.items() if linear.lora_A is not None]
    endings = {name.rsplit(".", 1)[-1] for name in adapted}
    reach = [name for name in linears if name.rsplit(".", 1)[-1] in endings]
    return sorted(endings) if len(reach) == len(adapted) else sorted(adapted)


def read_adapter_config(folder: Path) -> LoraConfig:
    """The adapter's shape.

    Raises:
        ModelError: it is not a LoRA adapter, or uses an option we do not compute.
    """
    config = read_json(folder / CONFIG_NAME)
    where = str(folder / CONFIG_NAME)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise ModelError(f"peft_type is {config.get('peft_type')!r}; only LORA adapters are loaded", where=where)
    _refuse_other_options(config, where)
    targets = config.get("target_modules")
    if not (targets and (isinstance(targets, str) or all(isinstance(target, str) for target in targets))):
        raise ModelError(f"target_modules is {targets!r}; it must name layers", where=where)
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha", 8)}
    numbers["lora_dropout"] = config.get("lora_dropout") or 0.0
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or (key == "r" and value < 1):
            raise ModelError(f"{key} is {value!r}, which is not a possible value", where=where)
    return LoraConfig(
        r=int(numbers["r"]),
        lora_alpha=float(numbers["lora_alpha"]),
        lora_dropout=float(numbers["lora_dropout"]),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
    )


def _refuse_other_options(config: Mapping[str, Any], where: str) -> None:
    start = config.get("init_lora_weights", True)
    if start not in _STARTS_THAT_KEEP_THE_BASE:
        hint = "Save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain adapter of it."
        raise ModelError(f"init_lora_weights is {start!r}, which changed the base weights", where=where, hint=hint)
    for key in sorted(config.keys() - _READ - _HARMLESS - {"init_lora_weights"}):
        if config[key] and not (key == "bias" and config[key] == "none"):
            raise ModelError(f"{key} is {config[key]!r}, which is not supported here", where=where)


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Raises ModelError when the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read ({error})", where=str(path)) from error


def fitting_adapter(
    linears: Mapping[str, Adaptable], tensors: Mapping[str, torch.Tensor], *, where: str, may_lack: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of (adapter tensor of the layers, stored value); nothing is changed.

    Args:
        may_lack: tensors of layers may be missing; those are in no pair.

    Raises:
        ArchitectureMismatchError: names or shapes differ.
    """
    mine = adapter_tensors(linears)
    missing, extra = sorted(mine.keys() - tensors.keys()), sorted(tensors.keys() - mine.keys())
    if may_lack:
        mine, missing = {name: value for name, value in mine.items() if name in tensors}, []
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which this model's adapter does not have"
        raise ArchitectureMismatchError(f"the adapter {what}", where=where)
    for name, value in mine.items():
        if value.shape != tensors[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(value.shape)
            raise ArchitectureMismatchError(f"{name} has shape {found}, the model needs {wanted}", where=where)
    return [(value, tensors[name]) for name, value in mine.items()]


@torch.no_grad()
def load_adapter_tensors(linears: Mapping[str, Adaptable], tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Copy adapter values into layers that are adapted already; all or nothing.

    Raises:
        ArchitectureMismatchError: names or shapes differ; the layers are as they were.
    """
    for mine, stored in fitting_adapter(linears, tensors, where=where):
        mine.copy_(stored)
