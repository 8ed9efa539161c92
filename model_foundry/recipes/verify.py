"""Proofs that anyone can repeat: a run killed again and again ends as if it never was; a run can be run again.

The runs are real processes of the same command line, killed with SIGKILL.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model_foundry.checkpoint.atomic import TEMPORARY_PREFIX
from model_foundry.checkpoint.compare import compare_checkpoints
from model_foundry.config.load import dump_yaml
from model_foundry.config.schema import CriteriaSection, EvaluationSection, LoggingSection, TrainConfig
from model_foundry.errors import CheckFailedError
from model_foundry.recipes.preparation import require_same_data
from model_foundry.run.directory import RunDirectory
from model_foundry.run.metrics import comparable_lines, read_metrics
from model_foundry.run.receipts import receipt
from model_foundry.types import Check

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.005
RUN_TIMEOUT_SECONDS = 6 * 3600


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL: after how many recorded steps, and whether a save was being written at that moment."""

    step: int
    in_save: bool


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How long the undisturbed run was, and how long one of its steps took."""

    total_steps: int
    step_seconds: float


def bare(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """The same training without questions, criteria and trackers, in another folder."""
    nothing = CriteriaSection(
        loss_fall=None, answers_improved=None, memory_saving=None, parameters_changed=None, replay_steps=0
    )
    update = {
        "run_dir": run_dir,
        "evaluation": EvaluationSection(),
        "criteria": nothing,
        "logging": LoggingSection(level="warning"),
    }
    return config.model_copy(update=update)


def verify_resume(
    config: TrainConfig, *, kills: int, keep: Path | None = None, seed: int = 0, say: Callable[[str], None] = print
) -> list[Check]:
    """Run once undisturbed and once killed `kills` times and resumed, and compare every bit.

    Args:
        keep: leave both runs here; default a temporary folder that goes when all is well.
        seed: chooses the moments.

    Raises:
        CheckFailedError: a run failed by itself.
    """
    with _folder(keep) as folder:
        straight, broken = folder / "straight", folder / "killed"
        say(f"1 of 2: undisturbed, in {straight}")
        _finish(_start(config, straight), straight)
        rhythm = _rhythm(straight)
        say(f"2 of 2: killed {kills} times and resumed, in {broken}")
        done = _kill_often(config, broken, rhythm, kills=kills, chooser=random.Random(seed), say=say)
        _finish(_start(config, broken), broken)
        return [*compare_runs(straight, broken), _kills_check(done, kills)]


def verify_run(
    run: Path, config: TrainConfig, *, keep: Path | None = None, say: Callable[[str], None] = print
) -> list[Check]:
    """Run it again from its own folder, and compare every bit with what it left.

    Raises:
        RunError: its data or its model have changed since.
    """
    recorded = RunDirectory.read(run)
    facts = recorded.facts
    files = {role: Path(each["path"]) for role, each in facts["receipt"]["data"].items()}
    model_fingerprint = _fingerprint(config)
    now = receipt(argv=(), config_digest="", data_files=files, model_fingerprint=model_fingerprint)
    require_same_data(facts["receipt"], now, where=str(run))
    differences = [
        f"{name} {facts['receipt']['packages'].get(name)} → {now['packages'].get(name)}"
        for name in ("torch", "numpy", "tokenizers")
        if facts["receipt"]["packages"].get(name) != now["packages"].get(name)
    ]
    if facts["receipt"]["code"]["sha256"] != now["code"]["sha256"]:
        differences.append("the code of model_foundry")
    if differences:
        say(f"changed since that run: {', '.join(differences)}")
    with _folder(keep) as folder:
        again = folder / "again"
        say(f"running {run} again, in {again}")
        _finish(_start(config, again, now=facts["now"]), again)
        return compare_runs(run, again)


def compare_runs(first: Path, second: Path) -> list[Check]:
    """Final weights, optimizer state and metrics of two finished runs, bit by bit."""
    differences = compare_checkpoints(first / "checkpoints" / "final", second / "checkpoints" / "final")
    lines = [comparable_lines(run / "metrics.jsonl") for run in (first, second)]
    bad = next((n for n, (a, b) in enumerate(zip(*lines, strict=False), start=1) if a != b), None)
    if bad is None and len(lines[0]) != len(lines[1]):
        bad = min(len(lines[0]), len(lines[1])) + 1
    return [
        Check(
            name="final_checkpoint_identical",
            passed=not differences,
            value=f"{len(differences)} files differ",
            bound="0 files differ",
            evidence=differences[0] if differences else "Weights and optimizer state are equal in every bit.",
        ),
        Check(
            name="metrics_identical",
            passed=bad is None,
            value=f"{len(lines[1])} records" if bad is None else f"record {bad} differs",
            bound=f"{len(lines[0])} records, equal but for the clock",
            evidence=f"{first / 'metrics.jsonl'} and {second / 'metrics.jsonl'}",
        ),
    ]


def _kill_often(
    config: TrainConfig,
    run_dir: Path,
    rhythm: Rhythm,
    *,
    kills: int,
    chooser: random.Random,
    say: Callable[[str], None],
) -> list[Kill]:
    """Kill at steps spread over the run, every third time in the middle of a save when one comes by."""
    steps = sorted(chooser.randint(0, max(0, rhythm.total_steps - 2)) for _ in range(kills))
    done: list[Kill] = []
    for number, step in enumerate(steps, start=1):
        process = _start(config, run_dir)
        delay = chooser.random() * rhythm.step_seconds
        in_save = _wait_for_moment(process, run_dir, step, rhythm, delay=delay, want_save=number % 3 == 0)
        if in_save is None:
            _finish(process, run_dir)
            break  # it ended before the moment came
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        at = _last_step(run_dir)
        done.append(Kill(at, in_save))
        say(
            f"  kill {number} of {kills}: after step {at} of {rhythm.total_steps}{', in the middle of a save' if in_save else ''}"
        )
    return done


def _wait_for_moment(
    process: subprocess.Popen[bytes], run_dir: Path, step: int, rhythm: Rhythm, *, delay: float, want_save: bool
) -> bool | None:
    """Wait until `step` is recorded and `delay` seconds longer, or for a save if one comes before the end.

    Returns:
        Whether a save was being written; None when the run ended first.
    """
    while _last_step(run_dir) < step:
        if process.poll() is not None:
            return None
        time.sleep(POLL_SECONDS)
    reached = time.monotonic()
    while time.monotonic() - reached < delay or want_save:
        if process.poll() is not None:
            return None
        if want_save and (_is_saving(run_dir) or _last_step(run_dir) >= rhythm.total_steps - 1):
            break
        time.sleep(POLL_SECONDS)
    return _is_saving(run_dir)


def _is_saving(run_dir: Path) -> bool:
    try:
        return any(path.name.startswith(TEMPORARY_PREFIX) for path in (run_dir / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


def _start(config: TrainConfig, run_dir: Path, *, now: str | None = None) -> subprocess.Popen[bytes]:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(dump_yaml(bare(config, run_dir)))
    # The environment must not override the file: it is resolved already.
    sections = tuple(f"{name.upper()}_" for name in TrainConfig.model_fields)
    environ = {key: value for key, value in os.environ.items() if not key.startswith((*sections, "FOUNDRY_RUN_DIR"))}
    environ.pop("FOUNDRY_SEED", None)
    options = ["--resume", "auto"]
    if now is not None:
        options += ["--now", now]
    command = [sys.executable, "-m", "model_foundry", "train", str(path), *options]
    with open(run_dir.parent / f"{run_dir.name}.log", "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)


def _finish(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    code = process.wait(timeout=RUN_TIMEOUT_SECONDS)
    if code != 0:
        log = run_dir.parent / f"{run_dir.name}.log"
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise CheckFailedError(f"the run ended with exit code {code}: {last}", where=str(log))


def _last_step(run_dir: Path) -> int:
    """The last step recorded, from the end of the file alone; 0 before the first, -1 before the run began."""
    if not (run_dir / "run.json").exists():
        return -1
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (ValueError, KeyError):
        return 0


def _rhythm(run_dir: Path) -> Rhythm:
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "step"]
    return Rhythm(len(steps), sum(record["clock"]["seconds"] for record in steps) / len(steps))


def _kills_check(done: Sequence[Kill], wanted: int) -> Check:
    in_save = sum(kill.in_save for kill in done)
    moments = ", ".join(str(kill.step) for kill in done)
    return Check(
        name="kills_done",
        passed=len(done) == wanted,
        value=f"{len(done)} of {wanted}",
        bound=f"{wanted} of {wanted}",
        evidence=f"SIGKILL after steps {moments or 'none'}; {in_save} of them within a save.",
    )


def _fingerprint(config: TrainConfig) -> str:
    from model_foundry.models.finder import resolve_model
    from model_foundry.models.folder import fingerprint

    return fingerprint(resolve_model(config.model.name).folder)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A folder for the runs; a temporary one stays when the proof fails, so that it can be looked at."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    path = Path(tempfile.mkdtemp(prefix="foundry-verify-"))
    try:
        yield path
    except BaseException:
        logger.warning("the runs were left in %s", path)
        raise
    shutil.rmtree(path, ignore_errors=True)
