"""The models that clients may name: the base and adapters over it, each with its renderer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model_foundry.errors import UsageError
from model_foundry.rendering import Renderer
from model_foundry.server.problems import Problem
from model_foundry.types import Message


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that clients use.

    Attributes:
        renderer: of the run that trained it, else the base's.
        adapter: what the back end calls its adapter; None for the base.
        parent: the served name of the base, for an adapter.
        checkpoint: name of the run's checkpoint that answers; None where it is none of a run.
    """

    name: str
    renderer: Renderer
    adapter: str | None = None
    parent: str | None = None
    checkpoint: str | None = None
    removable: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def has_template(self) -> bool:
        return bool(self.renderer.template_text)

    def chat_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 [T]; control tokens in what people wrote are plain text.

        Raises:
            TemplateError: the template refuses the conversation, or there is none.
        """
        return self.renderer.prompt(messages)

    def plain_prompt(self, text: str) -> np.ndarray:
        """int32 [T]: the text as it stands, with what the tokenizer puts before one; control tokens are plain text."""
        tokenizer = self.renderer.tokenizer
        ids = tokenizer.encode(text)
        if tokenizer.adds_bos and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id, *ids]
        return np.array(ids, dtype=np.int32)


class Catalog:
    """Served models by name; the first is what a request without a name gets."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models: dict[str, ServedModel] = {}
        self._holds: Counter[str] = Counter()
        self._released = asyncio.Event()
        for model in models:
            if model.name in self._models:
                hint = "Set another served_name, or another name in adapters."
                raise UsageError(f"two models would be called {model.name!r}", hint=hint)
            self._models[model.name] = model

    def __iter__(self):
        return iter(list(self._models.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._models

    @property
    def default(self) -> ServedModel:
        return next(iter(self._models.values()))

    def find(self, name: str | None) -> ServedModel:
        """Raises: Problem: 404 for a name that is not served."""
        if name is None:
            return self.default
        try:
            return self._models[name]
        except KeyError:
            served = ", ".join(self._models)
            raise Problem(
                404, f"this model is not served; there is: {served}", param="model", code="model_not_found"
            ) from None

    def put(self, model: ServedModel) -> None:
        """Add a model, or put it in the place of the one that has its name."""
        self._models[model.name] = model

    def remove(self, name: str) -> ServedModel:
        return self._models.pop(name)

    def hold(self, model: ServedModel) -> None:
        """A request that has it stays with its adapter, whatever the name stands for by then."""
        if model.adapter is not None:
            self._holds[model.adapter] += 1

    def release(self, model: ServedModel) -> None:
        """What `hold` took."""
        if model.adapter is not None:
            self._holds[model.adapter] -= 1
            self._released.set()

    async def unused(self, adapter: str) -> None:
        """Wait until no request holds an adapter."""
        while self._holds[adapter] > 0:
            self._released.clear()
            await self._released.wait()
        del self._holds[adapter]
