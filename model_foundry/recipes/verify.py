"""Proofs that anyone can repeat: a run killed again and again ends as if it never was; a run can be run again.

The runs are real processes of the same command line, killed with SIGKILL.
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model_foundry.checkpoint.compare import compare_checkpoints
from model_foundry.checkpoint.store import FINAL
from model_foundry.config.commands import RunConfig
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.errors import RunError, UsageError
from model_foundry.recipes.killing import Kill, kill_often, run_to_end
from model_foundry.recipes.methods import start_fingerprint
from model_foundry.recipes.preparation import require_same_data
from model_foundry.run.directory import RunDirectory
from model_foundry.run.metrics import comparable_lines
from model_foundry.run.receipts import receipt
from model_foundry.types import Check

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""On a busy machine a short run may end before the moment chosen for it."""


def verify_resume(
    config: RunConfig, *, kills: int, keep: Path | None = None, seed: int = 0, say: Callable[[str], None] = print
) -> list[Check]:
    """Run once undisturbed and once killed `kills` times and resumed, and compare every bit.

    Args:
        keep: leave both runs here; default a temporary folder that goes when all is well.
        seed: chooses the moments.

    Raises:
        CheckFailedError: a run failed by itself.
    """
    with _folder(keep) as (folder, checks):
        straight, broken = folder / "straight", folder / "killed"
        say(f"1 of 2: undisturbed, in {straight}")
        rhythm = run_to_end(config, straight)
        say(f"2 of 2: killed {kills} times and resumed, in {broken}")
        config, pieces = compiling_as(config, straight), pieces_as(straight)
        chooser, done = random.Random(seed), []
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                say(f"it ended before kill {len(done) + 1}: once more from the beginning")
                shutil.rmtree(broken)
            done = kill_often(config, broken, rhythm, kills=kills, chooser=chooser, piece_tokens=pieces, say=say)
            if len(done) == kills:
                break
        run_to_end(config, broken, piece_tokens=pieces)
        checks += [*compare_runs(straight, broken), _kills_check(done, kills)]
    return checks


def verify_run(
    run: Path, config: RunConfig, *, keep: Path | None = None, say: Callable[[str], None] = print
) -> list[Check]:
    """Run it again from its own folder, and compare every bit with what it left.

    Raises:
        RunError: it has not finished, several processes computed it, or its data or its model have changed since.
        CheckpointCorruptError: what it left is damaged.
    """
    recorded = RunDirectory.read(run)
    facts = recorded.facts
    if FINAL not in [checkpoint.name for checkpoint in recorded.checkpoints.list()]:
        raise RunError("has not finished", where=str(run), hint=f"Let it finish first: foundry resume {run}")
    recorded.checkpoints.open(FINAL)
    if (size := max(facts.get("world_sizes", [1]))) > 1:
        what = f"{size} processes computed it, and one would end with other last bits"
        hint = "Train it again under torchrun elsewhere, and put both side by side: foundry runs compare A B"
        raise RunError(what, where=str(run), hint=hint)
    files = {role: Path(each["path"]) for role, each in facts["receipt"]["data"].items()}
    model_fingerprint = start_fingerprint(config)
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
    with _folder(keep) as (folder, checks):
        again = folder / "again"
        say(f"running {run} again, in {again}")
        # Engine and number of threads decide the last bits; the run may have taken both from the machine.
        config = config.model_copy(update={"engine": facts.get("engine", "torch")})
        if config.engine == "torch":
            threads = {"num_threads": facts["receipt"]["torch"]["num_threads"]}
            config = config.model_copy(update={"training": config.training.model_copy(update=threads)})
        config = compiling_as(config, run)
        run_to_end(config, again, now=facts["now"], piece_tokens=pieces_as(run))
        checks += compare_runs(run, again)
    return checks


def compiling_as(config: RunConfig, run: Path) -> RunConfig:
    """Compile where that run did: what it measured may come out otherwise the next time."""
    compiling = RunDirectory.read(run).facts.get("compiling")
    if not isinstance(config, ExperimentConfig) or compiling is None:
        return config
    update = {"compile": "on" if compiling["on"] else "off"}
    return config.model_copy(update={"training": config.training.model_copy(update=update)})


def pieces_as(run: Path) -> int | None:
    """What the memory had that run's passes split at: it may have more or less free the next time."""
    return RunDirectory.read(run).facts.get("piece_tokens")


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
            evidence="Every record is equal in every digit."
            if bad is None
            else f"{first} and {second}, metrics.jsonl:{bad}",
        ),
    ]


def _kills_check(done: Sequence[Kill], wanted: int) -> Check:
    moments = ", ".join(str(kill.step) for kill in done)
    within = ", ".join(f"{count} within {what}" for what, count in Counter(kill.within for kill in done).items())
    return Check(
        name="kills_done",
        passed=len(done) == wanted,
        value=f"{len(done)} of {wanted}",
        bound=f"{wanted} of {wanted}",
        evidence=f"SIGKILL after steps {moments or 'none'}; {within or 'the run ended first'}.",
    )


@contextmanager
def _folder(keep: Path | None) -> Iterator[tuple[Path, list[Check]]]:
    """A folder for the runs, and a list for the checks; a temporary folder stays when the proof fails, to be looked at.

    Raises:
        UsageError: `keep` holds something already, so that an old run would be taken for a new one.
    """
    checks: list[Check] = []
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise UsageError("is not an empty folder", where=str(keep), hint="Give --keep a new folder.")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep, checks
        return
    path = Path(tempfile.mkdtemp(prefix="foundry-verify-"))
    try:
        yield path, checks
    finally:
        if checks and all(check.passed for check in checks):
            shutil.rmtree(path, ignore_errors=True)
        else:
            logger.warning("the runs were left in %s", path)
