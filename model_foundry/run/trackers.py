"""Metrics to TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl and never instead of it.

A tracker is a guest: a missing package is an error before training starts, a tracker that fails later is reported
once and left out, and none of them can end a run. Everything they write lies in the run's folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from model_foundry.errors import ConfigError, MissingExtraError, RunError

logger = logging.getLogger(__name__)

_NOT_METRICS = frozenset({"kind", "step", "time"})
_MLFLOW_STATES = {"finished": "FINISHED", "interrupted": "KILLED"}
_MAX_PARAM_CHARACTERS = 500


class Tracker(Protocol):
    """Takes numbers by step. `scalars` are finite floats by name, as `train/loss`."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self, state: str) -> None: ...


class Trackers:
    """All trackers of a run behind one; a failing one is dropped with a warning."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._state = "failed"

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers that are still at work."""
        return tuple(self._trackers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on a record of metrics.jsonl: its numbers, the clock's too, under its kind."""
        scalars = scalars_of(record)
        if scalars:
            self._each(lambda tracker: tracker.log(int(record.get("step", 0)), scalars))

    def close(self, state: str = "finished") -> None:
        """Flush and close; `state` is the run's: finished, interrupted or failed."""
        self._each(lambda tracker: tracker.close(state))
        self._trackers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed")

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # a guest's failure, whatever it is, is no reason to lose a training run
                del self._trackers[name]
                logger.warning(
                    "tracker %s failed and gets nothing more; metrics.jsonl goes on (%s)", name, _one_line(error)
                )


def open_trackers(
    names: Sequence[str],
    *,
    run_dir: Path,
    project: str,
    run_id: str,
    config: Mapping[str, Any],
    resume_step: int | None = None,
) -> Trackers:
    """Open the trackers named `tensorboard`, `wandb`, `mlflow`.

    Args:
        run_id: identifies the run in the tracker; the same one after a resume goes on with the same record.
        config: the resolved configuration, shown as the run's parameters.
        resume_step: the last step that is kept when the run goes on; what was logged after it is superseded.

    Raises:
        MissingExtraError: a package is not installed.
        ConfigError: an unknown name.
        RunError: a tracker cannot be opened; before training, unlike later, that is worth an error.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"no tracker named {unknown[0]!r}", hint=f"There are: {', '.join(TRACKERS)}.")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, "track")
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = TRACKERS[name](run_dir, project, run_id, config, resume_step)
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or name, "track") from error
        except Exception as error:
            Trackers(opened).close("failed")
            raise RunError(
                f"tracker {name} could not be opened ({_one_line(error)})",
                hint="Mend that, or leave it out of logging.report_to.",
            ) from error
    return Trackers(opened)


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a metrics record by tracker name: train/loss, validation/loss, clock/tokens_per_second."""
    kind = str(record.get("kind", "step"))
    prefix = "train" if kind == "step" else kind
    numbers = {f"{prefix}/{key}": value for key, value in record.items() if key not in _NOT_METRICS}
    clock = record.get("clock")
    if isinstance(clock, Mapping) and kind == "step":
        numbers.update({f"clock/{key}": value for key, value in clock.items() if key not in _NOT_METRICS})
    return {name: float(value) for name, value in numbers.items() if _is_finite_number(value)}


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class _TensorBoard:
    """Event files in run_dir/tensorboard, through the tensorboard package alone: its torch writer needs torch."""

    def __init__(
        self, run_dir: Path, project: str, run_id: str, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Generated modules: their names exist only at run time, so a type checker cannot follow an import statement.
        event_pb2, summary_pb2, tensor_pb2, types_pb2 = (
            importlib.import_module(f"tensorboard.compat.proto.{name}_pb2")
            for name in ("event", "summary", "tensor", "types")
        )

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        if resume_step is not None:
            # TensorBoard drops earlier events from this step on, so the curve has no branch that never was.
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(session_log=session, step=resume_step + 1)
        table = "\n".join(["| key | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in flat_config(config).items())])
        text = summary_pb2.SummaryMetadata(plugin_data={"plugin_name": "text"})
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[table.encode()])
        value = self._summary.Value(tag="config", metadata=text, tensor=tensor)
        self._add(summary=self._summary(value=[value]), step=0)
        self._writer.flush()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(summary=self._summary(value=values), step=step)
        self._writer.flush()  # its own thread would hold events back for two minutes, and a kill would lose them

    def close(self, state: str) -> None:
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), **fields))


class _Wandb:
    """Weights & Biases, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it later.

    After a resume the steps since the checkpoint are there twice: its records cannot be taken back.
    """

    def __init__(
        self, run_dir: Path, project: str, run_id: str, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=project,
            id=run_id,
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=dict(config),
            mode=None if os.environ.get("WANDB_MODE") else "offline",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True),
        )
        # Its own counter only goes forward; ours goes back on a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)


class _MLflow:
    """MLflow's file store in run_dir/mlruns (or where MLFLOW_TRACKING_URI says).

    `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlruns` shows it. After a resume the steps since the
    checkpoint are there twice: its records cannot be taken back.
    """

    def __init__(
        self, run_dir: Path, project: str, run_id: str, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        # The store of files needs no server and no database; MLflow keeps it behind this switch.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or _store_uri(run_dir))
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(project)
        earlier = self._client.search_runs([number], filter_string=f"tags.`foundry.run_id` = '{run_id}'")
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(number, run_name=run_dir.resolve().name).info.run_id
        params = [Param(k, str(v)[:_MAX_PARAM_CHARACTERS]) for k, v in flat_config(config).items()]
        self._client.log_batch(self._run, params=params, tags=[RunTag("foundry.run_id", run_id)])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        now_milliseconds = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_milliseconds, step) for name, value in scalars.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, state: str) -> None:
        self._client.set_terminated(self._run, _MLFLOW_STATES.get(state, "FAILED"))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _store_uri(run_dir: Path) -> str:
    return (run_dir.resolve() / "mlruns").as_uri()


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, as they are overridden on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat.update(flat_config(value, name) if isinstance(value, Mapping) else {name: value})
    return flat


TRACKERS: dict[str, Callable[[Path, str, str, Mapping[str, Any], int | None], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}
"""Name -> how it is opened."""
