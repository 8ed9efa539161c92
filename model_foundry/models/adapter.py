"""LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Options of PEFT that change what an adapter computes and that we do not compute are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model_foundry.checkpoint.tensors import write_tensors
from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.models.folder import read_json
from model_foundry.models.lora import Linear
from model_foundry.types import LoraConfig

PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
# What each of PEFT's options must be for the adapter to mean what we compute; all else is a matter of training only.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, True),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "eva_config": (None,),
    "corda_config": (None,),
    "loftq_config": (None, {}),
}


def adapter_tensors(linears: Mapping[str, Linear]) -> dict[str, torch.Tensor]:
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


def target_names(linears: Mapping[str, Linear]) -> list[str]:
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
    for key, allowed in _NEUTRAL.items():
        if key in config and config[key] not in allowed:
            raise ModelError(f"{key} is {config[key]!r}, which is not supported here", where=where)
    targets = config.get("target_modules")
    return LoraConfig(
        r=int(config["r"]),
        lora_alpha=float(config.get("lora_alpha", 8)),
        lora_dropout=float(config.get("lora_dropout", 0.0)),
        target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
    )


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Raises ModelError when the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read ({error})", where=str(path)) from error


@torch.no_grad()
def load_adapter_tensors(linears: Mapping[str, Linear], tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Copy adapter values into layers that are adapted already; all or nothing.

    Raises:
        ArchitectureMismatchError: names or shapes differ; the layers are as they were.
    """
    mine = adapter_tensors(linears)
    missing, extra = sorted(mine.keys() - tensors.keys()), sorted(tensors.keys() - mine.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which this model's adapter does not have"
        raise ArchitectureMismatchError(f"the adapter {what}", where=where)
    for name, value in mine.items():
        if value.shape != tensors[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(value.shape)
            raise ArchitectureMismatchError(f"{name} has shape {found}, the model needs {wanted}", where=where)
    for name, value in mine.items():
        value.copy_(tensors[name])
