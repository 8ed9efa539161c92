"""What lies in a training service, listed and tidied up, by the method names of the tinker SDK's RestClient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model_foundry.client.futures import Pending
from model_foundry.client.results import (
    CheckpointInfo,
    TrainingRun,
    WeightsInfo,
    from_reply,
    training_run,
)
from model_foundry.client.session import Session
from model_foundry.errors import UsageError


@dataclass(frozen=True, slots=True)
class TrainingRuns:
    training_runs: Sequence[TrainingRun]
    total_count: int


@dataclass(frozen=True, slots=True)
class Checkpoints:
    checkpoints: Sequence[CheckpointInfo]


@dataclass(frozen=True, slots=True)
class Sessions:
    sessions: Sequence[str]


class RestClient:
    """Only what belongs to this key is seen."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def list_training_runs(self, limit: int = 20, offset: int = 0) -> Pending[TrainingRuns]:
        async def listed() -> TrainingRuns:
            found = await self._session.connection.get("training_runs", limit=limit, offset=offset)
            runs = tuple(training_run(item) for item in found["training_runs"])
            return TrainingRuns(runs, found["cursor"]["total_count"])

        return self._session.loop.start(listed())

    def get_training_run(self, training_run_id: str) -> Pending[TrainingRun]:
        async def got() -> TrainingRun:
            return training_run(await self._session.connection.get(f"training_runs/{training_run_id}"))

        return self._session.loop.start(got())

    def list_checkpoints(self, training_run_id: str) -> Pending[Checkpoints]:
        return self._checkpoints(f"training_runs/{training_run_id}/checkpoints")

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> Pending[Checkpoints]:
        return self._checkpoints("checkpoints", limit=limit, offset=offset)

    def _checkpoints(self, path: str, **params: Any) -> Pending[Checkpoints]:
        async def listed() -> Checkpoints:
            found = await self._session.connection.get(path, **params)
            return Checkpoints(tuple(from_reply(CheckpointInfo, item) for item in found["checkpoints"]))

        return self._session.loop.start(listed())

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> Pending[WeightsInfo]:
        async def got() -> WeightsInfo:
            return from_reply(
                WeightsInfo, await self._session.connection.post("weights_info", {"tinker_path": tinker_path})
            )

        return self._session.loop.start(got())

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> Pending[None]:
        return self._call("DELETE", _rest_path(tinker_path))

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> Pending[None]:
        """Everybody may read it from now on."""
        return self._call("POST", f"{_rest_path(tinker_path)}/publish")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> Pending[None]:
        return self._call("DELETE", f"{_rest_path(tinker_path)}/publish")

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> Pending[None]:
        """Have it deleted after so many seconds (None: never)."""
        return self._call("PUT", f"{_rest_path(tinker_path)}/ttl", json={"ttl_seconds": ttl_seconds})

    def list_sessions(self, limit: int = 20, offset: int = 0) -> Pending[Sessions]:
        async def listed() -> Sessions:
            found = await self._session.connection.get("sessions", limit=limit, offset=offset)
            return Sessions(tuple(found["sessions"]))

        return self._session.loop.start(listed())

    def _call(self, method: str, path: str, **request: Any) -> Pending[None]:
        async def call() -> None:
            await self._session.connection.call(method, path, **request)

        return self._session.loop.start(call())


def _rest_path(tinker_path: str) -> str:
    parts = tinker_path.removeprefix("tinker://").split("/")
    if not tinker_path.startswith("tinker://") or len(parts) != 3:
        raise UsageError("it is not written as tinker://RUN/weights/NAME", where=tinker_path)
    run, kind, name = parts
    return f"training_runs/{run}/checkpoints/{kind}/{name}"
