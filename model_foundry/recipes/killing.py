"""Runs as real processes of the command line, and moments to kill them at: starting up, between steps, in a save.

Knows run folders from the outside, as anyone who watches them; nothing of models.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from model_foundry.checkpoint.atomic import TEMPORARY_PREFIX
from model_foundry.config.commands import RunConfig
from model_foundry.config.load import dump_yaml
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import EvaluationSection, LoggingSection, TrainConfig
from model_foundry.errors import CheckFailedError
from model_foundry.recipes.fresh import work_folder
from model_foundry.run.metrics import read_metrics

POLL_SECONDS = 0.002
RUN_TIMEOUT_SECONDS = 6 * 3600
LATEST_SHARE = 0.85
"""Kills come before this share of the steps: a run must not end while its killer looks the other way."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL: after how many recorded steps, and in the middle of what (start-up, a step, a save)."""

    step: int
    within: str


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How long the undisturbed run was: steps, seconds a step, and seconds before the first."""

    total_steps: int
    step_seconds: float
    start_seconds: float


def bare(config: RunConfig, run_dir: Path) -> RunConfig:
    """The same training without questions, criteria and trackers, in another folder."""
    criteria = type(config.criteria)
    off = {"replay_steps": 0, "metrics": {}}
    nothing = criteria.model_validate({name: off.get(name) for name in criteria.model_fields})
    update = {
        "run_dir": run_dir,
        "criteria": nothing,
        "logging": LoggingSection(level="warning"),
    }
    if isinstance(config, TrainConfig):
        update["evaluation"] = EvaluationSection(suites=())
    if isinstance(config, ExperimentConfig):
        update["work_dir"] = work_folder(config).resolve()
    return config.model_copy(update=update)


def run_to_end(config: RunConfig, run_dir: Path, *, now: str | None = None, piece_tokens: int | None = None) -> Rhythm:
    """Train in a process of its own, or go on with what is there.

    Args:
        piece_tokens: as the run that it repeats recorded it.

    Raises:
        CheckFailedError: it failed by itself; its last line says why.
    """
    started = time.time()
    with _process(config, run_dir, now=now, piece_tokens=piece_tokens) as process:
        code = process.wait(timeout=RUN_TIMEOUT_SECONDS)
    if code != 0:
        raise _failed(code, run_dir)
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "step"]
    seconds = sum(record["clock"]["seconds"] for record in steps)
    first = datetime.fromisoformat(steps[0]["clock"]["time"]).timestamp() - steps[0]["clock"]["seconds"]
    return Rhythm(len(steps), seconds / len(steps), max(0.1, first - started))


def kill_often(
    config: RunConfig,
    run_dir: Path,
    rhythm: Rhythm,
    *,
    kills: int,
    chooser: random.Random,
    piece_tokens: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Kill]:
    """Start and kill one run so often, ever further on; the kills done, fewer when it ended before its moment came.

    Every third kill waits for a save, every fifth falls into the start-up, the others anywhere within a step.
    """
    latest = max(0, int(LATEST_SHARE * rhythm.total_steps) - 1)
    steps = sorted(chooser.randint(0, latest) for _ in range(kills))
    done: list[Kill] = []
    for number, step in enumerate(steps, start=1):
        with _process(config, run_dir, piece_tokens=piece_tokens) as process:
            if number % 5 == 4:
                within = _within_start(process, run_dir, seconds=chooser.random() * rhythm.start_seconds)
            else:
                delay = chooser.random() * rhythm.step_seconds
                within = _at_step(process, run_dir, step=step, latest=latest, delay=delay, save=number % 3 == 0)
            if within is None:
                if process.returncode != 0:
                    raise _failed(process.returncode, run_dir)
                return done
            process.kill()
            process.wait()
        done.append(Kill(max(0, last_step(run_dir)), within))
        say(f"  kill {number} of {kills}: within {within}, after step {done[-1].step} of {rhythm.total_steps}")
    return done


def _within_start(process: subprocess.Popen[bytes], run_dir: Path, *, seconds: float) -> str | None:
    """Wait so long, or until this process has taken the run over: start-up is past then."""
    before, deadline = _times_resumed(run_dir), time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= deadline or _times_resumed(run_dir) > before:
            return "start-up"
        time.sleep(POLL_SECONDS)
    return None


def _at_step(
    process: subprocess.Popen[bytes], run_dir: Path, *, step: int, latest: int, delay: float, save: bool
) -> str | None:
    """Wait until this process has taken the run over and recorded `step`, then for a save or `delay` seconds.

    Returns:
        What it is in the middle of; None when it ended first.
    """
    before = _times_resumed(run_dir)
    taken_over, reached = False, None
    while process.poll() is None:
        taken_over = taken_over or _times_resumed(run_dir) > before
        at = last_step(run_dir) if taken_over else -1
        if reached is None and at >= step:
            reached = time.monotonic()
        if reached is not None:
            if _is_saving(run_dir):
                if save:
                    return "a save"
            elif not save or at >= latest:
                time.sleep(delay)
                return "a save" if _is_saving(run_dir) else "a step"
        time.sleep(POLL_SECONDS)
    return None


def _times_resumed(run_dir: Path) -> int:
    """How often the run was taken up again; -1 before it was created."""
    try:
        return len(json.loads((run_dir / "run.json").read_bytes())["resumed"])
    except (FileNotFoundError, ValueError, KeyError):
        return -1


def last_step(run_dir: Path) -> int:
    """The last step recorded, from the end of the file alone; 0 before the first."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def _is_saving(run_dir: Path) -> bool:
    try:
        return any(path.name.startswith(TEMPORARY_PREFIX) for path in (run_dir / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


@contextmanager
def _process(
    config: RunConfig, run_dir: Path, *, now: str | None = None, piece_tokens: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`foundry train --resume auto` on the bare configuration; never left running."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(dump_yaml(bare(config, run_dir)))
    # The environment must not override the file: it is resolved already.
    sections = tuple(f"{name.upper()}_" for name in type(config).model_fields)
    environ = {key: value for key, value in os.environ.items() if not key.startswith((*sections, "FOUNDRY_RUN_DIR"))}
    environ.pop("FOUNDRY_SEED", None)
    options = ["--resume", "auto", *([] if now is None else ["--now", now])]
    options += [] if piece_tokens is None else ["--piece-tokens", str(piece_tokens)]
    command = [sys.executable, "-m", "model_foundry", "train", str(path), *options]
    with open(_log(run_dir), "ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _log(run_dir: Path) -> Path:
    return run_dir.parent / f"{run_dir.name}.log"


def _failed(code: int, run_dir: Path) -> CheckFailedError:
    last = (_log(run_dir).read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    return CheckFailedError(f"the run ended with exit code {code}: {last}", where=str(_log(run_dir)))
