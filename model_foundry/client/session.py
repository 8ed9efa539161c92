"""A session with a training service: where its clients get their numbers, and what they all use."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.client.futures import LoopThread
from model_foundry.client.remote import Connection
from model_foundry.errors import ModelError
from model_foundry.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """What the clients of one `ServiceClient` share. Numbers of models and of samplers count up from zero."""

    loop: LoopThread
    connection: Connection
    session_id: str
    model_numbers: itertools.count[int] = field(default_factory=itertools.count)
    sampler_numbers: itertools.count[int] = field(default_factory=itertools.count)
    _beating: list[asyncio.Task[None]] = field(default_factory=list)

    def begin_heartbeat(self) -> None:
        """In the loop."""
        self._beating.append(asyncio.create_task(self.connection.beat(self.session_id)))

    def end_heartbeat(self) -> None:
        while self._beating:
            self._beating.pop().cancel()

    async def operate(self, path: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for something that is done later, and wait until it is."""
        accepted = await self.connection.post(path, values)
        return (await self.connection.result(accepted["request_id"])).json()


def load_tokenizer(place: str | None, name: str) -> Tokenizer:
    """The base's tokenizer: from the service's folder where this machine has it, else by the base's name.

    Raises:
        ModelError: neither is here.
    """
    if place is not None and Path(place).is_dir():
        return Tokenizer.load(Path(place))
    from model_foundry.models.finder import resolve_model

    try:
        return Tokenizer.load(resolve_model(name).folder)
    except ModelError as error:
        hint = "Pull it, or load the tokenizer yourself: model_foundry.Tokenizer.load(FOLDER)."
        raise ModelError(f"the tokenizer of {name} is not on this machine", hint=hint) from error
