"""The mutants are real faults, they reach the module under test, and those that live have been looked at."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.mutation.__main__ import ACCEPTED, LOOKED_AT, TARGETS
from tests.mutation.mutants import mutants_of

ROOT = Path(__file__).parents[2]
SOURCE = '''"""Text = 1 + 1."""
from logging import getLogger
logger = getLogger()
LIMIT = 3

def share(a: int | None, b: float = 2.0, *, strict: bool = True) -> float:
    """No fault here: 1 < 2."""
    logger.info("1 + 1")
    if a is None or b <= 0:
        raise ValueError(f"{b + 1} is wrong")
    return -a / b if strict else 0.0
'''


def test_every_mutant_is_one_fault_and_text_is_left_alone(tmp_path: Path) -> None:
    """A fault in a docstring or an error's message lives for ever, and hides those that matter."""
    (tmp_path / "share.py").write_text(SOURCE)
    found = mutants_of(tmp_path / "share.py")
    sound = ast.unparse(ast.parse(SOURCE))
    assert all(ast.unparse(mutant.tree) != sound for mutant in found)
    assert sorted(mutant.what for mutant in found) == sorted([
        "3 → 4", "2.0 → 3.0", "True → False", "Or → And", "Is → IsNot", "LtE → Lt", "0 → 1", "branches exchanged",
        "Div → Mult", "without USub", "0.0 → 1.0",
    ])  # fmt: skip
    assert ast.unparse(ast.parse(SOURCE)) == sound


@pytest.mark.slow
def test_a_reason_is_for_a_mutant_that_there_is() -> None:
    """A line that has changed needs to be looked at again."""
    accepted = yaml.safe_load(ACCEPTED.read_text()) or {}
    assert set(accepted) <= set(TARGETS)
    for module, reasons in accepted.items():
        path = ROOT / "model_foundry" / Path(*module.split(".")).with_suffix(".py")
        names = {mutant.name for mutant in mutants_of(path)}
        gone = [name for name in reasons if name not in names]
        assert not gone, f"{module}: {gone}"
        assert all(len(reason) > 10 for reason in reasons.values())


@pytest.mark.prove
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("module", LOOKED_AT)
def test_faults_are_noticed(module: str) -> None:
    """In a process of its own, which has not imported the module."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutation", module], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
