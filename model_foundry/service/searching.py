"""`sessions/search`: a client's sessions by name, data, project and how they ended, newest first."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from model_foundry.service.bodies import read_body, reply
from model_foundry.service.books import Session
from model_foundry.service.front import Front
from model_foundry.service.keys import Tenant
from model_foundry.service.requests import FinishedQuery, SessionSearch, StatusQuery


async def search(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    asked = await read_body(request, SessionSearch, limit=front.limits.body_bytes)
    found = [item for item in front.books.sessions.values() if _sees(tenant, item, asked) and _matches(item, asked)]
    found.sort(key=_place, reverse=True)
    if asked.cursor is not None:
        after = (asked.cursor.last_created_at.timestamp(), asked.cursor.last_session_id)
        found = [item for item in found if _place(item) < after]
    page = found[: asked.limit]
    more = len(found) > len(page)
    cursor = {"last_created_at": _time(page[-1].created), "last_session_id": page[-1].session_id} if more else None
    return reply({"sessions": [_summary(front, item) for item in page], "next_cursor": cursor})


def _place(session: Session) -> tuple[float, str]:
    # As the cursor says it, in whole microseconds.
    return datetime.fromisoformat(_time(session.created)).timestamp(), session.session_id


def _sees(tenant: Tenant, session: Session, asked: SessionSearch) -> bool:
    if asked.owner.type == "user" and session.owner not in (asked.owner.owner_urns or ()):
        return False
    return session.owner == tenant.owner or (tenant.sees is None and asked.owner.type != "own")


def _matches(session: Session, asked: SessionSearch) -> bool:
    facts = session.facts
    metadata = facts.get("user_metadata") or {}
    if any(metadata.get(key) != value for key, value in asked.user_metadata.items()):
        return False
    if asked.project_ids is not None and facts.get("project_id") not in asked.project_ids:
        return False
    if asked.statuses is not None and not any(_is_so(session, query) for query in asked.statuses):
        return False
    if asked.session_id is None and asked.display_name is None:
        return True
    shown = str(facts.get("display_name") or "").lower()
    by_name = asked.display_name is not None and all(word in shown for word in asked.display_name.lower().split())
    by_id = asked.session_id is not None and session.session_id == asked.session_id
    return by_name or by_id


def _is_so(session: Session, query: StatusQuery | FinishedQuery) -> bool:
    if isinstance(query, FinishedQuery):
        return session.finished is not None and (query.reasons is None or _reason(session) in query.reasons)
    # Sessions neither fail nor are cancelled here: what fails is an operation.
    return query.type == "active" and session.finished is None


def _reason(session: Session) -> str:
    kind = (session.facts.get("finish_reason") or {}).get("type")
    return str(kind) if kind in ("success", "errored", "interrupted") else "success"


def _status(session: Session) -> dict[str, Any]:
    if session.finished is None:
        return {"type": "active"}
    detail = session.facts.get("finish_detail")
    return {"type": "client_finished", "reason": {"type": _reason(session)}, "detail": detail}


def _summary(front: Front, session: Session) -> dict[str, Any]:
    runs = {model.model_id for model in front.books.models.values() if model.session_id == session.session_id}
    kept = [c for c in front.books.checkpoints.values() if c.run_id in runs and not c.facts["is_ephemeral"]]
    return {
        "session_id": session.session_id,
        "created_at": _time(session.created),
        "owner": session.owner,
        "project_id": session.facts.get("project_id") or "",
        "status": _status(session),
        "checkpoints_count": len(kept),
        "display_name": session.facts.get("display_name"),
        "user_metadata": session.facts.get("user_metadata"),
        "checkpoint_storage_bytes": sum(item.size_bytes for item in kept),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds")  # noqa: UP017
