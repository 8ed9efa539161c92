"""What is done now and then: expired checkpoints go, old results go, silent sessions give up their memory."""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy import Connection, delete

from model_foundry.errors import FoundryError
from model_foundry.service import journal as tables
from model_foundry.service.bodies import Refusal
from model_foundry.service.front import Front
from model_foundry.service.listing import remove_checkpoint

PERIOD_SECONDS = 3.0
_KEPT_OPEN_SECONDS = 600.0
logger = logging.getLogger(__name__)


class Janitor:
    """Looks every few seconds.

    Args:
        session_timeout: seconds of silence after which a session's models leave the memory.
        result_seconds: how long a result can be asked for again.
    """

    def __init__(self, front: Front, *, session_timeout: float, result_seconds: float) -> None:
        self.front = front
        self.session_timeout, self.result_seconds = session_timeout, result_seconds
        self._began = front.books.clock()
        self._is_out: set[str] = set()

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
        for item in list(front.books.checkpoints.values()):
            session = front.books.sessions.get(front.books.models[item.run_id].session_id)
            is_over = item.facts["is_ephemeral"] and session is not None and session.finished is not None
            if is_over or (item.expires is not None and item.expires <= now):
                await remove_checkpoint(front, item)
        self._evict_silent(now)
        for request_id, operation in list(front.open.items()):
            # Nobody has asked for it; it is in the journal.
            if operation.done.is_set() and now - operation.created > _KEPT_OPEN_SECONDS:
                del front.open[request_id]
        await front.commit(lambda connection: self._drop_results(connection, now), durable=False)

    def _evict_silent(self, now: float) -> None:
        for model in list(self.front.books.models.values()):
            session = self.front.books.sessions[model.session_id]
            heard = max(self.front.seen.get(model.session_id, self._began), model.last_request)
            if session.finished is None and now - heard <= self.session_timeout:
                self._is_out.discard(model.model_id)
            elif model.model_id not in self._is_out:
                self._is_out.add(model.model_id)
                self.front.worker.call(lambda name=model.model_id: self.front.executor.host.evict(name))

    def _drop_results(self, connection: Connection, now: float) -> None:
        """Replies go; a model's operations stay as long as a snapshot may need them."""
        table = tables.operations
        old = table.c.finished < now - self.result_seconds
        connection.execute(
            table.update().where(old, table.c.reply_kind != "gone").values(reply=None, reply_kind="gone")
        )
        connection.execute(delete(table).where(old, table.c.kind == "asample"))
        # Of the others the row stays, a few bytes: it is what a repeat is told from something new by.
