"""Which engine a run gets: MLX on Apple's GPUs, else torch on CUDA, MPS or the CPU; or the one that was asked for.

It reads what a model's `config.json` asks for, and imports an engine only to make it.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_foundry.engine.base import LocalEngine
from model_foundry.errors import MissingExtraError, UsageError
from model_foundry.models.config import ModelConfig, native_obstacle
from model_foundry.models.folder import read_config
from model_foundry.types import OptimizerKind

EngineName = Literal["auto", "torch", "mlx"]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine, and why it is that one, as half a sentence."""

    name: Literal["torch", "mlx"]
    why: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What of a machine decides."""

    is_apple_silicon: bool
    has_mlx: bool


def this_machine() -> Machine:
    """Looks for MLX and mlx-lm without importing them."""
    return Machine(
        is_apple_silicon=sys.platform == "darwin" and platform.machine() == "arm64",
        has_mlx=all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm")),
    )


def choose_engine(
    asked: EngineName,
    *,
    folder: Path,
    options: Mapping[str, Any],
    optimizer: OptimizerKind = "adamw",
    num_processes: int = 1,
    loss_fn: str = "cross_entropy",
    machine: Machine | None = None,
) -> EngineChoice:
    """The engine for a model and the options that `open_engine` will be given.

    Args:
        machine: default this one.

    Raises:
        MissingExtraError: MLX was asked for and is not installed.
        UsageError: MLX was asked for, and does not do something else that was asked for.
    """
    machine = machine or this_machine()
    if asked == "torch":
        return EngineChoice("torch", "as asked")
    if asked == "auto" and not machine.is_apple_silicon:
        return EngineChoice("torch", "MLX is taken by itself on Apple silicon alone")
    if asked == "auto" and not machine.has_mlx:
        return EngineChoice("torch", "MLX is not installed")
    if not machine.has_mlx:
        raise MissingExtraError("mlx", "mlx")
    obstacle = mlx_obstacle(folder, options, optimizer=optimizer, num_processes=num_processes, loss_fn=loss_fn)
    if obstacle is None:
        return EngineChoice("mlx", "as asked" if asked == "mlx" else "this is Apple silicon, and MLX is installed")
    if asked == "auto":
        return EngineChoice("torch", f"MLX has no {obstacle}")
    raise UsageError(f"the engine mlx has no {obstacle}", where="engine", hint="Leave that out, or set engine=torch.")


def open_engine(name: Literal["torch", "mlx"], options: Mapping[str, Any]) -> LocalEngine:
    """Make the engine. `options` are those of `TorchEngine`; MLX has been found by `mlx_obstacle` to need no others."""
    if name == "torch":
        from model_foundry.engine.torch_engine import TorchEngine

        return TorchEngine(**options)
    from model_foundry.engine.mlx_engine import MlxEngine

    return MlxEngine(**{key: value for key, value in options.items() if key in _MLX_OPTIONS})


def mlx_obstacle(
    folder: Path,
    options: Mapping[str, Any],
    *,
    optimizer: OptimizerKind = "adamw",
    num_processes: int = 1,
    loss_fn: str = "cross_entropy",
) -> str | None:
    """What of all this MLX's engine does not have, or None."""
    wanted = {
        f"model.device={options.get('device')}": options.get("device") == "cuda",
        f"model.dtype={options.get('dtype')} (it would need a loss scale)": options.get("dtype") == "float16",
        f"model.attention={options.get('attention')}": options.get("attention", "auto") != "auto",
        f"model.quantization={options.get('quantization')}": options.get("quantization", "none") != "none",
        "model.implementation=transformers": options.get("implementation") == "transformers",
        "training.num_threads": options.get("num_threads") is not None,
        f"training.optimizer={optimizer}": optimizer != "adamw",
        "several processes": num_processes > 1,
        f"loss of pairs ({loss_fn})": loss_fn.startswith("dpo_"),
    }
    if missing := [what for what, is_wanted in wanted.items() if is_wanted]:
        return missing[0]
    config = read_config(folder)
    if (what := native_obstacle(config)) is not None:
        return f"decoder for this model: {what}"
    return model_obstacle(config)


def model_obstacle(config: Mapping[str, Any]) -> str | None:
    """What of a model that torch's native decoder computes MLX's engine does not, by its `config.json`; or None."""
    shape = ModelConfig.from_hf(config)
    if shape.experts is not None and shape.num_sparse_layers:
        return "mixtures of experts"
    if shape.dropout or shape.attention_dropout:
        return "dropout of a model's own (dropout and attention_dropout in config.json)"
    return None


_MLX_OPTIONS = ("device", "dtype", "micro_batch_tokens", "gradient_checkpointing")
