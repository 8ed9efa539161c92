"""What the journal lets go: bodies that are not done again, old results, operations of models that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from model_foundry.service.books import Operation
from model_foundry.service.janitor import Janitor
from tests.conformance.inside import Client, bodies, served
from tests.conformance.test_service_by_hand import pass_body, step_body

pytestmark = pytest.mark.slow
TinyFolder = Callable[[str], Path]


def test_the_journal_keeps_no_bodies_that_are_not_done_again(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Rows that were scored and never trained on were kept for ever, after the model was unloaded too."""

    async def ask() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            model = await client.new_model()
            for seq in range(1, 5):
                await client.done("forward_backward", pass_body(model, seq, forward_only=True))
            assert bodies(client, model) == 0
            await client.done("forward_backward", pass_body(model, 5))
            await client.done("optim_step", step_body(model, 6))
            kept = bodies(client, model)
            assert kept > 0
            await client.done("forward_backward", pass_body(model, 7, forward_only=True))
            want = await client.done("forward_backward", pass_body(model, 8, forward_only=True))
            assert bodies(client, model) == kept
            # Brought back from the journal, for there is no snapshot.
            client.front.worker.call(lambda: client.front.executor.host.drop(model))
            await client.idle()
            assert await client.done("forward_backward", pass_body(model, 9, forward_only=True)) == want
            await client.done("unload_model", {"model_id": model})
            assert bodies(client, model) == 0

    asyncio.run(ask())


def test_the_journal_forgets_what_was_done_on_models_that_are_unloaded(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Half a kilobyte an operation stayed for ever. A repeat is still told from something new, after a restart too."""

    async def ask() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            live = await client.new_model()
            await client.done("forward_backward", pass_body(live, 1))
            client.model = (await client.result(await client.create(1)))["model_id"]
            await client.done("forward_backward", pass_body(client.model, 1))
            await older_by(client, 100.0)
            await client.done("optim_step", step_body(client.model, 2))
            await client.done("unload_model", {"model_id": client.model, "seq_id": 3})
            assert rows_of(client, client.model) == 2, "their results can still be asked for"
            await older_by(client, 200.0)
            assert rows_of(client, client.model) == 0
            assert rows_of(client, live) == 2
            assert client.front.executor.curves.of(live).points == []
            await check_repeats(client)
            session, model = client.session, client.model
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            client.session, client.model = session, model
            await check_repeats(client)
            assert (await client.done("optim_step", step_body(live, 2)))["metrics"] is not None

    async def check_repeats(client: Client) -> None:
        for repeat in (
            await client.create(1),
            await client.post("forward_backward", pass_body(client.model, 1)),
            await client.post("optim_step", step_body(client.model, 2)),
            await client.post("retrieve_future", {"request_id": f"{client.model}:2"}),
        ):
            assert repeat.status_code == 410, repeat.text
        for unknown in (f"{client.model}:9", f"{client.model}:{'9' * 5000}", f"{client.model}:two", "nothing:0"):
            assert (await client.post("retrieve_future", {"request_id": unknown})).status_code == 404
        headers = {"x-api-key": "tml-somebody-else"}
        asked = {"request_id": f"{client.model}:2"}
        assert (await client.api.post("retrieve_future", json=asked, headers=headers)).status_code == 404
        assert (await client.done("optim_step", step_body(client.model, 4)))["category"] == "user"
        # Nothing waits for what is before it: nobody would do that either.
        assert "no such model" in (await client.done("optim_step", step_body(client.model, 8)))["error"]

    asyncio.run(ask())


async def older_by(client: Client, seconds: float) -> None:
    """Results are a second old at most, as the janitor is told, and are looked at so much later."""
    books, clock = client.front.books, client.front.books.clock
    books.clock = lambda: clock() + seconds
    await Janitor(client.front, result_seconds=1.0).look()
    books.clock = clock


def rows_of(client: Client, model: str) -> int:
    wanted = text("select count(*) from operations where lane = :lane")
    return client.front.books.journal.read(lambda connection: connection.execute(wanted, {"lane": model}).scalar_one())


def test_results_that_are_gone_are_not_looked_through_again(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Every three seconds all that had ever been done was gone through, in the thread that answers wait for."""

    async def ask() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            model = await client.new_model()
            books, janitor = client.front.books, Janitor(client.front, result_seconds=1.0)
            found = []
            for number in (20, 2000):
                for seq in range(number):
                    done = Operation(f"{number}:{seq}", model, "me", "optim_step", "json", b"", 1, seq=10**6 + seq)
                    done.reply_kind, done.reply = "json", b"{}"
                    for work in (books.accept(done, None), books.answer(done)):
                        last = books.journal.run(work, durable=False)
                await asyncio.wrap_future(last)
                began = books.clock()
                books.clock = lambda began=began: began + 100.0
                await janitor.look()
                assert gone(client) >= number
                found.append(await asyncio.to_thread(steps_of, client, janitor))
            assert found[1] <= found[0] + 5

    asyncio.run(ask())


def gone(client: Client) -> int:
    wanted = text("select count(*) from operations where reply_kind = 'gone' and reply is null")
    return client.front.books.journal.read(lambda connection: connection.execute(wanted).scalar_one())


def steps_of(client: Client, janitor: Janitor) -> int:
    """Tens of instructions that SQLite needs for another look."""
    count = [0]

    def note() -> None:
        count[0] += 1

    def look(connection: Connection) -> None:
        raw: Any = connection.connection.driver_connection
        raw.set_progress_handler(note, 10)
        janitor._drop_results(connection, client.front.books.clock())
        raw.set_progress_handler(None, 0)

    client.front.books.journal.run(look).result()
    return count[0]
