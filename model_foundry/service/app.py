"""The routes that carry training: start-up, sessions, operations, futures. Listings are `listing`'s."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from model_foundry.service.accounts import account_routes, refusing
from model_foundry.service.bodies import Refusal, read_body, read_json, reply, text
from model_foundry.service.books import Sampler, finished
from model_foundry.service.copying import copy_weights
from model_foundry.service.downloads import download_routes
from model_foundry.service.front import Front, new_session
from model_foundry.service.futures import future_routes
from model_foundry.service.listing import listing_routes, path_info
from model_foundry.service.page_routes import page_routes
from model_foundry.service.requests import CreateSamplingSession, CreateSession, FinishSession
from model_foundry.service.searching import search

Route = Callable[[Front, Request], Awaitable[Response]]
UNEMBED_NOTE = (
    "train_unembed is not done over this base, which transformers runs: adapters go on the attention and MLP layers, "
    "and the output head stays as the base has it"
)
CUSTOM_LOSS_NOTE = (
    "custom losses are differentiated by the client here; forward_backward_custom does so by itself, "
    "because client/config says custom_loss_server_side is false"
)
logger = logging.getLogger(__name__)


def make_app(front: Front) -> FastAPI:
    """The application over a running service."""
    app = FastAPI(title="Model Foundry training service", openapi_url=None, docs_url=None, redoc_url=None)
    for (method, path), route in {
        **_ROUTES, **listing_routes(), **future_routes(), **download_routes(), **account_routes()
    }.items():  # fmt: skip
        app.add_route(f"/api/v1/{path}", _handler(front, route), methods=[method])
    for path, route in page_routes().items():
        app.add_route(path, _handler(front, route), methods=["GET"])
    return app


def _handler(front: Front, route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        try:
            return await route(front, request)
        except Refusal as refusal:
            return refusal.response()
        except Exception as error:
            # A client tries again after a 500, and it would be the same again.
            logger.exception("%s failed", request.url.path)
            return Refusal(
                500, f"the service failed on this ({type(error).__name__})", {"x-should-retry": "false"}
            ).response()

    return handle


def _operation(kind: str) -> Route:
    async def submit(front: Front, request: Request) -> Response:
        return await front.submit(request, kind)

    return submit


async def _body(front: Front, request: Request) -> dict[str, Any]:
    return await read_json(request, limit=front.limits.body_bytes)


async def health(front: Front, request: Request) -> Response:
    return reply({"status": "ok"})


async def capabilities(front: Front, request: Request) -> Response:
    front.tenant(request)
    facts = {"max_context_length": front.executor.host.facts["context"], "trainable": True, "sampleable": True}
    return reply({"supported_models": [{"model_name": name, **facts} for name in front.executor.base_models]})


async def client_config(front: Front, request: Request) -> Response:
    front.tenant(request)
    # Bodies are not worth packing on one machine; what is left out has the client's own default.
    return reply({"pjwt_auth_enabled": False, "proto_compress_fwdbwd": False, "custom_loss_server_side": False})


async def dynamic_config(front: Front, request: Request) -> Response:
    front.tenant(request)
    return reply({})


async def create_session(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    asked = await read_body(request, CreateSession, limit=front.limits.body_bytes)
    session = new_session(tenant, asked.model_dump(), front.books.clock())
    await front.put(session)
    front.seen[session.session_id] = session.created
    warning = None if front.executor.host.adapts_head else UNEMBED_NOTE
    return reply({"type": "create_session", "session_id": session.session_id, "warning_message": warning})


async def heartbeat(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    front.open_session(text(await _body(front, request), "session_id"), tenant)
    return reply({"type": "session_heartbeat"})


async def finish_session(front: Front, request: Request) -> Response:
    session = front.session(request.path_params["session_id"], front.tenant(request))
    asked = await read_body(request, FinishSession, limit=front.limits.body_bytes)
    reason = {} if asked.reason is None else asked.reason.model_dump()
    # As it is now: it may have been moved while the body was on its way.
    now = front.books.sessions[session.session_id]
    await front.put(finished(now, front.books.clock(), reason, asked.detail))
    return Response(status_code=204)


async def telemetry(front: Front, request: Request) -> Response:
    """Taken, so that clients do not complain, and kept nowhere."""
    front.tenant(request)
    await _body(front, request)
    return reply({"status": "accepted"})


async def get_info(front: Front, request: Request) -> Response:
    model = front.model(text(await _body(front, request), "model_id"), front.tenant(request))
    if "rank" not in model.facts:
        raise Refusal(404, f"the model {model.model_id} is not there yet, or could not be created")
    name, folder = front.executor.base_models[0], str(front.executor.host.source.folder.resolve())
    data = {
        "arch": front.executor.host.architecture,
        "model_name": name,
        # Clients cut at a colon.
        "tokenizer_id": None if ":" in folder else folder,
    }
    return reply({
        "type": "get_info", "model_id": model.model_id, "model_data": data, "is_lora": True, "model_name": name,
        "lora_rank": model.facts["rank"], "optimizer_config": {"type": "adamw"},
        "train_unembed": model.facts["train_unembed"],
    })  # fmt: skip


async def weights_info(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    path = text(await _body(front, request), "tinker_path")
    return reply(path_info(front, path, tenant))


async def create_sampling_session(front: Front, request: Request) -> Response:
    tenant = front.tenant(request)
    asked = await read_body(request, CreateSamplingSession, limit=front.limits.body_bytes)
    session, path = front.open_session(asked.session_id, tenant), asked.model_path
    sampler_id = f"{session.session_id}:sample:{asked.sampling_session_seq_id}"
    answer = reply({"type": "create_sampling_session", "sampling_session_id": sampler_id})
    if (known := front.books.samplers.get(sampler_id)) is not None:
        if known.path != path:
            raise Refusal(409, f"{sampler_id} samples {known.path or 'the base'}", {"x-should-retry": "false"})
        return answer
    if path is not None and front.books.checkpoint_at(path, tenant.sees) is None:
        raise Refusal(404, f"there is no checkpoint {path}")
    if (path is None or asked.base_model is not None) and asked.base_model not in front.executor.base_models:
        raise Refusal(400, f"this service has {front.executor.base_models[0]}, not {asked.base_model}")
    await front.put(Sampler(sampler_id, session.session_id, session.owner, front.books.clock(), path))
    return answer


async def get_sampler(front: Front, request: Request) -> Response:
    sampler = front.sampler(request.path_params["sampler_id"], front.tenant(request))
    folder = str(front.executor.host.source.folder.resolve())
    # The client's only way to a tokenizer is this name: a folder serves it where the name is not one of the hub's.
    is_hub_name = front.executor.base_models[0].count("/") == 1 and not front.executor.base_models[0].startswith(
        (".", "/")
    )
    base = front.executor.base_models[0] if is_hub_name else folder
    return reply({"sampler_id": sampler.sampler_id, "base_model": base, "model_path": sampler.path})


async def submit_sample(front: Front, request: Request) -> Response:
    return await front.submit_sample(request)


async def retrieve(front: Front, request: Request) -> Response:
    return await front.retrieve(request)


_ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "healthz"): health,
    ("GET", "get_server_capabilities"): capabilities,
    ("POST", "client/config"): client_config,
    ("POST", "client/dynamic_config"): dynamic_config,
    ("POST", "create_session"): create_session,
    ("POST", "session_heartbeat"): heartbeat,
    ("POST", "sessions/{session_id}/finish"): finish_session,
    ("POST", "telemetry"): telemetry,
    ("POST", "create_model"): _operation("create_model"),
    ("POST", "load_weights"): _operation("load_weights"),
    ("POST", "forward_backward"): _operation("forward_backward"),
    ("POST", "forward"): _operation("forward"),
    ("POST", "optim_step"): _operation("optim_step"),
    ("POST", "save_weights"): _operation("save_weights"),
    ("POST", "save_weights_for_sampler"): _operation("save_weights_for_sampler"),
    ("POST", "save_weights_external"): _operation("save_weights_external"),
    ("POST", "copy_weights"): copy_weights,
    ("POST", "unload_model"): _operation("unload_model"),
    ("POST", "create_custom_loss"): refusing(CUSTOM_LOSS_NOTE, 400),
    ("POST", "sessions/search"): search,
    ("POST", "get_info"): get_info,
    ("POST", "weights_info"): weights_info,
    ("POST", "create_sampling_session"): create_sampling_session,
    ("GET", "samplers/{sampler_id}"): get_sampler,
    ("POST", "asample"): submit_sample,
    ("POST", "retrieve_future"): retrieve,
}
"""(method, path below /api/v1) -> route."""
