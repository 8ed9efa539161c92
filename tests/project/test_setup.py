"""locks/setup.sh touches .venv and nothing else. Nothing is installed here: the runs end before pip is called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCKS = Path(__file__).parents[2] / "locks"
TOOLS = ("bash", "dirname", "basename", "cat", "ps", "grep", "mkdir", "rm", "find", "tail", "sleep")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the lock and setup script, and a PATH on which there is no Python."""
    shutil.copytree(LOCKS, tmp_path / "locks")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not on this machine")
        (tools / name).symlink_to(found)
    return tmp_path


def setup(project: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(project / "tools"), "HOME": str(project)}
    command = [str(project / "tools" / "bash"), "locks/setup.sh"]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_half_removed_environment_is_not_taken_for_one(project: Path) -> None:
    """Its bin/python is then the machine's own Python, and pip once installed 120 packages into that."""
    programs = project / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(Path(sys.executable).resolve())
    result = setup(project)
    assert result.returncode == 3
    assert "installing" not in result.stdout


def test_a_missing_python_is_said_in_words(project: Path) -> None:
    result = setup(project)
    assert result.returncode == 3
    assert "Python 3.11 or newer" in result.stderr
    assert "apt-get install" in result.stderr


def test_every_pin_is_exact_and_torch_is_among_them() -> None:
    """A range in the lock is a different environment tomorrow."""
    lines = (LOCKS / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for name, _, marker in (line.partition(";") for line in pins):
        assert name.count("==") == 1, name
        assert "+" not in name, name
        assert not marker or Requirement(f"{name};{marker}").marker
    assert any(line.startswith("torch==") for line in pins)
