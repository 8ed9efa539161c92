"""One folder, one writer, one configuration; a state that no killed process can leave wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from model_foundry.checkpoint.manifest import write_file
from model_foundry.checkpoint.store import FINAL
from model_foundry.errors import RunError
from model_foundry.run.directory import RunDirectory, RunState, config_differences, is_run

CONFIG = "seed: 1\nrun_dir: runs/a\ntraining:\n  learning_rate: 0.0002\n  epochs: 3.0\nlogging:\n  level: info\n"
HOLD = """
import sys
from pathlib import Path
from model_foundry.run.directory import RunDirectory
with RunDirectory.open(Path(sys.argv[1])) as run, run.open_metrics() as metrics:
    metrics.append({"kind": "step", "step": 1, "loss": 2.0})
    print("holding", flush=True)
    sys.stdin.read()
"""


def create(folder: Path, config: str = CONFIG, digest: str = "d1") -> RunDirectory:
    return RunDirectory.create(folder, config_yaml=config, digest=digest, receipt={"version": "0"})


def test_a_new_run_has_its_configuration_and_receipt_and_is_named_by_folder_and_time(tmp_path: Path) -> None:
    now = datetime(2026, 11, 21, 7, 30, tzinfo=UTC)
    folder = tmp_path / "deep" / "demo"
    with RunDirectory.create(
        folder, config_yaml=CONFIG, digest="d", receipt={"version": "0"}, clock=lambda: now
    ) as run:
        assert run.run_id == "demo-20261121-073000"
        assert run.state is RunState.RUNNING
        run.record(total_steps=9)
    facts = RunDirectory.read(folder).facts
    assert facts["config"]["training"]["epochs"] == 3.0
    assert facts["receipt"] == {"version": "0"}
    assert facts["total_steps"] == 9
    assert (folder / "config.yaml").read_text() == CONFIG


def test_the_state_follows_from_what_lies_there(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.close()

    def state() -> RunState:
        return RunDirectory.read(tmp_path / "run").state

    assert state() is RunState.CREATED
    with RunDirectory.open(tmp_path / "run") as run, run.open_metrics() as metrics:
        metrics.append({"kind": "step", "step": 1})
        assert state() is RunState.RUNNING
    assert state() is RunState.INTERRUPTED
    with RunDirectory.open(tmp_path / "run") as run:
        run.record_outcome("failed", message="it went wrong")
    assert state() is RunState.FAILED
    with RunDirectory.open(tmp_path / "run") as run:
        run.record_resume({"version": "0"}, from_step=1)
    assert state() is RunState.INTERRUPTED
    with RunDirectory.open(tmp_path / "run") as run:
        run.record_outcome("finished")
    assert state() is RunState.INTERRUPTED, "finished without final weights is not finished"
    with RunDirectory.open(tmp_path / "run") as run:
        run.checkpoints.save(FINAL, 1, lambda folder: (folder / "weights").touch())
    assert state() is RunState.FINISHED


def test_two_processes_never_write_one_run_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    """Prevents interleaved metrics of two trainings, and a lock file that somebody must delete by hand."""
    create(tmp_path / "run").close()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holding\n"
        assert RunDirectory.read(tmp_path / "run").state is RunState.RUNNING
        with pytest.raises(RunError, match=f"is being written by process {other.pid} on "):
            RunDirectory.open(tmp_path / "run")
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert RunDirectory.read(tmp_path / "run").state is RunState.INTERRUPTED
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.state is RunState.RUNNING


def test_a_reader_looking_at_the_lock_does_not_stop_a_writer(tmp_path: Path) -> None:
    """Prevents `foundry runs` in a loop from making training fail to start."""
    create(tmp_path / "run").close()
    script = (
        "import sys\nfrom pathlib import Path\nfrom model_foundry.checkpoint.lock import is_held\n"
        "print(1, flush=True)\nwhile True: is_held(Path(sys.argv[1]))"
    )
    lock = str(tmp_path / "run" / ".lock")
    with subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE) as reader:
        try:
            assert reader.stdout is not None
            reader.stdout.readline()
            for _ in range(10):
                RunDirectory.open(tmp_path / "run").close()
        finally:
            reader.kill()


def test_a_folder_that_holds_a_run_or_anything_else_is_not_made_a_run(tmp_path: Path) -> None:
    """Prevents checkpoints scattered over somebody's home folder, and one run written over another."""
    create(tmp_path / "run").close()
    with pytest.raises(RunError, match=r"already holds a run.*--resume auto"):
        create(tmp_path / "run")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"not empty and holds no run \(there is run, thesis.tex\)"):
        create(tmp_path)
    with pytest.raises(RunError, match="Not a directory"):
        create(tmp_path / "thesis.tex")
    with pytest.raises(RunError, match="holds no run"):
        RunDirectory.open(tmp_path)
    assert not is_run(tmp_path)


def test_what_a_kill_in_create_leaves_does_not_stop_the_next(tmp_path: Path) -> None:
    for name in (".lock", "config.yaml", ".tmp-run.json-ab12", "run.log"):
        (tmp_path / name).write_text("half")
    create(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.yaml", "run.json", "run.log"}


def test_another_configuration_is_refused_by_the_names_of_its_keys(tmp_path: Path) -> None:
    """Prevents a run that silently goes on with other hyper-parameters."""
    run = create(tmp_path / "run")
    other = CONFIG.replace("0.0002", "0.001").replace("runs/a", "runs/b").replace("info", "debug") + "extra: 1\n"
    run.require_config("d1", other)  # the digest decides; the texts only explain
    with pytest.raises(
        RunError, match=r"another configuration \(extra: absent → 1; training\.learning_rate: 0\.0002 → 0\.001\)"
    ):
        run.require_config("d2", other)
    assert run.differs("d2", CONFIG) == ("the configuration's digest, though no key differs",)
    run.close()


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("a: 1", "a: 1", ()),
        ("a: {b: []}", "a: {b: [1]}", ("a.b: [] → [1]",)),
        ("a: {}", "a: {b: 1}", ("a: {} → absent", "a.b: absent → 1")),
        ("a: null", "b: null", ("a: None → absent", "b: absent → None")),
        ("run_dir: x\nlogging: {level: a}", "run_dir: y\nlogging: {level: b}", ()),
    ],
)
def test_differences_by_example(ours: str, theirs: str, expected: tuple[str, ...]) -> None:
    assert config_differences(ours, theirs) == expected


def test_a_broken_record_is_an_error_with_its_path(tmp_path: Path) -> None:
    create(tmp_path).close()
    for content in ("{", "[1]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RunError, match=r"run\.json"):
            _ = RunDirectory.read(tmp_path).facts


def test_a_run_that_is_only_read_cannot_be_written(tmp_path: Path) -> None:
    create(tmp_path).close()
    run = RunDirectory.read(tmp_path)
    writes: list[Callable[[], object]] = [lambda: run.record(a=1), run.open_metrics]
    for write in writes:
        with pytest.raises(RunError, match="reading only"):
            write()


def test_size_counts_every_file(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        before = run.size_bytes()
        run.checkpoints.save(FINAL, 1, lambda folder: write_file(folder / "w", b"x" * 1000))
        assert run.size_bytes() > before + 1000


def test_a_forked_child_does_not_hold_the_run(tmp_path: Path) -> None:
    """Prevents a data worker that outlives its killed parent from locking the run for ever."""
    run = create(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)  # lives on until told
        os._exit(0)
    try:
        run.close()
        RunDirectory.open(tmp_path).close()
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert json.loads((tmp_path / "run.json").read_text())["outcome"] is None
