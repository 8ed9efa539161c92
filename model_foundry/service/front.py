"""The service as its routes see it: who asks, what is accepted, and waiting for what becomes of it.

Runs in the event loop. What takes time is done by the worker's thread or waits for the journal's.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from google.protobuf.message import DecodeError
from sqlalchemy.exc import SQLAlchemyError

from model_foundry.service.bodies import PROTOBUF, Refusal, parse_json, read_bytes, reply, text, whole_number
from model_foundry.service.books import Books, Effect, Model, Operation, Sampler, Session, TakenError
from model_foundry.service.execute import Executor
from model_foundry.service.journal import Work
from model_foundry.service.keys import Keys, Tenant
from model_foundry.service.messages import MESSAGES
from model_foundry.service.replies import AS_JSON
from model_foundry.service.signing import Signer
from model_foundry.service.worker import Worker

HOLD_SECONDS = 25.0
"""How long a question after a future is held; clients give up on the connection after 45."""
_BETWEEN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    body_bytes: int
    waiting_operations: int
    models: int
    silent_seconds: float


@dataclass(slots=True)
class Front:
    """Everything that a route needs.

    Attributes:
        open: operations that are not answered, or whose answer nobody has fetched yet.
        arrivals: sampler -> set when it is asked for another sample; there while somebody waits for that.
        seen: session -> when it was heard of last.
        being_removed: checkpoints that are forgotten, and whose files are there a moment longer.
        coming: operations that are being journaled, with the model that each makes.
    """

    books: Books
    worker: Worker
    executor: Executor
    keys: Keys
    limits: Limits
    signer: Signer
    open: dict[str, Operation] = field(default_factory=dict)
    arrivals: dict[str, asyncio.Event] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    being_removed: set[tuple[str, str, str]] = field(default_factory=set)
    coming: dict[Operation, Model | None] = field(default_factory=dict)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.books.clock()

    def tenant(self, request: Request) -> Tenant:
        tenant = self.keys.tenant(request.headers.get("x-api-key"))
        if tenant is None:
            raise Refusal(
                401, "this API key is not known here; keys begin with tml-, and are made by foundry service keys"
            )
        return tenant

    def session(self, session_id: str, tenant: Tenant) -> Session:
        session = self.books.sessions.get(session_id)
        if session is None or tenant.sees not in (None, session.owner):
            raise Refusal(404, f"there is no session {session_id}")
        return session

    def open_session(self, session_id: str, tenant: Tenant) -> Session:
        """A session in which something new may begin."""
        session = self.session(session_id, tenant)
        if session.finished is not None:
            raise Refusal(410, f"the session {session_id} is finished")
        self.seen[session_id] = self.books.clock()
        return session

    def model(self, model_id: str, tenant: Tenant) -> Model:
        model = self.books.models.get(model_id)
        if model is None or tenant.sees not in (None, model.owner):
            raise Refusal(404, f"there is no model {model_id}")
        return model

    def sampler(self, sampler_id: str, tenant: Tenant) -> Sampler:
        sampler = self.books.samplers.get(sampler_id)
        if sampler is None or tenant.sees not in (None, sampler.owner):
            raise Refusal(404, f"there is no sampling session {sampler_id}")
        return sampler

    async def commit(self, work: Work[Any], *, durable: bool = True, then: Effect | None = None) -> Any:
        """Wait for the journal.

        Args:
            then: what to do in memory where the work found anything but False; done also where whoever waits for this
                is cancelled meanwhile: what is in the journal is so in memory.

        Raises:
            Refusal: it cannot be written; the client tries again.
        """
        waiting = self._commit(work, durable, then)
        return await (waiting if then is None else asyncio.shield(waiting))

    async def _commit(self, work: Work[Any], durable: bool, then: Effect | None) -> Any:
        try:
            found = await asyncio.wrap_future(self.books.journal.run(work, durable=durable))
        except SQLAlchemyError as error:
            what = f"the journal cannot be written ({getattr(error, 'orig', error)})"
            raise Refusal(503, what, {"Retry-After": "5"}) from error
        if then is not None and found is not False:
            then()
        return found

    async def put(self, item: Any) -> None:
        work, apply = self.books.put(item)
        await self.commit(work, then=apply)

    async def submit(self, request: Request, kind: str) -> Response:
        """Accept an operation on a model."""
        tenant = self.tenant(request)
        data = await read_bytes(request, limit=self.limits.body_bytes)
        encoding = "proto" if PROTOBUF in request.headers.get("content-type", "") else "json"
        if encoding == "proto":
            values = await _head_of_message(kind, data)
        else:
            values = await parse_json(data)
        if values.get("model_id") is None and kind in ("create_model", "load_weights"):
            return await self._submit_new(tenant, kind, values, data)
        model = self.model(text(values, "model_id"), tenant)
        given = whole_number(values, "seq_id")
        seq = self.worker.free_seq(model) if given is None else given
        operation = _operation(model.model_id, seq, model.owner, kind, encoding, data)
        self.seen[model.session_id] = self.books.clock()
        if given is not None:
            await self._accept(operation)
        else:
            # Another that named no number either may have been quicker.
            while not await self._add(operation):
                seq = max(seq + 1, self.worker.free_seq(self.books.models[model.model_id]))
                operation = _operation(model.model_id, seq, model.owner, kind, encoding, data)
        return reply({"request_id": operation.request_id, "model_id": model.model_id})

    async def _submit_new(self, tenant: Tenant, kind: str, values: dict[str, Any], data: bytes) -> Response:
        """Accept what makes a new model; its id is the session's and the client's number."""
        number = whole_number(values, "model_seq_id")
        session = self.open_session(text(values, "session_id"), tenant)
        if number is None:
            raise Refusal(422, "model_seq_id is missing")
        model_id = f"{session.session_id}:train:{number}"
        now = self.books.clock()
        mine = self._num_models(session.owner, now)
        if mine >= self.limits.models and model_id not in self.books.models:
            what = f"this key has {mine} models, the most that it may have; unload some, or finish their sessions"
            raise Refusal(429, what, {"Retry-After": "30"})
        model = Model(model_id, session.session_id, session.owner, created=now, last_request=now, facts={})
        operation = _operation(model_id, 0, session.owner, kind, "json", data)
        try:
            await self._accept(operation, model)
        except TakenError as error:
            raise Refusal(409, f"{model_id} is taken by a copy", {"x-should-retry": "false"}) from error
        return reply({"request_id": operation.request_id, "model_id": model_id})

    async def submit_sample(self, request: Request) -> Response:
        tenant = self.tenant(request)
        data = await read_bytes(request, limit=self.limits.body_bytes)
        values = await parse_json(data)
        sampler_id, seq, owner = values.get("sampling_session_id"), whole_number(values, "seq_id"), tenant.owner
        if sampler_id is None:
            lane, seq = f"{owner}:sample:{uuid.uuid4().hex}", seq or 0
        else:
            sampler = self.sampler(text(values, "sampling_session_id"), tenant)
            lane, owner = sampler.sampler_id, sampler.owner
            self.seen[sampler.session_id] = self.books.clock()
        number = whole_number(values, "num_samples") or 1
        operation = _operation(lane, uuid.uuid4().hex if seq is None else seq, owner, "asample", "json", data)
        await self._accept(operation)
        # An id a sample; a number that is refused later has none.
        ids = [f"{operation.request_id}:{index}" for index in range(min(number, 1024))]
        return reply({"request_id": operation.request_id, "sample_sequence_ids": ids})

    def _num_models(self, owner: str, now: float) -> int:
        """Models that a key trains, those that are being journaled with them; not those whose clients have gone."""
        live = (model for model in self.books.models.values() if model.owner == owner and model.state == "live")
        coming = (model for model in self.coming.values() if model is not None and model.owner == owner)
        return len({model.model_id for model in live if not self.is_over(model, now)} | {m.model_id for m in coming})

    def heard(self, model: Model) -> float:
        """When a model's session was heard of last, as far as is known here."""
        session = self.books.sessions[model.session_id]
        return max(self.seen.get(session.session_id, session.created), model.created, model.last_request)

    def is_over(self, model: Model, now: float) -> bool:
        """Whether a model's session is finished or silent; nobody can have been heard of before this service began."""
        if self.books.sessions[model.session_id].finished is not None:
            return True
        return now - max(self.heard(model), self._began) > self.limits.silent_seconds

    def arrival(self, lane: str) -> asyncio.Event:
        """An event of the next operation in a lane."""
        return self.arrivals.setdefault(lane, asyncio.Event())

    async def _accept(self, operation: Operation, model: Model | None = None) -> None:
        """Journal an operation and hand it on; a repeat changes nothing.

        Raises:
            Refusal: too much of this client is waiting already, or the id was used for something else.
            TakenError: the model's id is known.
        """
        if await self._add(operation, model):
            return
        known = self.open.get(operation.request_id)
        if known is None:
            known = await self.commit(self.books.read_operation(operation.request_id), durable=False)
        if known is None and model is not None and "copy_of" in self.books.models[model.model_id].facts:
            raise TakenError(model.model_id)
        if known is None or known.reply_kind == "gone":
            raise _not_kept(operation.request_id)
        if known.kind != operation.kind:
            what = f"{operation.request_id} is taken by {known.kind}; this is {operation.kind}"
            raise Refusal(409, what, {"x-should-retry": "false"})

    async def _add(self, operation: Operation, model: Model | None = None) -> bool:
        """Journal an operation and hand it on; False where its id is known already, which changes nothing.

        Raises:
            Refusal: too much of this client is waiting already.
            TakenError: the model's id is known.
        """
        if operation.request_id in self.open or self._was_done(operation.request_id):
            return False
        waiting = self.worker.num_waiting(operation.owner) + sum(o.owner == operation.owner for o in self.coming)
        if waiting >= self.limits.waiting_operations:
            what = f"{self.limits.waiting_operations} operations of this key are waiting already"
            raise Refusal(429, what, {"Retry-After": "2"})
        # It counts from here on, for others come while the journal is waited for; it is done though its client goes.
        self.coming[operation] = model
        return await asyncio.shield(self._journaled(operation, model))

    async def _journaled(self, operation: Operation, model: Model | None) -> bool:
        try:
            if not await self.commit(self.books.accept(operation, model)):
                return False
            if model is not None:
                self.books.models[model.model_id] = model
            self.open[operation.request_id] = operation
            self.worker.submit(operation)
        finally:
            del self.coming[operation]
        if (arrived := self.arrivals.pop(operation.lane, None)) is not None:
            arrived.set()
        return True

    async def retrieve(self, request: Request) -> Response:
        """The result of an operation, as soon as there is one: a question is held until then."""
        tenant = self.tenant(request)
        values = await parse_json(await read_bytes(request, limit=self.limits.body_bytes))
        request_id = text(values, "request_id")
        operation = self.open.get(request_id)
        if operation is None:
            try:
                operation = await self.commit(self.books.read_operation(request_id), durable=False)
            except Refusal as refusal:
                # Clients ask again at once after a 5xx, so they are held a while and told why.
                await asyncio.sleep(_BETWEEN_SECONDS)
                return _try_again(request_id, refusal.what)
        if operation is None and (model := self._was_done(request_id)) and tenant.sees in (None, model.owner):
            raise _not_kept(request_id)
        if operation is None or tenant.sees not in (None, operation.owner):
            raise Refusal(404, f"there is no request {request_id}")
        try:
            await asyncio.wait_for(operation.done.wait(), HOLD_SECONDS)
        except TimeoutError:
            return self._pending(operation)
        self.open.pop(request_id, None)
        return result(operation, accept=request.headers.get("accept", ""))

    def _was_done(self, request_id: str) -> Model | None:
        """The model that did it: a model's operations are done in order, so its last number tells of all before."""
        model_id, _, seq = request_id.rpartition(":")
        model = self.books.models.get(model_id)
        is_number = seq.isdecimal() and len(seq) < 20 and seq == str(int(seq))
        return model if model is not None and is_number and int(seq) <= model.done_seq else None

    def _pending(self, operation: Operation) -> Response:
        return _try_again(operation.request_id, self.worker.waiting_for(operation))


def _try_again(request_id: str, why: str | None) -> Response:
    values = {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": "active" if why is None else "paused_capacity",
    }
    return reply(values if why is None else {**values, "queue_state_reason": why}, 408)


def result(operation: Operation, *, accept: str) -> Response:
    """A kept reply as this client reads it."""
    kind = operation.reply_kind
    if kind == "gone":
        raise _not_kept(operation.request_id)
    if operation.failed or kind not in AS_JSON:
        return Response(operation.reply, media_type="application/json")
    if PROTOBUF in accept:
        return Response(operation.reply, media_type=PROTOBUF)
    return reply(AS_JSON[kind](operation.reply))


def _not_kept(request_id: str) -> Refusal:
    return Refusal(410, f"the result of {request_id} is not kept any more")


def _operation(lane: str, seq: int | str, owner: str, kind: str, encoding: str, body: bytes) -> Operation:
    return Operation(
        request_id=f"{lane}:{seq}", lane=lane, owner=owner, kind=kind, encoding=encoding, body=body,
        seed=secrets.randbits(63), seq=seq if isinstance(seq, int) else None, created=time.time(),
    )  # fmt: skip


async def _head_of_message(kind: str, data: bytes) -> dict[str, Any]:
    if kind != "forward_backward":
        raise Refusal(415, f"{kind} is sent as JSON")
    try:
        message = await asyncio.to_thread(MESSAGES["ForwardBackwardRequest"].FromString, data)
    except DecodeError as error:
        raise Refusal(400, f"the body is no ForwardBackwardRequest ({error})") from error
    return {"model_id": message.model_id, "seq_id": message.seq_id or None}


def new_session(tenant: Tenant, values: dict[str, Any], now: float) -> Session:
    wanted = ("tags", "user_metadata", "sdk_version", "project_id", "display_name")
    return Session(uuid.uuid4().hex, tenant.owner, now, {key: values.get(key) for key in wanted})


def moved(session: Session, project: str | None) -> Session:
    return replace(session, facts={**session.facts, "project_id": project})
