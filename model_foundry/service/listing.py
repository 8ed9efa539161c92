"""The routes that show and tidy up: sessions, training runs, checkpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from model_foundry.checkpoint import atomic
from model_foundry.service.bodies import Refusal, read_body, reply
from model_foundry.service.books import SEGMENTS, Checkpoint, Model
from model_foundry.service.front import Front, moved
from model_foundry.service.keys import Tenant
from model_foundry.service.requests import MoveSession, SetTtl

Route = Callable[[Front, Request], Awaitable[Response]]
_MOST = 1000


def listing_routes() -> dict[tuple[str, str], Route]:
    """(method, path below /api/v1) -> route."""
    at = "training_runs/{run_id}/checkpoints/{segment}/{name}"
    return {
        ("GET", "sessions"): sessions,
        ("GET", "sessions/{session_id}"): session,
        ("PUT", "sessions/{session_id}/project"): move_session,
        ("GET", "training_runs"): runs,
        ("GET", "training_runs/{run_id}"): run,
        ("GET", "training_runs/{run_id}/checkpoints"): run_checkpoints,
        ("GET", "models/{run_id}/checkpoints"): run_checkpoints,
        ("GET", "checkpoints"): all_checkpoints,
        ("DELETE", at): delete_checkpoint,
        ("POST", f"{at}/publish"): publish,
        ("DELETE", f"{at}/publish"): unpublish,
        ("PUT", f"{at}/ttl"): set_ttl,
    }


async def sessions(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    mine = [item for item in front.books.sessions.values() if tenant.sees in (None, item.owner)]
    mine.sort(key=lambda item: item.created, reverse=True)
    page, _ = _page(request, [item.session_id for item in mine])
    return reply({"sessions": page})


async def session(front: Front, request: Request) -> Response:
    found = front.session(request.path_params["session_id"], front.tenant(request))
    return reply({
        "training_run_ids": [m.model_id for m in front.books.models.values() if m.session_id == found.session_id],
        "sampler_ids": [s.sampler_id for s in list(front.books.samplers.values()) if s.session_id == found.session_id],
        "user_metadata": found.facts.get("user_metadata"),
        "display_name": found.facts.get("display_name"),
    })  # fmt: skip


async def move_session(front: Front, request: Request) -> Response:
    found = front.session(request.path_params["session_id"], front.tenant(request))
    asked = await read_body(request, MoveSession, limit=front.limits.body_bytes)
    # As it is now: it may have been finished while the body was on its way.
    await front.put(moved(front.books.sessions[found.session_id], asked.project_id))
    return Response(status_code=204)


async def runs(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    project = request.query_params.get("project_id")
    mine = [model for model in front.books.models.values() if tenant.sees in (None, model.owner) and model.facts]
    if project is not None:
        mine = [m for m in mine if front.books.sessions[m.session_id].facts.get("project_id") == project]
    mine.sort(key=lambda model: model.last_request, reverse=True)
    page, cursor = _page(request, mine)
    return reply({"training_runs": [_run(front, model) for model in page], "cursor": cursor})


async def run(front: Front, request: Request) -> Response:
    return reply(_run(front, front.model(request.path_params["run_id"], front.tenant(request))))


def _run(front: Front, model: Model) -> dict[str, Any]:
    newest = {kind: max(_of_run(front, model.model_id, kind), key=lambda item: item.created, default=None)
              for kind in SEGMENTS}  # fmt: skip
    return {
        "training_run_id": model.model_id,
        "base_model": front.executor.base_models[0],
        "model_owner": model.owner,
        "is_lora": True,
        "corrupted": model.state == "failed",
        "lora_rank": model.facts.get("rank"),
        "last_request_time": _time(model.last_request),
        "last_checkpoint": newest["training"] and _checkpoint(newest["training"]),
        "last_sampler_checkpoint": newest["sampler"] and _checkpoint(newest["sampler"]),
        "user_metadata": model.facts.get("user_metadata"),
    }


async def run_checkpoints(front: Front, request: Request) -> Response:
    model = front.model(request.path_params["run_id"], front.tenant(request))
    found = sorted(_of_run(front, model.model_id, *SEGMENTS), key=lambda item: item.created)
    return reply({"checkpoints": [_checkpoint(item) for item in found]})


async def all_checkpoints(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    mine = [item for item in shown_checkpoints(front) if tenant.sees in (None, item.owner)]
    mine.sort(key=lambda item: item.created, reverse=True)
    page, cursor = _page(request, mine)
    return reply({"checkpoints": [_checkpoint(item) for item in page], "cursor": cursor})


def shown_checkpoints(front: Front) -> list[Checkpoint]:
    """Named checkpoints that have not expired; those of a sampling session alone are nobody's to list."""
    now = front.books.clock()
    return [
        item
        for item in front.books.checkpoints.values()
        if not item.facts["is_ephemeral"] and (item.expires is None or item.expires > now)
    ]


def _of_run(front: Front, run_id: str, *kinds: str) -> list[Checkpoint]:
    return [item for item in shown_checkpoints(front) if item.run_id == run_id and item.kind in kinds]


def _checkpoint(item: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{SEGMENTS[item.kind]}/{item.name}",
        "checkpoint_type": item.kind,
        "time": _time(item.created),
        "tinker_path": item.path,
        "size_bytes": item.size_bytes,
        "public": item.public,
        "user_metadata": item.facts.get("user_metadata"),
        "expires_at": None if item.expires is None else _time(item.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()  # noqa: UP017


def _page(request: Request, items: Sequence[Any]) -> tuple[Sequence[Any], dict[str, int]]:
    numbers = {"limit": 20, "offset": 0}
    for key in numbers:
        given = request.query_params.get(key, str(numbers[key]))
        if not given.isdecimal() or int(given) > 10**9:
            raise Refusal(422, f"{key} is {given!r}; it must be a whole number")
        numbers[key] = int(given)
    limit, offset = min(numbers["limit"], _MOST), numbers["offset"]
    return items[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(items)}


def path_info(front: Front, path: str, tenant: Tenant) -> dict[str, Any]:
    found = front.books.checkpoint_at(path, tenant.sees)
    if found is None:
        raise Refusal(404, f"there is no checkpoint {path}")
    lora = found.facts["lora"]
    flags = {key: lora[key] for key in ("train_unembed", "train_mlp", "train_attn")}
    base = front.executor.base_models[0]
    return {
        "base_model": base,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": lora["rank"],
        **flags,
    }


def _own(front: Front, request: Request) -> Checkpoint:
    """The checkpoint of a path that this client may change: its own, published or not."""
    tenant, given = front.tenant(request), request.path_params
    path = f"tinker://{given['run_id']}/{given['segment']}/{given['name']}"
    found = front.books.checkpoint_at(path, None)
    if found is None or tenant.sees not in (None, found.owner):
        raise Refusal(404, f"there is no checkpoint {path}")
    return found


async def delete_checkpoint(front: Front, request: Request) -> Response:
    await remove_checkpoint(front, _own(front, request))
    return Response(status_code=204)


async def remove_checkpoint(front: Front, found: Checkpoint) -> None:
    """First from the journal, then from the disk: nothing is ever listed that is not whole."""
    work, apply = front.books.remove(found)
    folder = front.executor.host.store(found.run_id, found.kind).path(found.name)

    def remove() -> None:
        # Another may have been saved under its name meanwhile, and listed; its folder has taken this one's place.
        try:
            if found.key not in front.books.checkpoints and folder.is_dir():
                atomic.remove_directory(folder)
        finally:
            front.being_removed.discard(found.key)

    def then() -> None:
        apply()
        front.being_removed.add(found.key)
        front.worker.call(remove)

    await front.commit(work, then=then)


async def _change(front: Front, found: Checkpoint, **values: Any) -> Response:
    work, apply = front.books.change(found, **values)
    if not await front.commit(work, then=apply):
        what = f"{found.path} was replaced or deleted meanwhile; ask again"
        raise Refusal(409, what, {"Retry-After": "1"})
    return Response(status_code=204)


async def publish(front: Front, request: Request) -> Response:
    return await _change(front, _own(front, request), public=True)


async def unpublish(front: Front, request: Request) -> Response:
    return await _change(front, _own(front, request), public=False)


async def set_ttl(front: Front, request: Request) -> Response:
    _own(front, request)
    seconds = (await read_body(request, SetTtl, limit=front.limits.body_bytes)).ttl_seconds
    # As it is now: it may have been published, or deleted, while the body was on its way.
    found = _own(front, request)
    return await _change(front, found, expires=None if seconds is None else front.books.clock() + seconds)
