"""What a tier did: its steps, its checks, what was missing. Nothing is judged by eye; no training is a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class StepFailed(Exception):
    """A step did not do what it is for."""


class ToolMissing(Exception):
    """Something that this machine does not have; the step is left out and named."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: passed, failed or missing, and why."""

    name: str
    status: str
    seconds: float
    said: str


@dataclass(slots=True)
class Tier:
    """One tier while it runs.

    Attributes:
        folder: where its files are; empty at the start.
        limit_seconds: how long it may take on a laptop; reported, not judged, for a busy machine is no fault.
        model: what it trains, where that is one of a name.
        num_runs: training runs that finished.
    """

    name: str
    folder: Path
    limit_seconds: int
    model: str | None = None
    steps: list[Step] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    num_runs: int = 0
    seconds: float = 0.0

    def step(self, name: str, action: Callable[[], T]) -> T | None:
        """Do it and note it; None where it failed or could not be done, and the rest goes on."""
        started, value, status, said = time.monotonic(), None, "passed", ""
        try:
            value = action()
        except ToolMissing as error:
            status, said = "missing", str(error)
        except StepFailed as error:
            status, said = "failed", str(error)
        except Exception as error:
            status, said = "failed", f"{type(error).__name__}: {error}"
        self.steps.append(Step(name, status, round(time.monotonic() - started, 1), said))
        print(f"  {status:8}{self.steps[-1].seconds:7.1f} s  {name}{': ' + said if said else ''}", flush=True)
        return value

    def check(self, name: str, passed: bool, *, value: Any, bound: str) -> None:
        self.checks.append({"name": name, "passed": bool(passed), "value": value, "bound": bound})
        print(f"  {'passed' if passed else 'FAILED':8}          {name} = {value} ({bound})", flush=True)

    def take_checks(self, run: Path, *, required: tuple[str, ...]) -> None:
        """The checks that a run's own report has made; one that is required and was not made has failed."""
        made = {check["name"]: check for check in json.loads((run / "report.json").read_text())["checks"]}
        for name in required:
            found = made.get(name, {"passed": False, "value": "not measured", "bound": "measured"})
            self.check(name, found["passed"], value=found["value"], bound=found["bound"])

    @property
    def missing(self) -> list[str]:
        return [f"{step.name}: {step.said}" for step in self.steps if step.status == "missing"]

    @property
    def failures(self) -> list[str]:
        """Why it has not passed; empty where it has."""
        failed = [f"{step.name}: {step.said}" for step in self.steps if step.status == "failed"]
        wrong = [check for check in self.checks if not check["passed"]]
        failed += [f"{check['name']} is {check['value']}, not {check['bound']}" for check in wrong]
        return failed + ([] if self.num_runs else ["nothing was trained"])

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.model,
            "passed": not self.failures,
            "failures": self.failures,
            "missing": self.missing,
            "training_runs": self.num_runs,
            "seconds": round(self.seconds, 1),
            "limit_seconds": self.limit_seconds,
            "steps": [{"name": s.name, "status": s.status, "seconds": s.seconds, "said": s.said} for s in self.steps],
            "checks": self.checks,
        }


def foundry(*arguments: object, env: Mapping[str, str] | None = None, ok: tuple[int, ...] = (0,)) -> str:
    """`foundry ARGUMENTS` as a process of its own; its standard output.

    Raises:
        StepFailed: another exit code, with the last lines that it said.
    """
    command = [sys.executable, "-m", "model_foundry", *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode not in ok:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise StepFailed(f"foundry {' '.join(map(str, arguments))} ended with {done.returncode}: {said}")
    return done.stdout


def said(*arguments: object, env: Mapping[str, str] | None = None, ok: tuple[int, ...] = (0,)) -> Any:
    """`foundry ARGUMENTS --json`, read."""
    return json.loads(foundry(*arguments, "--json", env=env, ok=ok))


def require(holds: bool, what: str) -> None:
    """Raises StepFailed: what was to hold does not."""
    if not holds:
        raise StepFailed(what)
