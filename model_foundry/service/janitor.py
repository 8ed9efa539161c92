"""What is done now and then: expired checkpoints go, old results go, silent sessions give up their memory.

A finished session's models are unloaded when nothing was asked of them for a while. A silent one's may be asked for
again, and stay on the disk, but for those that their key has too many of.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from sqlalchemy import Connection, delete, or_, update

from model_foundry.errors import FoundryError
from model_foundry.service import journal as tables
from model_foundry.service.bodies import Refusal
from model_foundry.service.books import IS_OVER, Model
from model_foundry.service.front import Front
from model_foundry.service.listing import remove_checkpoint

PERIOD_SECONDS = 3.0
_KEPT_OPEN_SECONDS = 600.0
logger = logging.getLogger(__name__)


class Janitor:
    """Looks every few seconds.

    Args:
        result_seconds: how long a result can be asked for again.
    """

    def __init__(self, front: Front, *, result_seconds: float) -> None:
        self.front, self.result_seconds = front, result_seconds
        self._is_out: set[str] = set()
        self._leaving: set[str] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                await self.look()
            except Refusal as refusal:
                logger.warning("tidying up: %s", refusal.what)
            except FoundryError as error:
                logger.warning("tidying up: %s", error)

    async def look(self) -> None:
        front, now = self.front, self.front.books.clock()
        await asyncio.to_thread(front.keys.reload)
        for key in list(front.books.checkpoints):
            # As it is now: each removal takes a moment.
            if (item := front.books.checkpoints.get(key)) is None:
                continue
            session = front.books.sessions.get(front.books.models[item.run_id].session_id)
            is_over = item.facts["is_ephemeral"] and session is not None and session.finished is not None
            if is_over or (item.expires is not None and item.expires <= now):
                await remove_checkpoint(front, item)
        models = [model for model in front.books.models.values() if model.state == "live"]
        self._evict_silent(models, now)
        self._unload_over(models)
        for request_id, operation in list(front.open.items()):
            # Nobody has asked for it; it is in the journal.
            if operation.done.is_set() and now - operation.created > _KEPT_OPEN_SECONDS:
                del front.open[request_id]
        await front.commit(lambda connection: self._drop_results(connection, now), durable=False)

    def _evict_silent(self, models: list[Model], now: float) -> None:
        for model in models:
            if not self.front.is_over(model, now):
                self._is_out.discard(model.model_id)
            elif model.model_id not in self._is_out:
                self._is_out.add(model.model_id)
                self.front.worker.call(lambda name=model.model_id: self.front.executor.host.evict(name))

    def _unload_over(self, models: list[Model]) -> None:
        left = Counter(model.owner for model in models if model.model_id not in self._leaving)
        for model in sorted(models, key=self.front.heard):
            if model.model_id not in self._leaving and self._may_go(model, left[model.owner]):
                left[model.owner] -= 1
                self._leaving.add(model.model_id)
                self.front.worker.unload(model.model_id, unless=lambda name=model.model_id: self._stays(name))

    def _may_go(self, model: Model, num_of_owner: int) -> bool:
        """Whether a model's client is gone for good, or gone while its key has too many."""
        front = self.front
        now = front.books.clock()
        if not front.is_over(model, now):
            return False
        is_finished = front.books.sessions[model.session_id].finished is not None
        is_quiet = now - front.heard(model) > front.limits.silent_seconds
        return (is_finished and is_quiet) or num_of_owner > front.limits.models

    def _stays(self, model_id: str) -> bool:
        """Asked when its turn has come, which may be minutes later: whether its client is back, or others have gone."""
        self._leaving.discard(model_id)
        model, models = self.front.books.models[model_id], list(self.front.books.models.values())
        num_of_owner = sum(other.state == "live" and other.owner == model.owner for other in models)
        if self._may_go(model, num_of_owner):
            self._is_out.discard(model_id)
            return False
        return True

    def _drop_results(self, connection: Connection, now: float) -> None:
        """Replies go; a live model's operations stay as long as a snapshot may need them."""
        table = tables.operations
        old = (table.c.finished < now - self.result_seconds, tables.IS_KEPT)
        connection.execute(delete(table).where(*old, or_(table.c.kind == "asample", IS_OVER)))
        # Of the others the row stays, some hundred bytes: its loss is a point of the model's curve.
        connection.execute(update(table).where(*old).values(reply=None, reply_kind="gone"))
