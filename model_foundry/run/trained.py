"""How a run's model was trained, from the run's own record: what whoever asks the model later has to keep to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from model_foundry.errors import RunError
from model_foundry.run.directory import RunDirectory, is_run, utc_now

_KEPT = ("dtype", "implementation", "quantization", "template")


def run_of(name: str) -> Path | None:
    """The run that `model.name` names, or that the checkpoint or adapter which it names lies in; else None."""
    path = Path(name).expanduser()
    return next((each for each in (path, *path.parents[:3]) if is_run(each)), None)


def trained_model_fields(name: str) -> tuple[dict[str, Any], datetime]:
    """Fields of `model` as the run that `name` names had them, none where it names no run; and the date that the
    template saw.
    """
    run = run_of(name)
    if run is None:
        return {}, utc_now()
    facts = RunDirectory.read(run).facts
    stored, started_in = stored_section(facts, "model")
    fields = {key: value for key, value in stored.items() if key in _KEPT}
    if str(fields.get("template", "")).endswith(".jinja"):
        fields["template"] = str(started_in / fields["template"])
    return fields, datetime.fromisoformat(facts["now"]) if "now" in facts else utc_now()


def stored_section(facts: Mapping[str, Any], section: str) -> tuple[dict[str, Any], Path]:
    """A section of the configuration that a run's record holds, and the folder that its relative paths mean.

    Raises:
        RunError: the record lacks them.
    """
    try:
        return dict(facts["config"][section]), Path(facts["receipt"]["working_directory"])
    except (KeyError, TypeError) as error:
        raise RunError(f"the run's record lacks {error}", where="run.json") from error
