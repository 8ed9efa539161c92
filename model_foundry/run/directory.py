"""One run's folder: who may write it, whose configuration it holds, and how far the run came.

    config.yaml  run.json  metrics.jsonl  checkpoints.jsonl  run.log  checkpoints/<name>/  report.html  report.json

The state is derived from what lies there (a held lock, a final checkpoint, an outcome), never from a flag that a
killed process could not have cleared. Knows nothing of training.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from model_foundry.checkpoint import atomic
from model_foundry.checkpoint.lock import FileLock, LockHeldError, is_held
from model_foundry.checkpoint.manifest import read_manifest
from model_foundry.checkpoint.store import FINAL, CheckpointStore
from model_foundry.errors import CheckpointCorruptError, RunError
from model_foundry.run.metrics import MetricsLog

_LOCK_NAME = ".lock"
# A reader that looks whether the run is locked is gone within this time; a writer is not.
_LOCK_WAIT_SECONDS = 0.2
_OWN_NAMES = frozenset({_LOCK_NAME, "config.yaml", "run.log", "checkpoints", "checkpoints.jsonl", "metrics.jsonl"})
# Where a run writes and what it prints do not make it another run; the configuration's digest leaves them out too.
_UNCOMPARED_KEYS = ("run_dir", "logging")
_ABSENT = "absent"


class RunState(enum.StrEnum):
    CREATED = "created"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


Outcome = Literal["interrupted", "finished", "failed"]


def utc_now() -> datetime:
    return datetime.now(timezone.utc)  # noqa: UP017 - one spelling on every supported Python


class RunDirectory:
    """A run's folder. Use `create`, `open` (both hold the lock until `close`) or `read` (only looks)."""

    def __init__(self, path: Path, *, lock: FileLock | None, clock: Callable[[], datetime] = utc_now) -> None:
        self.path = path
        self._lock = lock
        self._clock = clock

    @classmethod
    def create(
        cls,
        run_dir: Path,
        *,
        config_yaml: str,
        digest: str,
        receipt: Mapping[str, Any],
        clock: Callable[[], datetime] = utc_now,
    ) -> Self:
        """Make the folder of a new run and lock it.

        Raises:
            RunError: it already holds a run, holds something else, cannot be written, or is locked by another process.
        """
        require_free(run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            atomic.sync_directory(run_dir.resolve().parent)
            lock = _lock(run_dir)
        except OSError as error:
            raise _explain(error, run_dir) from error
        run = cls(run_dir, lock=lock, clock=clock)
        try:
            atomic.remove_leftovers(run_dir)
            atomic.atomic_write(run.config_path, config_yaml)
            started = clock()
            run._write_facts(
                {
                    "run_id": f"{run_dir.resolve().name}-{started:%Y%m%d-%H%M%S}",
                    "config_digest": digest,
                    "config": yaml.safe_load(config_yaml),
                    "receipt": dict(receipt),
                    "resumed": [],
                    "outcome": None,
                    "clock": {"created": started.isoformat(timespec="seconds")},
                }
            )
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, run_dir: Path, *, clock: Callable[[], datetime] = utc_now) -> Self:
        """Lock an existing run to go on with it.

        Raises:
            RunError: there is no run, or another process is writing it.
        """
        _require_run(run_dir)
        try:
            lock = _lock(run_dir)
            atomic.remove_leftovers(run_dir)
        except OSError as error:
            raise _explain(error, run_dir) from error
        return cls(run_dir, lock=lock, clock=clock)

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Look at a run without locking it; nothing can be written through the result."""
        _require_run(run_dir)
        return cls(run_dir, lock=None)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def facts_path(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "run.log"

    @property
    def checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints", clock=self._clock)

    @property
    def facts(self) -> dict[str, Any]:
        """run.json.

        Raises:
            RunError: it cannot be read.
        """
        try:
            facts = json.loads(self.facts_path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"cannot be read ({error})", where=str(self.facts_path)) from error
        if not isinstance(facts, dict):
            raise RunError("is not a run's record", where=str(self.facts_path))
        return facts

    @property
    def run_id(self) -> str:
        return str(self.facts.get("run_id", self.path.resolve().name))

    @property
    def state(self) -> RunState:
        """How far the run came, from the lock, the outcome and the files there are."""
        if self._lock is not None or is_held(self.path / _LOCK_NAME):
            return RunState.RUNNING
        outcome = (self.facts.get("outcome") or {}).get("state")
        if outcome == "finished" and self._has_final():
            return RunState.FINISHED
        if outcome == "failed":
            return RunState.FAILED
        has_begun = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        if outcome is not None or has_begun or self.checkpoints.list():
            return RunState.INTERRUPTED
        return RunState.CREATED

    def open_metrics(self) -> MetricsLog:
        self._require_lock()
        return MetricsLog(self.metrics_path)

    def record_resume(self, receipt: Mapping[str, Any], *, from_step: int) -> None:
        """Note in run.json that the run goes on here, after `from_step`; its outcome is open again."""
        facts = self.facts
        facts["resumed"] = [*facts.get("resumed", []), {"from_step": from_step, "receipt": dict(receipt)}]
        facts["outcome"] = None
        self._write_facts(facts)

    def record(self, **values: Any) -> None:
        """Add JSON values to run.json, each under its name."""
        self._write_facts({**self.facts, **values})

    def record_outcome(self, outcome: Outcome, *, message: str | None = None) -> None:
        """Note in run.json how the run ended; `message` is the error's one paragraph."""
        clock = {"time": self._clock().isoformat(timespec="seconds")}
        self._write_facts({**self.facts, "outcome": {"state": outcome, "message": message, "clock": clock}})

    def differs(self, digest: str, config_yaml: str) -> tuple[str, ...]:
        """What differs between this run's configuration and another, one "key: here → there" each; () when equal."""
        if self.facts.get("config_digest") == digest:
            return ()
        differences = config_differences(self.config_path.read_text(), config_yaml)
        return differences or ("the configuration's digest, though no key differs",)

    def require_config(self, digest: str, config_yaml: str) -> None:
        """Refuse to go on with another configuration.

        Raises:
            RunError: naming the keys that differ.
        """
        differences = self.differs(digest, config_yaml)
        if differences:
            raise RunError(
                f"belongs to another configuration ({'; '.join(differences)})",
                where=str(self.path),
                hint="Give another run_dir=…, or the configuration that it was started with (config.yaml in it).",
            )

    def size_bytes(self) -> int:
        """Bytes of every file in the folder."""
        total = 0
        for path in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # a running run removes old checkpoints while we look
                total += path.lstat().st_size if not path.is_dir() else 0
        return total

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _has_final(self) -> bool:
        try:
            read_manifest(self.checkpoints.path(FINAL))
        except CheckpointCorruptError:
            return False
        return True

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RunError("is open for reading only", where=str(self.path))

    def _write_facts(self, facts: Mapping[str, Any]) -> None:
        self._require_lock()
        try:
            atomic.atomic_write(self.facts_path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _explain(error, self.facts_path) from error


def is_run(path: Path) -> bool:
    """Whether a run was started in this folder."""
    return (path / "run.json").is_file()


def require_free(run_dir: Path) -> None:
    """Refuse a folder in which no new run can begin; it need not exist.

    Raises:
        RunError: it already holds a run or something else, or cannot be read.
    """
    if is_run(run_dir):
        raise RunError(
            "already holds a run", where=str(run_dir), hint="Go on with --resume auto, or give another run_dir=…."
        )
    foreign = _foreign_names(run_dir)
    if foreign:
        raise RunError(
            f"is not empty and holds no run (there is {', '.join(foreign[:3])})",
            where=str(run_dir),
            hint="Give a new or empty run_dir=….",
        )


def config_differences(ours: str, theirs: str) -> tuple[str, ...]:
    """Dotted keys in which two config.yaml texts differ, as "key: here → there"."""
    left, right = _flatten(yaml.safe_load(ours)), _flatten(yaml.safe_load(theirs))
    return tuple(
        f"{key}: {left.get(key, _ABSENT)} → {right.get(key, _ABSENT)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, _ABSENT) != right.get(key, _ABSENT) and key.split(".")[0] not in _UNCOMPARED_KEYS
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _foreign_names(run_dir: Path) -> list[str]:
    """What lies in the folder that no killed `create` can have left."""
    try:
        names = sorted(path.name for path in run_dir.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _explain(error, run_dir) from error
    return [name for name in names if name not in _OWN_NAMES and not name.startswith(atomic.TEMPORARY_PREFIX)]


def _lock(run_dir: Path) -> FileLock:
    try:
        return FileLock.acquire(run_dir / _LOCK_NAME, wait_seconds=_LOCK_WAIT_SECONDS)
    except LockHeldError as error:
        raise RunError(
            f"this run is being written by {error.holder}",
            where=str(run_dir),
            hint="Wait for it, stop it, or give another run_dir=….",
        ) from None


def _require_run(run_dir: Path) -> None:
    if not is_run(run_dir):
        raise RunError("holds no run", where=str(run_dir), hint="`foundry runs` lists the runs there are.")


def _explain(error: OSError, path: Path) -> RunError:
    hint = "Free some space." if error.errno in atomic.FULL_DISK_ERRNOS else "Choose another run_dir=…."
    return RunError(f"cannot be written ({error.strerror or error})", where=str(error.filename or path), hint=hint)
