"""The way into a training service: behind a URL, or in this process.

    client = model_foundry.ServiceClient()                                  # here, no socket; state in runs/service
    client = model_foundry.ServiceClient(base_url="http://127.0.0.1:8000")  # foundry service, or another of its kind

The names of the methods are the tinker SDK's, and so are the semantics: both ways lead through the same service.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from model_foundry.client import in_process
from model_foundry.client.futures import LoopThread, Pending
from model_foundry.client.remote import Connection
from model_foundry.client.rest import RestClient
from model_foundry.client.results import ModelData, ModelInfo, SupportedModel, from_reply
from model_foundry.client.sampling import SamplingClient
from model_foundry.client.session import Session
from model_foundry.client.training import ServiceTrainingClient
from model_foundry.errors import CheckpointError, ModelNotFoundError, ServiceError, UsageError

DEFAULT_KEY = "tml-local"
DEFAULT_STATE_DIR = Path("runs/service")
_PLACEHOLDER_URL = "http://in-process"
_GREETING_SECONDS = 15.0
_FAREWELL_SECONDS = 3.0
logger = logging.getLogger(__name__)


class ServiceClient:
    """Creates training and sampling clients. To be closed, or used in a `with` block.

    Args:
        base_url: of a service; default TINKER_BASE_URL, unless something is said about one in this process. Without
            any, the service runs in this process.
        api_key: default TINKER_API_KEY, else `tml-local`, which a service takes as long as no key was minted.
        user_metadata, project_id: noted with the session.
        base_model: in this process, what every model is an adapter over; default what is asked for first.
        state_dir: in this process, where everything is kept; default `runs/service`.
        options: in this process, more of `foundry service`'s configuration, such as `{"num_threads": 2}`.
        patience_seconds: how long a service may be away before that is an error; at most 15 seconds at the beginning.

    Raises:
        UsageError: options of a service in this process for one that is elsewhere.
        ServiceError: the service does not take this key. ServiceUnreachableError: it does not answer.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        base_model: str | None = None,
        state_dir: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        patience_seconds: float = 300.0,
    ) -> None:
        is_here = base_model is not None or state_dir is not None or bool(options)
        self.base_url = base_url or (None if is_here else os.environ.get("TINKER_BASE_URL")) or None
        if self.base_url is not None and is_here:
            what = "base_model, state_dir and options are for a service in this process"
            raise UsageError(what, where=self.base_url, hint="Give them to foundry service, or give no URL.")
        self._key = api_key or os.environ.get("TINKER_API_KEY") or DEFAULT_KEY
        self._facts = {"tags": [], "user_metadata": user_metadata, "project_id": project_id, "sdk_version": "foundry"}
        self._base_model, self._options = base_model, dict(options or {})
        self._state_dir = Path(state_dir or DEFAULT_STATE_DIR)
        self._patience = patience_seconds
        self._lock = threading.Lock()
        self._service: in_process.InProcess | None = None
        self._session: Session | None = None
        self._is_closed = False
        if self.base_url is not None or base_model is not None:
            self._open(base_model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(reason="success" if kind is None else "errored")

    def close(self, reason: str = "success") -> None:
        """End the session. A service in this process writes its models down, and ends with its last client."""
        with self._lock:
            session, service, self._is_closed = self._session, self._service, True
            self._session = self._service = None
        if session is not None:
            session.loop.run(_finish(session, reason))
            if service is None:
                session.loop.stop()
            else:
                in_process.leave(service)

    # -- creating clients ------------------------------------------------------------------------------------------

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Pending[ServiceTrainingClient]:
        """A fresh adapter (alpha 32) over the service's base.

        Args:
            seed: of the adapter's first weights; default left to chance.
            train_mlp, train_attn, train_unembed: which parts get one; the last is the output head, whose adapter has
                rank x vocabulary more numbers. Default: where the service can; `ModelInfo` says whether it does.

        The result is a ServiceError where True was asked for and the service cannot train the head over this base.
        """
        session = self._open(base_model)
        lora = {"rank": rank, "seed": seed, "train_mlp": train_mlp, "train_attn": train_attn,
                "train_unembed": train_unembed is not False}  # fmt: skip
        body = {"base_model": base_model, "lora_config": lora, "user_metadata": user_metadata, "type": "create_model"}
        return session.loop.start(_create(session, "create_model", body, needs_head=train_unembed is True))

    def create_training_client_from_state(
        self, path: str, user_metadata: Mapping[str, str] | None = None
    ) -> Pending[ServiceTrainingClient]:
        """A model with a checkpoint's weights and a fresh optimizer; where that fails, nothing is left behind."""
        return self._from_state(path, user_metadata, optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: Mapping[str, str] | None = None
    ) -> Pending[ServiceTrainingClient]:
        """A model that goes on as if it had never been saved."""
        return self._from_state(path, user_metadata, optimizer=True)

    def _from_state(
        self, path: str, user_metadata: Mapping[str, str] | None, *, optimizer: bool
    ) -> Pending[ServiceTrainingClient]:
        session = self._open(None, path=path)
        body = {"path": path, "optimizer": optimizer, "user_metadata": user_metadata, "type": "load_weights"}
        return session.loop.start(_create(session, "load_weights", body))

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> Pending[SamplingClient]:
        """A sampler of a checkpoint (`tinker://…`), or of the base."""
        session = self._open(base_model, path=model_path)
        body = {
            "session_id": session.session_id,
            "sampling_session_seq_id": next(session.sampler_numbers),
            "model_path": model_path,
            "base_model": base_model,
            "type": "create_sampling_session",
        }

        async def create() -> SamplingClient:
            reply = await session.connection.post("create_sampling_session", body)
            return SamplingClient(session, reply["sampling_session_id"])

        return session.loop.start(create())

    def create_rest_client(self) -> RestClient:
        return RestClient(self._open(None))

    def get_server_capabilities(self) -> Sequence[SupportedModel]:
        """The base, by every name that it may be asked for."""
        session = self._open(None)
        found = session.loop.run(session.connection.get("get_server_capabilities"))["supported_models"]
        return tuple(from_reply(SupportedModel, item) for item in found)

    # -- the session -----------------------------------------------------------------------------------------------

    def _open(self, base_model: str | None, *, path: str | None = None) -> Session:
        """The session, begun at first use.

        Raises:
            UsageError: closed; or a service in this process of which nobody has said over what base.
        """
        with self._lock:
            if self._is_closed:
                raise UsageError("this client is closed", hint="Make another: model_foundry.ServiceClient().")
            if self._session is None:
                self._session = self._begin(base_model, path)
            return self._session

    def _begin(self, base_model: str | None, path: str | None) -> Session:
        if self.base_url is not None:
            loop, url, transport = LoopThread("training client"), self.base_url, None
        else:
            base = self._base_model or base_model or _base_of(path, self._state_dir)
            if base is None:
                hint = "Say it: ServiceClient(base_model=NAME), or ServiceClient(base_url=…) for one that runs."
                raise UsageError("no URL was given, and the service in this process has no base yet", hint=hint)
            self._service = in_process.join(base, state_dir=self._state_dir, options=self._options)
            loop, url, transport = self._service.loop, _PLACEHOLDER_URL, self._service.transport
        try:
            connection = Connection(url, api_key=self._key, transport=transport, patience_seconds=self._patience)
            return loop.run(_begin_session(loop, connection, self._facts))
        except BaseException:
            if self._service is None:
                loop.stop()
            else:
                in_process.leave(self._service)
                self._service = None
            raise


async def _begin_session(loop: LoopThread, connection: Connection, facts: Mapping[str, Any]) -> Session:
    # A service that was never there is a wrong address sooner than one that is being started again.
    patience = min(_GREETING_SECONDS, connection.patience_seconds)
    body = {**facts, "type": "create_session"}
    found = (await connection.call("POST", "create_session", patience_seconds=patience, json=body)).json()
    session = Session(loop, connection, found["session_id"])
    session.begin_heartbeat()
    return session


async def _finish(session: Session, reason: str) -> None:
    """Best effort: a session that is not finished is given up when it has been silent for long enough."""
    session.end_heartbeat()
    path, body = f"sessions/{session.session_id}/finish", {"reason": {"type": reason}}
    try:
        await session.connection.call("POST", path, patience_seconds=_FAREWELL_SECONDS, json=body)
    except ServiceError as error:
        logger.warning("the session was not finished (%s)", error)
    await session.connection.close()


async def _create(
    session: Session, kind: str, body: Mapping[str, Any], *, needs_head: bool = False
) -> ServiceTrainingClient:
    number = next(session.model_numbers)
    reply = await session.operate(kind, {**body, "session_id": session.session_id, "model_seq_id": number})
    found = await session.connection.post("get_info", {"model_id": reply["model_id"], "type": "get_info"})
    info = from_reply(ModelInfo, {**found, "model_data": from_reply(ModelData, found["model_data"])})
    model = ServiceTrainingClient(session, info)
    if body.get("lora_config", {}).get("train_unembed") and info.train_unembed is False:
        if not needs_head:
            logger.warning("the output head stays as this base has it: adapters go on attention and MLP layers")
            return model
        await session.operate("unload_model", {"model_id": info.model_id, "seq_id": 1, "type": "unload_model"})
        hint = "Leave train_unembed out: adapters go on attention and MLP layers."
        raise ServiceError("this service does not train the output head over this base", where="train_unembed",
                           hint=hint)  # fmt: skip
    return model


def _base_of(path: str | None, state_dir: Path) -> str | None:
    """The base that a checkpoint of a state folder was trained over, as it says itself."""
    if path is None:
        return None
    from model_foundry.checkpoint.store import CheckpointStore
    from model_foundry.models.runs import service_checkpoint

    try:
        folder = service_checkpoint(path, state_dir)
        return CheckpointStore(folder.parent).open(folder.name).metadata.get("base_model")
    except (ModelNotFoundError, CheckpointError) as error:
        raise UsageError("it cannot be read", where=path, hint="Give base_model, or another state_dir.") from error
