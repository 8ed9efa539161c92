"""What an engine writes and reads: weights by layout, optimizer moments, and the facts a continuation needs.

Reading is in two steps, so that nothing is changed until everything fits. It knows nothing of batches or model ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model_foundry.checkpoint.tensors import read_tensors, write_tensors
from model_foundry.errors import ArchitectureMismatchError, CheckpointError
from model_foundry.models.adapter import read_adapter_config
from model_foundry.models.folder import fill_model_folder, read_config
from model_foundry.models.lora import Adaptable
from model_foundry.models.targets import select_targets
from model_foundry.types import LoraConfig, OptimizerKind

STATE_FORMAT = 1
MOMENTS_NAME = "optimizer.safetensors"
_FACTS = {"optimizer_step": int, "counter_step": int, "seed": int}


def write_state(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """What `read_state` reads."""
    part = folder / "state"
    part.mkdir()
    write_tensors(part / MOMENTS_NAME, tensors)
    (part / "engine.json").write_text(json.dumps(dict(facts), indent=1, sort_keys=True) + "\n")


def read_state(folder: Path, *, engine: str = "torch") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Moments and facts of a checkpoint's `state/`; raises as `read_facts`."""
    facts = read_facts(folder, engine=engine)
    return read_tensors(folder / "state" / MOMENTS_NAME), facts


def read_facts(folder: Path, *, engine: str = "torch") -> dict[str, Any]:
    """What beside tensors a checkpoint's `state/` holds.

    Args:
        engine: the kind that is to go on from it.

    Raises:
        CheckpointError: there is none, or it belongs to another kind of engine.
    """
    path = folder / "state" / "engine.json"
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        hint = "Load the weights alone; the optimizer then starts afresh."
        raise CheckpointError(f"holds no optimizer state ({error})", where=str(folder), hint=hint) from error
    if not isinstance(facts, dict) or (facts.get("engine"), facts.get("format")) != (engine, STATE_FORMAT):
        found = facts if not isinstance(facts, dict) else f"{facts.get('engine')!r}, format {facts.get('format')}"
        raise CheckpointError(
            f"the optimizer state was written by the engine {found}",
            where=str(folder),
            hint="Load the weights alone, or use the engine that wrote it.",
        )
    for key, kind in _FACTS.items():
        if not isinstance(facts.get(key), kind):
            raise CheckpointError(f"{key} is {facts.get(key)!r}", where=str(path))
    return {"world_size": 1, **facts}


def differences(facts: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences on what differs from the machine that wrote a state, so that the bits may differ from here on."""
    return tuple(
        f"{key} was {facts.get(key)} when this was saved and is {here[key]} now; the last bits may differ"
        for key in ("torch", "mlx", "device", "dtype", "num_threads", "world_size")
        if key in here and facts.get(key) != here[key]
    )


def require_optimizer(facts: Mapping[str, Any], kind: OptimizerKind, *, where: str) -> None:
    """Refuse the state of another optimizer.

    Raises:
        CheckpointError: naming both.
    """
    if (stored := facts.get("optimizer", "adamw")) != kind:
        raise CheckpointError(
            f"the optimizer state is {stored}'s, and the model was created to be trained by {kind}", where=where,
            hint=f"Load the weights alone, or train on with {stored} (training.optimizer={stored}).",
        )  # fmt: skip


def agreed_lora(
    adapter: Path, asked: LoraConfig | None, linears: Mapping[str, Adaptable], *, may_lack: bool = False
) -> LoraConfig:
    """The stored adapter's shape, with the dropout asked for; what the two say about the function must agree.

    Args:
        may_lack: the stored one may leave out layers.

    Raises:
        ModelError: the adapter's configuration cannot be used.
        ArchitectureMismatchError: it is another function than the one asked for.
    """
    stored = read_adapter_config(adapter)
    if asked is None:
        return stored
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        # The same scale may be written in two ways, and is for experts.
        same_scale = key in ("lora_alpha", "use_rslora") and math.isclose(stored.scaling, asked.scaling, rel_tol=1e-9)
        if getattr(stored, key) != getattr(asked, key) and not same_scale:
            raise ArchitectureMismatchError(
                f"the adapter has {key}={getattr(stored, key)}; {getattr(asked, key)} was asked for", where=str(adapter)
            )
    layers = select_targets(linears, stored.target_modules, every_target=False)
    wanted = select_targets(linears, asked.target_modules)
    differing = sorted(set(layers) - set(wanted) if may_lack else set(layers) ^ set(wanted))
    if differing:
        which = "adapts" if differing[0] in layers else "leaves out"
        raise ArchitectureMismatchError(
            f"the adapter {which} {differing[0]}, other than the target_modules asked for", where=str(adapter),
            hint="Name in target_modules what it adapts; a service's train_unembed says whether that is the head too.",
        )  # fmt: skip
    return replace(asked, target_modules=stored.target_modules)


def write_full_weights(folder: Path, base: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A Hugging Face folder into an existing empty one: the base's configuration and tokenizer, these weights.

    `config.json` names the type that the weights have, for transformers loads them in the type that it names.
    """
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    config = read_config(base) | {"dtype": dtype, "torch_dtype": dtype}
    fill_model_folder(folder, config, tensors.items(), tokenizer_from=base)
