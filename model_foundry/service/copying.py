"""`copy_weights`: another run that holds a copy of a checkpoint, and cannot be trained."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from sqlalchemy import Connection

from model_foundry.errors import CheckpointError, DataError
from model_foundry.service.bodies import Refusal, read_body, reply
from model_foundry.service.books import Checkpoint, Model, Session, model_facts
from model_foundry.service.downloads import opened
from model_foundry.service.front import Front, new_session
from model_foundry.service.keys import Tenant
from model_foundry.service.requests import CopyWeights


async def copy_weights(front: Front, request: Request) -> Response:
    """Answered when the copy is whole. A repeat finds the first one by the run's number, or by the idempotency key."""
    tenant = front.tenant(request)
    asked = await read_body(request, CopyWeights, limit=front.limits.body_bytes)
    source = front.books.checkpoint_at(asked.source_path, tenant.sees)
    if source is None:
        raise Refusal(404, f"there is no checkpoint {asked.source_path}")
    session, number = _destination(front, request, tenant, asked)
    run_id = f"{session.session_id}:train:{number}"
    known = front.books.models.get(run_id)
    if known is not None and known.facts.get("copy_of") != source.path:
        raise _taken(run_id)
    copy = _copy_of(front, source, run_id, session, asked)
    if known is None or copy.key not in front.books.checkpoints:
        if copy.key in front.being_removed:
            raise Refusal(409, f"{copy.path} is being deleted; ask again", {"Retry-After": "1"})
        try:
            front.executor.check_quota(copy.owner, where="copy_weights")
        except DataError as error:
            raise Refusal(403, str(error), {"x-should-retry": "false"}) from error
        # The number is taken first: a run of another client's with it would have its files replaced.
        await _reserve(front, source, copy, session)
        await asyncio.to_thread(_write, front, source, copy)
        await front.put(copy)
    return reply({"tinker_path": copy.path})


async def _reserve(front: Front, source: Checkpoint, copy: Checkpoint, session: Session) -> None:
    """The run, and its session where that is new, in one transaction.

    Raises:
        Refusal: the number is another run's.
    """
    facts = {**source.facts["lora"], "user_metadata": None, "copy_of": source.path}
    # Its number 0 is done: what is asked of it afterwards is refused, and is not the making of it.
    model = Model(copy.run_id, session.session_id, session.owner, copy.created, copy.created, facts,
                  state="unloaded", done_seq=0)  # fmt: skip
    items = [model] if session.session_id in front.books.sessions else [session, model]
    puts = [front.books.put(item) for item in items]

    def write(connection: Connection) -> None:
        found = model_facts(connection, copy.run_id)
        if found is not None and found.get("copy_of") != source.path:
            raise _taken(copy.run_id)
        for work, _ in puts:
            work(connection)

    def then() -> None:
        for _, apply in puts:
            apply()

    await front.commit(write, then=then)


def _taken(run_id: str) -> Refusal:
    return Refusal(409, f"{run_id} is taken", {"x-should-retry": "false"})


def _destination(front: Front, request: Request, tenant: Tenant, asked: CopyWeights) -> tuple[Session, int]:
    """The session that will own the copy, and the number of its run."""
    if asked.session_id is not None and asked.model_seq_id is not None:
        return front.open_session(asked.session_id, tenant), asked.model_seq_id
    key = request.headers.get("x-idempotency-key")
    name = uuid.uuid5(uuid.NAMESPACE_URL, f"{tenant.owner}/{key}").hex if key else uuid.uuid4().hex
    facts: dict[str, Any] = {"project_id": asked.destination_project_id, "display_name": f"copy of {asked.source_path}"}
    fresh = new_session(tenant, facts, front.books.clock())
    found = front.books.sessions.get(f"copy-{name}")
    return found or Session(f"copy-{name}", fresh.owner, fresh.created, fresh.facts, fresh.created), 0


def _copy_of(front: Front, source: Checkpoint, run_id: str, session: Session, asked: CopyWeights) -> Checkpoint:
    now = front.books.clock()
    expires = None if asked.ttl_seconds is None else now + asked.ttl_seconds
    facts = {**source.facts, "is_ephemeral": False}
    return Checkpoint(run_id, source.kind, source.name, session.owner, now, source.size_bytes, facts, expires)


def _write(front: Front, source: Checkpoint, copy: Checkpoint) -> None:
    host, stored = front.executor.host, opened(front, source)

    def write(folder: Path) -> None:
        for part in stored.path.iterdir():
            if part.is_dir():
                shutil.copytree(part, folder / part.name)

    try:
        store = host.store(copy.run_id, copy.kind)
        store.save(copy.name, stored.step, write, stored.metadata, expected_bytes=stored.total_bytes)
    except CheckpointError as error:
        raise Refusal(507, str(error), {"x-should-retry": "false"}) from error
