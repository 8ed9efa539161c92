"""What a run has to show, as report.json for programs and report.html for people.

The page is written from report.json and metrics.jsonl alone, so it can be written again at any time. Knows dicts of
numbers and texts; does not know how they were measured, and judges nothing: checks come in judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.errors import RunError
from model_foundry.run.metrics import read_metrics
from model_foundry.run.page import render_page
from model_foundry.types import Check

JSON_NAME, PAGE_NAME = "report.json", "report.html"
PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"
_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a report says. Sections are dicts of JSON values; an empty one is left out of the page.

    Sections show whatever they hold, a line a key. Names ending in `_bytes`, `_seconds`, `_share` get their unit. Keys
    with a place of their own on the page, all of them optional:

    Attributes:
        run_id: the run's name.
        checks: every criterion, judged.
        training: `model`, `method`, `steps`, `first_loss`, `last_loss`, `seconds`, `tokens_per_second`.
        evaluation: `Comparison.as_dict()` (before, after, improved, …, cases), or {}.
        text: `bits_per_byte` {way: bits} of the held-out text and its size in `bytes`, after pretraining; or {}.
        data: by file ("train", "validation", "heldout"): `file`, `rows`, `kept`, `dropped`, `truncated`, `tokens`,
            `trained_tokens`, `reasons` {reason: rows}, `first_dropped` [text].
        gate: what the gate found in the training rows: `checks` with examples, `facts`, `action`, `passed`; or {}.
        memory: `parts` {name: bytes} as predicted, `predicted_bytes`, `measured_bytes`, `lora_bytes`, `full_bytes`.
        reproduce: `commands` [text]; hashes, revision, seed.
        machine: the receipt's facts.
        notes: sentences that a reader must not miss (steps skipped, memory that ran out, a resume).
    """

    run_id: str
    checks: tuple[Check, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    reproduce: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """passed, failed, or unchecked where no criterion was asked for."""
        if not self.checks:
            return UNCHECKED
        return PASSED if all(check.passed for check in self.checks) else FAILED

    def as_dict(self) -> dict[str, Any]:
        """The shape of report.json."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        values["checks"] = [check.as_dict() for check in self.checks]
        values["notes"] = list(self.notes)
        return {"run_id": values.pop("run_id"), "verdict": self.verdict, **values}


def write_report(run_dir: Path, report: Report) -> Path:
    """Write report.json, then report.html from it and metrics.jsonl; the page's path.

    Raises:
        RunError: metrics.jsonl cannot be read, a value is not JSON, or the folder cannot be written.
    """
    try:
        data = orjson.dumps(report.as_dict(), option=_OPTIONS) + b"\n"
    except TypeError as error:
        raise RunError(f"the report holds something that is not JSON ({error})", where=str(run_dir)) from error
    _write(run_dir / JSON_NAME, data)
    return write_page(run_dir)


def write_page(run_dir: Path) -> Path:
    """Write report.html again from report.json and metrics.jsonl; its path.

    Raises:
        RunError: one of them is missing or cannot be read, or the folder cannot be written.
    """
    report = read_report(run_dir)
    metrics_path = run_dir / "metrics.jsonl"
    records = read_metrics(metrics_path) if metrics_path.exists() else []
    page = run_dir / PAGE_NAME
    _write(page, render_page(report.as_dict(), records).encode("utf-8", "replace"))
    return page


def read_report(run_dir: Path) -> Report:
    """A run's report as it was written.

    Raises:
        RunError: there is none yet, or it cannot be read.
    """
    path = run_dir / JSON_NAME
    try:
        values = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError(
            "has no report.json yet", where=str(run_dir), hint=f"Let it finish first: foundry resume {run_dir}"
        ) from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise RunError(f"cannot be read ({error})", where=str(path)) from error
    try:
        return _report_of(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"is not a run's report ({type(error).__name__}: {error})", where=str(path)) from error


def _report_of(values: Mapping[str, Any]) -> Report:
    sections = ("training", "evaluation", "text", "data", "gate", "memory", "reproduce", "machine")
    checks = tuple(
        Check(str(each["name"]), each["passed"] is True, each["value"], str(each["bound"]), str(each["evidence"]))
        for each in values["checks"]
    )
    notes = tuple(str(note) for note in values.get("notes", ()))
    facts: dict[str, Any] = {name: dict(values.get(name) or {}) for name in sections}
    return Report(run_id=str(values["run_id"]), checks=checks, notes=notes, **facts)


def _write(path: Path, data: bytes) -> None:
    try:
        atomic_write(path, data)
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror or error})", where=str(path)) from error
