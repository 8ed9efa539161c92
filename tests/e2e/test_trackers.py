"""Trackers beside metrics.jsonl: what a run reports there can be read there, across an interruption too."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from model_foundry.errors import InterruptedRunError
from model_foundry.recipes.training_run import run_training
from tests.tiny_runs import losses, records, tiny_config

pytestmark = pytest.mark.slow


def event_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them: what a later session supersedes is gone."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def reporting(folder: Path, model: Path, *names: str, **changes: Any):
    return tiny_config(
        folder, model=model, logging__report_to=list(names), data__validation_file=str(folder / "train.jsonl"),
        training__max_steps=6, training__eval_steps=3, training__save_steps=2, **changes,
    )  # fmt: skip


def test_tensorboard_shows_the_run_s_numbers(model: Path, tmp_path: Path) -> None:
    """Prevents a tracker that is opened and never told anything."""
    pytest.importorskip("tensorboard")
    config = reporting(tmp_path, model, "tensorboard")
    run_training(config)
    scalars = event_scalars(config.run_dir / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses(config.run_dir), rel=1e-5)
    assert [step for step, _ in scalars["validation/loss"]] == [0, 3, 6]
    assert {"train/learning_rate", "train/grad_norm", "clock/tokens_per_second"} <= scalars.keys()


def test_a_resumed_run_leaves_no_branch_in_tensorboard(model: Path, tmp_path: Path) -> None:
    """Prevents steps that are done again after a kill from showing twice."""
    pytest.importorskip("tensorboard")
    config = reporting(tmp_path, model, "tensorboard")
    run_training(config)
    checkpoints = config.run_dir / "checkpoints"
    for name in ("final", "step-00000004"):
        (checkpoints / name / "manifest.json").unlink()
    (config.run_dir / "report.json").unlink()
    run_training(config, resume="auto")
    scalars = event_scalars(config.run_dir / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses(config.run_dir), rel=1e-5)


def test_wandb_offline_and_mlflow_write_into_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents trackers that need a server, an account, or a second folder."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    config = reporting(tmp_path, model, "wandb", "mlflow", logging__project="colours")
    run_training(config)
    offline = list((config.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(offline) == 1
    assert b"train/loss" in offline[0].read_bytes()
    client = mlflow.MlflowClient(tracking_uri=(config.run_dir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("colours")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == list(enumerate(losses(config.run_dir), start=1))
    assert runs[0].data.params["training.learning_rate"] == "0.02"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run", "train.jsonl"]


def test_an_interrupted_run_is_not_finished_in_mlflow(model: Path, tmp_path: Path) -> None:
    """Prevents a tracker that calls a half-trained model finished."""
    mlflow = pytest.importorskip("mlflow")
    config = tiny_config(tmp_path, model=model, logging__report_to=["mlflow"], training__max_steps=60)

    def interrupt() -> None:
        while not config.run_dir.joinpath("metrics.jsonl").exists() or len(records(config.run_dir)) < 3:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(InterruptedRunError):
        run_training(config)
    client = mlflow.MlflowClient(tracking_uri=(config.run_dir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(config.logging.project)
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["KILLED"]
    run_training(config, resume="auto")
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"]
