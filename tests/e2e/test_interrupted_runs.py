"""Runs that are stopped, killed or damaged end as if nothing had happened, and refuse to go on with something else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import NUM_STEPS, Straight
from tests.tiny_runs import (
    assert_one_paragraph,
    checkpoint_names,
    foundry,
    foundry_here,
    records,
    start,
    write_colours,
    write_pairs,
    write_project,
)

WAIT_SECONDS = 90


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.002)


def num_steps(run: Path) -> int:
    return len(records(run)) if (run / "metrics.jsonl").exists() else 0


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def unfinished_copy(straight: Straight, folder: Path) -> Path:
    """The undisturbed run as a kill before its last save would have left it."""
    shutil.copytree(straight.run, folder)
    shutil.rmtree(folder / "checkpoints" / "final")
    (folder / "report.json").unlink()
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_the_same_run(
    number: signal.Signals, straight: Straight, tmp_path: Path
) -> None:
    """Prevents work lost to a scheduler's SIGTERM or to Ctrl-C, and a resume that is another run."""
    run = tmp_path / "run"
    process = start("train", straight.config, f"run_dir={run}")
    wait_until(lambda: num_steps(run) >= 5, process)
    process.send_signal(number)
    done = finished(process)
    said = assert_one_paragraph(done, code=3, words=("saved at step", f"foundry resume {run}"))
    step = int(said.partition("saved at step ")[2].split()[0])
    assert 5 <= step < NUM_STEPS
    assert f"step-{step:08d}" in checkpoint_names(run)
    assert number.name in done.stderr
    assert json.loads((run / "run.json").read_bytes())["outcome"]["state"] == "interrupted"
    resumed = foundry("resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from step-{step:08d}" in resumed.stderr
    straight.assert_equal(run)


def test_a_signal_before_the_first_step_loses_nothing(straight: Straight, tmp_path: Path) -> None:
    """Prevents a signal during loading from leaving a folder that nothing can go on with."""
    run = tmp_path / "run"
    process = start("train", straight.config, f"run_dir={run}")
    wait_until((run / "run.json").exists, process)
    process.terminate()
    done = finished(process)
    assert_one_paragraph(done, code=3, words=("interrupted", "foundry resume"))
    resumed = foundry("train", straight.config, f"run_dir={run}", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    straight.assert_equal(run)


def test_a_second_ctrl_c_leaves_at_once_and_a_resume_still_works(straight: Straight, tmp_path: Path) -> None:
    """Prevents an impatient second Ctrl-C from breaking the checkpoint that the first asked for."""
    run = tmp_path / "run"
    process = start("train", straight.config, f"run_dir={run}")
    wait_until(lambda: num_steps(run) >= 3, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert_one_paragraph(finished(process), code=3, words=("foundry resume",))
    assert foundry("resume", run).returncode == 0
    straight.assert_equal(run)


def test_a_signal_during_the_proof_does_not_wait_for_it(straight: Straight, tmp_path: Path) -> None:
    """Prevents a finished training from ignoring SIGTERM for the minutes that its proof takes."""
    run = tmp_path / "run"
    process = start("train", straight.config, f"run_dir={run}", "criteria.memory_saving=0.1", "training.max_steps=2")
    log = run / "run.log"
    wait_until(lambda: log.exists() and "measuring the memory" in log.read_text(), process)
    process.terminate()
    assert_one_paragraph(finished(process), code=3, words=("interrupted", "foundry resume"))
    assert "final" in checkpoint_names(run)
    assert not (run / "report.json").exists()


def test_killed_runs_end_with_the_same_bits(straight: Straight) -> None:
    """Prevents a resume after SIGKILL that is almost the same run; through the proof that anyone can repeat."""
    done = foundry("verify", "resume", straight.config, "--kills", 3, "--json", timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["passed"]
    assert [check["name"] for check in answer["checks"]] == [
        "final_checkpoint_identical", "metrics_identical", "kills_done"
    ]  # fmt: skip
    assert answer["checks"][2]["value"] == "3 of 3"


def pairs_project(model: Path, folder: Path) -> Path:
    """Preference training with steps long enough to be killed in."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = write_pairs(folder / "pairs.jsonl", repeat=20)
    return write_project(
        folder, model=model, method="dpo", data__train_file=str(pairs), data__validation_file=str(pairs),
        data__max_length=1024, lora__lora_dropout=0.1, training__max_steps=NUM_STEPS, training__batch_size=3,
        training__gradient_accumulation_steps=2, training__eval_steps=4, criteria__pairs_preferred=None,
    )  # fmt: skip


def test_killed_preference_runs_end_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    """Prevents a reference that is asked of the model as it is after the resume."""
    config = pairs_project(model, tmp_path)
    done = foundry("verify", "resume", config, "--kills", 2, "--json", timeout=250)
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["passed"]


@pytest.mark.prove
def test_twenty_kills_within_a_preference_run_leave_no_trace(model: Path, tmp_path: Path) -> None:
    config = pairs_project(model, tmp_path)
    done = foundry(
        "verify", "resume", config, "--kills", 20, "training.save_steps=2", "--json", timeout=1200
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_kills_within_one_run_leave_no_trace(seed: int, straight: Straight) -> None:
    """Prevents the rare moment: in a save, between a rename and its index, while a checkpoint is pruned."""
    done = foundry(
        "verify", "resume", straight.config, "--kills", 20, "--kill-seed", seed, "training.save_steps=2",
        "training.max_steps=60", timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 20" in done.stdout


def test_verify_resume_tells_a_run_that_differs(straight: Straight, tmp_path: Path) -> None:
    """Prevents a proof that passes whatever it is shown."""
    other = unfinished_copy(straight, tmp_path / "other")
    done = foundry_here("resume", other)
    assert done.returncode == 0, done.stderr
    weights = other / "checkpoints" / "final" / "state" / "optimizer.safetensors"
    flip(weights, -5)
    with pytest.raises(AssertionError, match="final_checkpoint_identical"):
        straight.assert_equal(other)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped byte": ("adapter/adapter_model.safetensors", lambda path: flip(path, 1000)),
    "truncated file": ("state/optimizer.safetensors", truncate),
    "lost file": ("state/engine.json", Path.unlink),
    "lost manifest": ("manifest.json", Path.unlink),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: str, straight: Straight, tmp_path: Path
) -> None:
    """Prevents training on from bytes that the disk changed, and a run lost to one bad file."""
    run = unfinished_copy(straight, tmp_path / "run")
    older, newest = checkpoint_names(run)
    name, harm = DAMAGES[damage]
    harm(run / "checkpoints" / newest / name)
    done = foundry_here("resume", run)
    assert done.returncode == 0, done.stderr
    warning = next(line for line in done.stderr.splitlines() if line.startswith("warning:"))
    assert newest in warning
    assert Path(name).name in warning
    assert f"resuming from {older}" in done.stderr
    straight.assert_equal(run)
    assert (run / "report.json").exists()


def test_with_every_checkpoint_damaged_it_starts_again_and_says_so(straight: Straight, tmp_path: Path) -> None:
    """Prevents a dead end where the data and the seed are enough to get there again."""
    run = unfinished_copy(straight, tmp_path / "run")
    names = checkpoint_names(run)
    for name in names:
        flip(run / "checkpoints" / name / "adapter" / "adapter_model.safetensors", 500)
    done = foundry_here("resume", run)
    assert done.returncode == 0, done.stderr
    assert all(f"checkpoint {name} cannot be used" in done.stderr for name in names)
    assert "starting from step 1" in done.stderr
    straight.assert_equal(run)


def test_a_finished_run_with_a_damaged_result_gets_it_back(straight: Straight, tmp_path: Path) -> None:
    """Prevents a report of success over weights that no longer are what was reported."""
    run = tmp_path / "run"
    shutil.copytree(straight.run, run)
    flip(run / "checkpoints" / "final" / "adapter" / "adapter_model.safetensors", 2000)
    chat = foundry_here("chat", run / "checkpoints" / "final", "prompt=hello")
    assert_one_paragraph(chat, code=3, words=("adapter_model.safetensors",))
    done = foundry_here("resume", run)
    assert done.returncode == 0, done.stderr
    assert "checkpoint final cannot be used" in done.stderr
    straight.assert_equal(run)


def test_a_finished_run_is_reported_and_not_run_again(straight: Straight) -> None:
    """Prevents `foundry resume` from spending minutes on a run that is done, or from changing it."""
    before = {path: path.stat().st_mtime_ns for path in straight.run.rglob("*.json*")}
    done = foundry_here("resume", straight.run)
    assert done.returncode == 0, done.stderr
    assert "has finished already" in done.stderr
    assert "artefacts load" in done.stdout
    unchanged = {path: path.stat().st_mtime_ns for path in straight.run.rglob("*.json*")}
    assert {path for path in before if before[path] != unchanged[path]} <= {straight.run / "run.json"}


def test_other_data_another_model_and_another_configuration_are_refused_by_name(
    straight: Straight, tmp_path: Path, model: Path
) -> None:
    """Prevents one half of a run on one data set and the other half on another."""
    run = unfinished_copy(straight, tmp_path / "run")
    rows = straight.config.parent / "train.jsonl"
    kept = rows.read_bytes()
    try:
        write_colours(rows, repeat=19)
        assert_one_paragraph(foundry_here("resume", run), code=2, words=("train_file", str(rows), "has changed"))
        rows.unlink()
        assert_one_paragraph(foundry_here("resume", run), code=2, words=("train_file", str(rows)))
    finally:
        rows.write_bytes(kept)
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    try:
        flip(weights, -1)
        assert_one_paragraph(foundry_here("resume", run), code=2, words=("base model has changed",))
    finally:
        weights.write_bytes(kept)
    for options in ((), ("--resume", "auto")):
        done = foundry_here(
            "train", straight.config, f"run_dir={run}", "training.learning_rate=0.5", "lora.r=4", *options
        )
        words = ("belongs to another configuration", "training.learning_rate: 0.01 → 0.5", "lora.r: 8 → 4")
        assert_one_paragraph(done, code=2, words=words)
    done = foundry_here("train", straight.config, f"run_dir={run}")
    assert_one_paragraph(done, code=2, words=("already holds a run", "--resume auto"))
    assert foundry_here("resume", run).returncode == 0
    straight.assert_equal(run)


def test_a_run_under_way_is_left_alone_and_listed_as_running(straight: Straight, tmp_path: Path) -> None:
    """Prevents two processes from writing one run."""
    run = tmp_path / "runs" / "busy"
    process = start("train", straight.config, f"run_dir={run}", "training.max_steps=2000", "training.eval_steps=0")
    wait_until(lambda: num_steps(run) >= 1, process)
    words = ("is being written by process", str(process.pid))
    assert_one_paragraph(foundry("resume", run), code=2, words=words)
    listed = json.loads(foundry("runs", tmp_path / "runs", "--json").stdout)["runs"]
    assert [(row["state"], row["total_steps"]) for row in listed] == [("running", 2000)]
    process.kill()
    process.communicate()
    listed = json.loads(foundry("runs", tmp_path / "runs", "--json").stdout)["runs"]
    assert [row["state"] for row in listed] == ["interrupted"]
