"""The plan of a model whose weights are not here: parameters, memory by part and which machines fit, from config.json.

No step is measured and no row is read, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import TrainConfig
from model_foundry.models.config import HEAD_LAYER, ModelConfig
from model_foundry.models.folder import read_config, read_json
from model_foundry.models.hardware import DEVICES, parameters_by_part, ways_to_train
from model_foundry.recipes.fresh import shape_of, tokenizer_folder
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import LoraConfig

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf")
DEFAULT_ROWS = (2048,)
BYTES_TO_TRAIN = 16
"""A parameter trained in float32: itself, its gradient and two moments."""


def config_without_weights(name: str) -> Path | None:
    """The config.json that a name means: the file itself, or that of a folder without weights; None for a model."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if not (path / "config.json").is_file() or (path / "run.json").exists():
        return None
    return None if any(file for pattern in WEIGHTS for file in path.glob(pattern)) else path / "config.json"


def plan_of_config(config: TrainConfig) -> dict[str, Any] | None:
    """What `--dry-run` can say of a model without weights; None where they are there.

    Raises:
        ModelError: the file is no config.json of a kind that the native decoder computes.
    """
    path = config_without_weights(config.model.name)
    if path is None:
        return None
    rows = (config.data.max_length,) * config.training.batch_size
    section = config.lora
    lora = LoraConfig(r=section.r, lora_alpha=section.lora_alpha, use_dora=section.use_dora)
    raw = read_json(path)
    adapted = _kinds(ModelConfig.from_hf(raw, where=str(path)), section.target_modules)
    checkpointing = config.training.gradient_checkpointing
    return shape_facts(path, rows=rows, lora=lora, adapted=adapted, gradient_checkpointing=checkpointing)


def shape_facts(
    path: Path,
    *,
    rows: tuple[int, ...] = DEFAULT_ROWS,
    lora: LoraConfig | None = None,
    adapted: Collection[str] | None = None,
    gradient_checkpointing: bool = True,
) -> dict[str, Any]:
    """The plan as JSON values.

    Args:
        path: a config.json, or the folder that holds it.
        rows: tokens of each row of a batch.

    Raises:
        ModelError: it cannot be read, or is of a kind that the native decoder does not compute.
    """
    raw = read_config(path) if path.is_dir() else read_json(path)
    return _facts(
        raw, where=str(path), rows=rows, lora=lora, adapted=adapted, gradient_checkpointing=gradient_checkpointing
    )


def plan_too_large(config: ExperimentConfig) -> dict[str, Any] | None:
    """What `--dry-run` can say of a model from nothing that this machine has no memory for; None where it has.

    Only the shape is looked at: no text is packed and no weight is drawn.
    """
    if config.model.name is not None or config.model.architecture == "gpt2":
        return None
    raw = shape_of(config, Tokenizer.load(tokenizer_folder(config)))
    shape = ModelConfig.from_hf(raw, where="model")
    if shape.num_parameters * BYTES_TO_TRAIN < psutil.virtual_memory().available:
        return None
    rows = (config.data.max_length or shape.max_position_embeddings,) * config.training.batch_size
    return _facts(
        raw, where="model", rows=rows, lora=None, adapted=None,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )  # fmt: skip


def _facts(
    raw: Mapping[str, Any],
    *,
    where: str,
    rows: tuple[int, ...],
    lora: LoraConfig | None,
    adapted: Collection[str] | None,
    gradient_checkpointing: bool,
) -> dict[str, Any]:
    shape = ModelConfig.from_hf(raw, where=where)
    ways = ways_to_train(
        shape, rows=rows, lora=lora or LoraConfig(), adapted=adapted, gradient_checkpointing=gradient_checkpointing
    )
    return {
        "config": where,
        "architecture": shape.architecture,
        "num_parameters": shape.num_parameters,
        "num_active_parameters": shape.num_active_parameters,
        "parameters_by_part": parameters_by_part(shape),
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "max_length": shape.max_position_embeddings,
        "rows": list(rows),
        "gradient_checkpointing": gradient_checkpointing,
        "measured": False,
        "ways": [way.as_dict() for way in ways],
        "devices": {device.name: device.memory_bytes for device in DEVICES},
    }


def shape_text(facts: Mapping[str, Any]) -> str:
    """The plan as a person reads it."""
    parts = " · ".join(f"{name} {count / 1e6:,.1f} M" for name, count in facts["parameters_by_part"].items())
    rows = facts["rows"]
    again = ", each layer computed again in the backward pass" if facts["gradient_checkpointing"] else ""
    count = f"{len(rows)} rows" if len(rows) > 1 else "one row"
    lines = [
        f"model       {facts['architecture']} · {facts['num_layers']} layers · width {facts['hidden_size']:,} · "
        f"{facts['vocab_size']:,} tokens · context {facts['max_length']:,}",
        f"parameters  {facts['num_parameters']:,}{_active(facts)}",
        f"            {parts}",
        f"assumed     {count} of {max(rows):,} tokens{again}, in bfloat16",
        "            arithmetic from config.json alone: the weights are not here, and no step was measured",
        "",
        *_memory_table(facts["ways"]),
        "",
        "spare GB on one device; what is negative does not fit, and n/a does not run there at all",
        *_device_table(facts["ways"], facts["devices"]),
    ]
    return "\n".join(lines)


def _active(facts: Mapping[str, Any]) -> str:
    active = facts["num_active_parameters"]
    return "" if active == facts["num_parameters"] else f", {active:,} of them met by one token"


def _memory_table(ways: list[dict[str, Any]]) -> list[str]:
    names = list(ways[0]["memory"])
    width = max(len(way["way"]) for way in ways)
    head = f"{'GB of memory':<{width}}  {'trained M':>10}" + "".join(f"  {name:>11}" for name in names)
    rows = [
        f"{way['way']:<{width}}  {way['trained_parameters'] / 1e6:>10,.1f}"
        + "".join(f"  {way['memory'][name] / 1e9:>11,.1f}" for name in names)
        for way in ways
    ]
    return [head, *rows]


def _device_table(ways: list[dict[str, Any]], devices: Mapping[str, int]) -> list[str]:
    usable = "GB that a program may use"
    width = max(len(usable), *(len(way["way"]) for way in ways))
    head = " " * width + "".join(f"  {name:>12}" for name in devices)
    rows = []
    for way in ways:
        spare = (way["spare_bytes"][name] for name in devices)
        cells = ("n/a" if value is None else f"{value / 1e9:+,.1f}" for value in spare)
        rows.append(f"{way['way']:<{width}}" + "".join(f"  {cell:>12}" for cell in cells))
    sizes = "".join(f"  {size / 1e9:>12,.0f}" for size in devices.values())
    return [head, f"{usable:<{width}}{sizes}", *rows]


def _kinds(shape: ModelConfig, target_modules: str | tuple[str, ...]) -> list[str] | None:
    """The kinds of linear layers that `lora.target_modules` names; None for all-linear.

    Raises:
        ModelError: a name that matches nothing.
    """
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return None
    from model_foundry.models.targets import matching_names

    names = {
        f"model.layers.{layer}.{name}": name
        for layer in range(shape.num_hidden_layers)
        for name in shape.layer_linears(layer)
    }
    names[HEAD_LAYER] = HEAD_LAYER
    found = {names[name] for name in matching_names(list(names), target_modules)}
    singled = {kind: kind.replace("mlp.experts.", "mlp.experts.0.") for kind in shape.linear_kinds}
    return [kind for kind, single in singled.items() if single in found] + [HEAD_LAYER] * (HEAD_LAYER in found)
