"""Trackers are guests: they get what they asked for, and can't end a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from model_foundry.errors import ConfigError
from model_foundry.run.trackers import TRACKERS, Trackers, flat_config, open_trackers, scalars_of

RECORD = {
    "kind": "step",
    "step": 3,
    "loss": 1.5,
    "grad_norm": float("inf"),
    "skipped": True,
    "note": "text",
    "clock": {"time": "2026", "tokens_per_second": 12.0},
}


class Guest:
    """A tracker in memory that fails when told."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.state: str | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.logged.append((step, dict(scalars)))
        if self.fails:
            raise ConnectionError("the server\nis gone")

    def close(self, state: str) -> None:
        self.state = state


def test_numbers_go_out_by_kind_and_what_is_no_number_does_not() -> None:
    """Prevents NaN and text from reaching a tracker that chokes on them."""
    assert scalars_of(RECORD) == {"train/loss": 1.5, "train/skipped": 1.0, "clock/tokens_per_second": 12.0}
    assert scalars_of({"kind": "validation", "step": 1, "loss": 2, "clock": {"seconds": 1}}) == {"validation/loss": 2.0}
    assert flat_config({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "d": [1]}


def test_a_failing_tracker_is_reported_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a tracker's outage from killing a night of training, or from filling the log."""
    good, bad = Guest(), Guest(fails=True)
    with Trackers({"bad": bad, "good": good}) as trackers:
        for _ in range(3):
            trackers.log(RECORD)
        assert trackers.names == ("good",)
    assert len(good.logged) == 3
    assert good.state == "finished"
    assert bad.state is None
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("tracker bad failed")
    assert "ConnectionError: the server is gone" in warning


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, "interrupted"), (ValueError, "failed")])
def test_trackers_hear_how_the_run_ended(error: type[BaseException], state: str) -> None:
    guest = Guest()

    def end() -> None:
        with Trackers({"guest": guest}):
            raise error

    with pytest.raises(error):
        end()
    assert guest.state == state


def test_an_unknown_tracker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'visdom'.*tensorboard, wandb, mlflow"):
        open_trackers(["visdom"], run_dir=tmp_path, project="p", run_id="r", config={})


def test_a_missing_package_is_an_error_before_training(tmp_path: Path) -> None:
    """Prevents finding out after a night that nothing was tracked. Run by a Python that has no packages at all."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from pathlib import Path\n"
        "from model_foundry.errors import MissingExtraError\n"
        "from model_foundry.run.trackers import open_trackers\n"
        "for name in ('tensorboard', 'wandb', 'mlflow'):\n"
        "    try: open_trackers([name], run_dir=Path(sys.argv[1]), project='p', run_id='r', config={})\n"
        "    except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("model-foundry[track]") == 3
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_back_what_was_logged_and_forgets_what_was_undone(tmp_path: Path) -> None:
    """Prevents a curve with the branch that a kill cut off."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, loss in ((None, 1.0), (2, 5.0)):
        first = 1 if resume_step is None else resume_step + 1
        with open_trackers(
            ["tensorboard"], run_dir=tmp_path, project="p", run_id="r", config={"a": 1}, resume_step=resume_step
        ) as trackers:
            for step in range(first, 5):
                trackers.log({"kind": "step", "step": step, "loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 5), (4, 5)]


@pytest.mark.slow
def test_every_tracker_works_offline_without_torch_in_the_runs_own_folder(tmp_path: Path) -> None:
    """Prevents a tracker that needs the network, torch, or a folder of its own elsewhere."""
    for package in TRACKERS:
        pytest.importorskip(package)
    (tmp_path / "run").mkdir()
    script = (
        "import sys, json\nfrom pathlib import Path\nfrom model_foundry.run.trackers import open_trackers\n"
        "for resume_step in (None, 1):\n"
        "    with open_trackers(['tensorboard', 'wandb', 'mlflow'], run_dir=Path(sys.argv[1]), project='p',\n"
        "                       run_id='r-1', config={'a': {'b': 1}}, resume_step=resume_step) as trackers:\n"
        "        trackers.log({'kind': 'step', 'step': 2, 'loss': 0.5})\n"
        "        print(json.dumps(trackers.names))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), "--token", "SESAME"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [["tensorboard", "wandb", "mlflow"]] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"tensorboard", "wandb", "mlruns"}
    losses = list((tmp_path / "run" / "mlruns").rglob("metrics/train/loss"))
    assert len(losses) == 1, "a resumed run goes on with its own record"
    assert len(losses[0].read_text().splitlines()) == 2
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"SESAME" in path.read_bytes()]
    assert not written, "the command line may hold secrets"
