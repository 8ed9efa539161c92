"""/adapters: added and removed while the server runs, by a key with admin rights.

A client names a folder, never a path: the name is looked up in a listing of `access.adapter_folder`, so no text from
the network becomes part of one.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from model_foundry.errors import FoundryError
from model_foundry.server.adapters import AdapterShelf
from model_foundry.server.json_route import StrictJsonRoute
from model_foundry.server.problems import Problem
from model_foundry.server.routes_generate import ERRORS
from model_foundry.server.schemas import AdapterRequest

CODES: dict[int | str, dict[str, Any]] = {
    **{status: ERRORS[status] for status in (400, 401, 404, 413, 422, 429)},
    403: {"description": "the key has no admin rights"},
    409: {"description": "the name is taken, or the model cannot be removed"},
}


class AdapterList(BaseModel):
    served: list[str]
    available: list[str]


def router(shelf: AdapterShelf) -> APIRouter:
    routes = APIRouter(route_class=StrictJsonRoute, tags=["adapters"])

    @routes.get("/adapters", response_model=AdapterList, responses=CODES, summary="What is served, and to be had")
    async def list_adapters(request: Request) -> Any:
        _check_admin(request)
        return {"served": shelf.served(), "available": sorted(shelf.available())}

    @routes.post("/adapters", response_model=AdapterList, status_code=201, responses=CODES, summary="Serve an adapter")
    async def add_adapter(body: AdapterRequest, request: Request) -> Any:
        _check_admin(request)
        try:
            await shelf.add(body.name, body.folder or body.name)
        except FoundryError as error:
            raise Problem(422, error.what, param="folder", code="adapter_refused") from None
        return {"served": shelf.served(), "available": sorted(shelf.available())}

    @routes.delete("/adapters/{name}", response_model=AdapterList, responses=CODES, summary="Stop serving an adapter")
    async def remove_adapter(name: str, request: Request) -> Any:
        _check_admin(request)
        await shelf.remove(name)
        return {"served": shelf.served(), "available": sorted(shelf.available())}

    return routes


def _check_admin(request: Request) -> None:
    key = request.state.visit.key
    if key is None or not key.admin:
        raise Problem(403, "this needs a key with admin rights (foundry serve keys add NAME --admin)", code="not_admin")
