"""`python -m tests.mutation [MODULE…]`: try every mutant of these modules against their tests; name the survivors.

Each mutant runs in a fork of a process that has imported the heavy libraries and none of our modules, so it costs its
tests and little more. Exit code 1 where a mutant lives that `accepted.yaml` does not give a reason for.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import yaml

from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
ACCEPTED = Path(__file__).with_name("accepted.yaml")
TARGETS: dict[str, tuple[str, ...]] = {
    "engine.losses": ("tests/unit/engine/test_losses.py",),
    "engine.preference_losses": ("tests/unit/engine/test_preference_losses.py", "tests/unit/engine/test_losses.py"),
    "engine.pair_pass": ("tests/unit/engine/test_pair_pass.py",),
    "engine.mlx_losses": (
        "tests/invariants/test_mlx_equals_torch.py::test_losses_are_torchs",
        "tests/invariants/test_mlx_equals_torch.py::test_several_targets_in_pieces_of_any_size",
    ),
    "rendering.renderer": ("tests/unit/rendering/test_renderer.py", "tests/unit/rendering/test_pieces.py"),
    "checkpoint.atomic": ("tests/unit/checkpoint",),
    "checkpoint.manifest": ("tests/unit/checkpoint",),
    "checkpoint.store": ("tests/unit/checkpoint",),
    "checkpoint.schedule": ("tests/unit/checkpoint/test_schedule.py",),
    "generate.ledger": (
        "tests/unit/generate/test_ledger.py",
        "tests/unit/generate/test_batches.py",
        "tests/invariants/test_generation_books.py",
        "tests/unit/generate/test_run.py",
    ),
}
"""Module of model_foundry -> the tests that must notice its faults."""
LOOKED_AT = (
    "engine.losses", "engine.preference_losses", "engine.pair_pass", "engine.mlx_losses", "rendering.renderer",
    "checkpoint.schedule", "checkpoint.atomic", "checkpoint.manifest", "checkpoint.store",
    "generate.ledger",
)  # fmt: skip
"""Those whose survivors have all been looked at; `make prove` holds them to that."""
MIN_SECONDS, TIMES = 20.0, 6.0
"""A mutant may take so many times as long as the sound module, and no less than this; then it hangs, and is noticed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a module's mutants."""

    module: str
    num_mutants: int
    survivors: tuple[Mutant, ...]
    unexplained: tuple[Mutant, ...]

    @property
    def killed_share(self) -> float:
        return 1 - len(self.survivors) / max(1, self.num_mutants)


def try_module(module: str, *, workers: int = 1, limit: int | None = None) -> Outcome:
    """Every mutant of `model_foundry.MODULE`, or `limit` of them spread over it.

    Raises:
        SystemExit: the tests fail on the sound module.
    """
    tests = TARGETS[module]
    path = ROOT / "model_foundry" / Path(*module.split(".")).with_suffix(".py")
    started = time.monotonic()
    if not _passes(f"model_foundry.{module}", None, path, tests, seconds=300):
        raise SystemExit(f"{module}: its tests fail, or run nothing, without any fault: {' '.join(tests)}")
    seconds = max(MIN_SECONDS, TIMES * (time.monotonic() - started))
    mutants = mutants_of(path)
    chosen = mutants if limit is None else mutants[:: max(1, len(mutants) // limit)]

    def lives(mutant: Mutant) -> bool:
        code = compile(mutant.tree, str(path), "exec")
        return _passes(f"model_foundry.{module}", code, path, tests, seconds=seconds)

    with ThreadPoolExecutor(workers) as pool:
        survivors = [each for each, alive in zip(chosen, pool.map(lives, chosen), strict=True) if alive]
    reasons = (yaml.safe_load(ACCEPTED.read_text()) or {}).get(module, {})
    unexplained = [each for each in survivors if each.name not in reasons]
    return Outcome(module, len(chosen), tuple(survivors), tuple(unexplained))


class _Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from code of ours."""

    def __init__(self, name: str, code: CodeType, path: Path) -> None:
        self._name, self._code, self._path = name, code, path

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)  # pyright: ignore[reportArgumentType]

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


def _passes(name: str, code: CodeType | None, path: Path, tests: Sequence[str], *, seconds: float) -> bool:
    """Whether the tests pass with this code in the module's place, in a fork of this process."""
    child = os.fork()
    if child == 0:
        os._exit(_run(name, code, path, tests))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run(name: str, code: CodeType | None, path: Path, tests: Sequence[str]) -> int:
    import pytest

    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    assert name not in sys.modules, f"{name} was imported before the fork, and its mutant would not be"
    if code is not None:
        sys.meta_path.insert(0, _Faulty(name, code, path))
    marks = "not prove and not gpu"
    return int(pytest.main([*tests, "-x", "-q", "-m", marks, "-p", "no:cacheprovider"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", choices=[*TARGETS, []], help="default: all of them")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, help="so many mutants of each module, spread over it")
    options = parser.parse_args(arguments)
    import_heavy_libraries()
    status = 0
    for module in options.modules or TARGETS:
        outcome = try_module(module, workers=options.workers, limit=options.limit)
        print(f"{module}: {outcome.killed_share:.1%} of {outcome.num_mutants} mutants killed", flush=True)
        for mutant in outcome.survivors:
            mark = "LIVES" if mutant in outcome.unexplained else "accepted"
            print(f"  {mark:8} {mutant.line:4}  {mutant.name}", flush=True)
        status |= int(bool(outcome.unexplained))
    return status


def import_heavy_libraries() -> None:
    """What every test would import for itself."""
    for name in ("numpy", "torch", "tokenizers", "safetensors", "pydantic", "hypothesis", "pytest", "jinja2", "orjson"):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
