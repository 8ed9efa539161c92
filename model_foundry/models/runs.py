"""What a run directory, a checkpoint or an adapter folder says about its model.

It knows the layout `runs/<run>/checkpoints/<name>/{adapter|model}/` and nothing of how models are found.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from model_foundry.checkpoint.manifest import read_manifest
from model_foundry.checkpoint.store import FINAL, CheckpointStore
from model_foundry.errors import CheckpointError, ModelError, ModelNotFoundError
from model_foundry.models.folder import read_json

PARTS = ("adapter", "model")
SERVICE_SCHEME = "tinker://"


def checkpoint_of_run(run: Path) -> tuple[Path, list[str]]:
    """The run's newest checkpoint that verifies to the last byte, and what there is to say about the choice.

    Raises:
        ModelError: it has none.
    """
    notes: list[str] = []
    checkpoint = CheckpointStore(run / "checkpoints").newest_valid(notes.append)
    if checkpoint is None:
        hint = f"{notes[-1]}." if notes else "Train it first, or go on with it: foundry resume RUN"
        raise ModelError("the run has no checkpoint that can be used", where=str(run), hint=hint)
    if checkpoint.name != FINAL:
        notes.append(f"{run}: the run has not finished; using {checkpoint.name}")
    return checkpoint.path, notes


def is_service_path(name: str) -> bool:
    """Whether a name is a checkpoint as clients of the training service name it: `tinker://RUN/weights/NAME`."""
    return name.startswith(SERVICE_SCHEME)


def service_checkpoint(name: str, state: Path | None = None) -> Path:
    """The folder of a `tinker://` path in a service's state, which is by default FOUNDRY_STATE_DIR or runs/service.

    Raises:
        ModelNotFoundError: it is not there, or no such path.
    """
    state = state or Path(os.environ.get("FOUNDRY_STATE_DIR", "runs/service"))
    match = re.fullmatch(
        r"([A-Za-z0-9:_-]+)/((?:sampler_|external_)?weights)/([A-Za-z0-9][\w.-]*)",
        name[len(SERVICE_SCHEME) :],
    )
    if match is None:
        raise ModelNotFoundError("it is not written as tinker://RUN/weights/NAME", where=name)
    folder = state / "runs" / match[1].replace(":", "-") / match[2] / match[3]
    if not folder.is_dir():
        hint = f"Looked in {state}; set FOUNDRY_STATE_DIR to the state_dir of the service that saved it."
        raise ModelNotFoundError("there is no such checkpoint here", where=name, hint=hint)
    return folder


def checkpoint_part(checkpoint: Path) -> Path | None:
    """The `adapter` or `model` folder of a checkpoint, or None."""
    return next((checkpoint / part for part in PARTS if (checkpoint / part).is_dir()), None)


def run_base(adapter: Path) -> str | None:
    """The base model as the run's configuration names it, for an adapter inside a run; else None.

    A relative folder means the folder that the run was started in, wherever we are now.
    """
    run = adapter.parent.parent.parent
    if adapter.parent.parent.name != "checkpoints" or not (run / "run.json").is_file():
        return None
    facts = read_json(run / "run.json")
    config, receipt = facts.get("config"), facts.get("receipt")
    model = config.get("model") if isinstance(config, dict) else None
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(name, str):
        return None
    started_in = receipt.get("working_directory") if isinstance(receipt, dict) else None
    if isinstance(started_in, str) and Path(started_in, name).exists():
        return str(Path(started_in, name))
    return name


def adapter_base(adapter: Path) -> str:
    """The base model that `adapter_config.json` names; a path beside the adapter is taken from there.

    Raises:
        ModelError: it names none.
    """
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        what = "base_model_name_or_path is missing, so the model under this adapter is not known"
        raise ModelError(what, where=str(adapter / "adapter_config.json"))
    return str(adapter / base) if not Path(base).exists() and (adapter / base).is_dir() else base


def trained_on(adapter: Path) -> str | None:
    """Fingerprint of the base that a checkpoint's adapter was trained on, where its manifest says so."""
    try:
        metadata = read_manifest(adapter.parent).fields.get("metadata")
    except CheckpointError:
        return None
    value = metadata.get("model") if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else None
