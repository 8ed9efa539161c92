"""The routes about keys, and what is stored for them. Nothing is billed here, and no audit log is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import Response

from model_foundry.service.bodies import Refusal, reply
from model_foundry.service.front import Front

Route = Callable[[Front, Request], Awaitable[Response]]
TOKEN_SECONDS = 3600.0


def account_routes() -> dict[tuple[str, str], Route]:
    """(method, path below /api/v1) -> route."""
    return {
        ("GET", "auth/apikey/me"): who_am_i,
        ("DELETE", "auth/apikey/me"): give_up_key,
        ("POST", "auth/token"): token,
        ("GET", "audit"): refusing("this service keeps no audit log; its log file says what was refused and failed"),
        ("GET", "billing/usage/events"): refusing("this service bills nothing and counts no usage"),
        ("GET", "billing/usage/checkpoints/current"): storage,
    }


def refusing(what: str, status: int = 404) -> Route:
    """A route of the protocol that has nothing to say here, and says so."""

    async def refuse(front: Front, request: Request) -> Response:
        front.tenant(request)
        raise Refusal(status, what)

    return refuse


async def who_am_i(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    key = next((key for key in front.keys.list() if key.key_id == tenant.owner), None)
    name = "open" if key is None else key.name
    details = {"org_details": {"name": "model-foundry"}, "user_details": {"email": ""}}
    return reply({"key_id": 0, "name": name, "note": tenant.role, "details": details})


async def give_up_key(front: Front, request: Request) -> Response:
    """Revoke the key that asks."""
    tenant = front.tenant(request)
    key = next((key for key in front.keys.list() if key.key_id == tenant.owner and key.revoked is None), None)
    if key is None:
        raise Refusal(404, "this key was not minted here, so there is nothing to revoke")
    front.keys.revoke(key.name)
    return Response(status_code=204)


async def token(front: Front, request: Request) -> Response:
    """A token that stands for the key for an hour."""
    return reply({"jwt": front.signer.token(front.tenant(request).owner, seconds=TOKEN_SECONDS)})


async def storage(front: Front, request: Request) -> Response:
    """Checkpoints that there are, by project."""
    tenant = front.tenant(request)
    sizes: dict[str | None, list[int]] = defaultdict(list)
    for item in front.books.checkpoints.values():
        if tenant.sees in (None, item.owner) and not item.facts["is_ephemeral"]:
            session = front.books.sessions[front.books.models[item.run_id].session_id]
            sizes[session.facts.get("project_id")].append(item.size_bytes)
    rows = [
        {
            "project_id": project,
            "checkpoint_count": len(each),
            "size_bytes": sum(each),
            "size_gigabytes": sum(each) / 1e9,
        }
        for project, each in sizes.items()
    ]
    return reply({"effective_rate_usd_per_gigabyte_month": None, "data": rows})
