"""A service in the test's own event loop, whose insides can be looked at and held up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text

from model_foundry.config.load import load_config
from model_foundry.config.service import ServiceConfig
from model_foundry.service.app import make_app
from model_foundry.service.front import Front
from model_foundry.service.running import running
from tests.service_rig import KEY


class Client:
    """A service in this event loop, its insides, and a client of it."""

    def __init__(self, front: Front, api: httpx.AsyncClient) -> None:
        self.front, self.api = front, api
        self.session = self.model = ""

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.api.post(path, json=body)

    async def result(self, answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 200, answer.text
        return (await self.post("retrieve_future", {"request_id": answer.json()["request_id"]})).json()

    async def done(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self.result(await self.post(path, body))

    async def new_session(self) -> str:
        self.session = (await self.post("create_session", {})).json()["session_id"]
        return self.session

    async def create(self, number: int) -> httpx.Response:
        base = self.front.executor.base_models[0]
        body = {"session_id": self.session, "model_seq_id": number, "base_model": base, "lora_config": {"rank": 1}}
        return await self.post("create_model", body)

    async def new_model(self) -> str:
        await self.new_session()
        self.model = (await self.result(await self.create(0)))["model_id"]
        return self.model

    async def save(self, seq: int, *, overwrite: bool = False) -> dict[str, Any]:
        body = {"model_id": self.model, "seq_id": seq, "path": "x", "overwrite": overwrite}
        return await self.done("save_weights", body)

    async def load(self, seq: int) -> dict[str, Any]:
        body = {"model_id": self.model, "seq_id": seq, "path": f"tinker://{self.model}/weights/x", "optimizer": True}
        return await self.done("load_weights", body)

    async def listed(self) -> list[dict[str, Any]]:
        return (await self.api.get(f"training_runs/{self.model}/checkpoints")).json()["checkpoints"]

    @property
    def at(self) -> str:
        return f"training_runs/{self.model}/checkpoints/weights/x"

    async def idle(self) -> None:
        """Until the worker has done what it was given to do between operations."""
        over = threading.Event()
        self.front.worker.call(over.set)
        assert await asyncio.to_thread(over.wait, 20)


@asynccontextmanager
async def served(base: Path, state: Path, *options: str) -> AsyncIterator[Client]:
    overrides = [f"base_model={base}", f"state_dir={state}", "num_threads=1", "dtype=float32", *options]
    async with running(load_config(ServiceConfig, path=None, overrides=overrides).config, every_key=True) as front:
        transport = httpx.ASGITransport(app=make_app(front))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://service/api/v1/", headers={"X-API-Key": KEY}, timeout=60
        ) as api:
            yield Client(front, api)


def bodies(client: Client, model: str) -> int:
    """Bytes that the journal keeps of what was asked of a model, and is done."""
    wanted = text("select coalesce(sum(length(body)), 0) from operations where lane = :lane and finished is not null")
    return client.front.books.journal.read(lambda connection: connection.execute(wanted, {"lane": model}).scalar_one())
