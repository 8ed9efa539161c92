"""`torchrun … -m model_foundry train`: one run whoever computes it, stopped and killed like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_interrupted_runs import finished, num_steps, wait_until
from tests.tiny_runs import checkpoint_names, environment, foundry_here, losses, records, write_project

pytestmark = pytest.mark.slow
NUM_STEPS = 60


@pytest.fixture(scope="module")
def config(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(
        tmp_path_factory.mktemp("torchrun"), model=tiny_folder("llama-tied"), lora__enabled=False,
        training__learning_rate=0.002, training__max_steps=NUM_STEPS, training__save_steps=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """The run by one process."""
    assert foundry_here("train", config).returncode == 0
    return config.parent / "run"


def torchrun(size: int, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.Popen(
        [*command, "-m", "model_foundry", *map(str, arguments)], env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def process_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """What rank 0 says; nobody else says anything."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, done.stderr
    return said[0]


def assert_the_same_run(run: Path, straight: Path) -> None:
    steps, wanted = records(run), records(straight)
    assert [sorted(step) for step in steps] == [sorted(step) for step in wanted]
    assert [step["tokens"] for step in steps] == [step["tokens"] for step in wanted]
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx([step["grad_norm"] for step in wanted], rel=1e-4)


def test_a_signal_saves_and_one_process_goes_on(config: Path, straight: Path, tmp_path: Path) -> None:
    """Prevents ranks that save at different steps, two that write one run, a checkpoint that needs as many again."""
    run = tmp_path / "run"
    process = torchrun(2, "train", config, f"run_dir={run}")
    wait_until(lambda: num_steps(run) >= 5, process)
    process.send_signal(signal.SIGTERM)
    done = finished(process)
    step = int(the_error(done).partition("saved at step ")[2].split()[0])
    assert f"step-{step:08d}" in checkpoint_names(run)
    resumed = foundry_here("resume", run)
    assert resumed.returncode == 0
    assert "world_size was 2 when this was saved and is 1 now" in resumed.stderr
    assert_the_same_run(run, straight)
    # Run again by one process it has other last bits, which was called a failure of the run.
    verified = foundry_here("verify", "run", run)
    assert verified.returncode == 2
    assert "2 processes computed it, and one would end with other last bits" in verified.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds a rank's process in /proc")
@pytest.mark.parametrize(
    "victim, size, then",
    [(1, 2, 2), pytest.param(0, 2, 4, marks=pytest.mark.prove), pytest.param(3, 4, 2, marks=pytest.mark.prove)],
)
def test_a_rank_that_is_killed_ends_the_run_and_it_goes_on(
    victim: int, size: int, then: int, config: Path, straight: Path, tmp_path: Path
) -> None:
    """Prevents ranks that wait for ever for one that is gone, and a run that is lost with it."""
    run = tmp_path / "run"
    process = torchrun(size, "train", config, f"run_dir={run}")
    wait_until(lambda: num_steps(run) >= 9, process)
    os.kill(process_of(process, victim), signal.SIGKILL)
    done = finished(process)
    assert done.returncode != 0
    if victim != 0:
        assert "another process of this run is gone" in the_error(done)
        assert json.loads((run / "run.json").read_text())["outcome"]["state"] == "failed"
    again = finished(torchrun(then, "train", config, f"run_dir={run}", "--resume", "auto"))
    assert again.returncode == 0, again.stderr
    assert_the_same_run(run, straight)


@pytest.mark.prove
def test_what_is_for_one_process_is_refused_once(tmp_path: Path) -> None:
    """Prevents two chats on one terminal, and a message from every rank."""
    done = finished(torchrun(2, "chat", tmp_path))
    assert done.stderr.count("foundry chat runs in one process, and torchrun started 2") == 1
    assert "exitcode  : 2" in done.stderr
