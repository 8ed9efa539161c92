"""A process killed in a save must cost at most that save. Real processes, real SIGKILL."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killing.py")
pytestmark = pytest.mark.slow


def run_script(*arguments: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_twenty_kills_at_random_moments_never_lose_the_last_complete_checkpoint(tmp_path: Path) -> None:
    """Prevents an index or a rename order that names a checkpoint before it is whole."""
    seed = random.SystemRandom().randrange(2**32)
    told = run_script("random", str(tmp_path / "checkpoints"), "20", str(seed))
    assert told["kills"] == 20
    assert told["in_mid_save"] > 0, f"seed {seed}: no kill hit a save, so nothing was tested"


def test_a_kill_before_any_single_file_operation_leaves_a_valid_checkpoint() -> None:
    """Prevents the moment in which the old checkpoint is away and the new one not yet there."""
    # In memory where there is such a place: a kill of the process does not depend on what the disk has synced.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        killed = run_script("points", folder)
    assert killed.keys() == {"save", "replace", "prune"}
    assert min(killed.values()) > 10, f"the kills missed the file operations: {killed}"
