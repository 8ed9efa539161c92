"""What happens to checkpoints, models and the journal while something else is under way, and when their clients go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from model_foundry.service.books import Books
from model_foundry.service.janitor import Janitor
from model_foundry.service.journal import Journal
from tests.conformance.inside import Client, bodies, served
from tests.conformance.test_service_by_hand import pass_body, step_body

pytestmark = pytest.mark.slow
TinyFolder = Callable[[str], Path]


@asynccontextmanager
async def waiting_for_the_disk(client: Client) -> AsyncIterator[None]:
    """What the journal is given is written, in its order, when the block ends."""
    goes_on = threading.Event()
    client.front.books.journal.run(lambda connection: goes_on.wait(30))
    try:
        yield
        await asyncio.sleep(0.1)
    finally:
        goes_on.set()


@asynccontextmanager
async def overwriting(client: Client, monkeypatch: pytest.MonkeyPatch, seq: int) -> AsyncIterator[Callable[[], None]]:
    """While an overwriting save writes its files. It is listed when the block ends, or what it yields is called."""
    engine, begun, goes_on = client.front.executor.host.engine, threading.Event(), threading.Event()
    real = engine.save_state

    def slow(*arguments: Any) -> None:
        real(*arguments)
        begun.set()
        assert goes_on.wait(30)

    monkeypatch.setattr(engine, "save_state", slow)
    saving = asyncio.create_task(client.save(seq, overwrite=True))
    assert await asyncio.to_thread(begun.wait, 30)
    monkeypatch.setattr(engine, "save_state", real)
    try:
        yield goes_on.set
    finally:
        goes_on.set()
        assert "path" in await saving


async def delete(client: Client) -> None:
    assert (await client.api.delete(client.at)).status_code == 204


async def expire(client: Client) -> None:
    (found,) = client.front.books.checkpoints.values()
    work, apply = client.front.books.change(found, expires=1.0)
    assert await client.front.commit(work, then=apply)
    await Janitor(client.front, result_seconds=600.0).look()


@pytest.mark.parametrize("over", [delete, expire])
def test_a_deletion_leaves_the_files_of_what_was_saved_in_its_place(
    over: Callable[[Client], Awaitable[None]], tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were removed by their name, after a save that overwrites had listed its own under it."""

    async def race() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            await client.new_model()
            await client.save(1)
            async with overwriting(client, monkeypatch, 2):
                await over(client)
                assert await client.listed() == []
            await client.idle()
            assert len(await client.listed()) == 1
            assert (await client.load(3))["type"] == "load_weights"
            await delete(client)
            await client.idle()
            assert not client.front.executor.host.store(client.model, "training").path("x").exists()
            assert not client.front.being_removed

    asyncio.run(race())


def test_a_deletion_that_comes_behind_a_save_is_of_what_it_saw(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the new one out of the journal alone: listed now, and gone after a restart."""

    async def race() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            await client.new_model()
            await client.save(1)
            async with overwriting(client, monkeypatch, 2) as list_it, waiting_for_the_disk(client):
                list_it()
                await asyncio.sleep(0.3)
                deletion = asyncio.create_task(delete(client))
            await deletion
            await client.idle()
            assert len(await client.listed()) == 1
            assert (await client.load(3))["type"] == "load_weights"
            check_journal(client, tmp_path / "state")

    asyncio.run(race())


def check_journal(client: Client, state: Path) -> None:
    """What a restart would list is what is listed."""
    journal = Journal(state)
    assert Books(journal).checkpoints == client.front.books.checkpoints
    journal.close()


CHANGES = {
    "publish": lambda client: client.api.post(f"{client.at}/publish"),
    "unpublish": lambda client: client.api.delete(f"{client.at}/publish"),
    "time to live": lambda client: client.api.put(f"{client.at}/ttl", json={"ttl_seconds": 3600}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_behind_a_deletion_does_not_bring_it_back(
    change: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """It was written again as it had been: listed, without files."""

    async def race() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            await client.new_model()
            await client.save(1)
            async with waiting_for_the_disk(client):
                deletion = asyncio.create_task(delete(client))
                await asyncio.sleep(0.1)
                changing = asyncio.ensure_future(CHANGES[change](client))
            await deletion
            assert (await changing).status_code == 409
            assert (await CHANGES[change](client)).status_code == 404
            assert await client.listed() == []
            check_journal(client, tmp_path / "state")

    asyncio.run(race())


def test_a_change_behind_a_save_leaves_what_the_save_wrote(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old size and time came back with it, and samplers kept the old weights, known by that time."""

    async def race() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            await client.new_model()
            await client.save(1)
            (before,) = await client.listed()
            async with overwriting(client, monkeypatch, 2) as list_it, waiting_for_the_disk(client):
                list_it()
                await asyncio.sleep(0.3)
                changing = asyncio.ensure_future(CHANGES["publish"](client))
            assert (await changing).status_code == 409
            assert (await CHANGES["publish"](client)).status_code == 204
            (after,) = await client.listed()
            assert after["time"] > before["time"]
            assert after["public"]
            check_journal(client, tmp_path / "state")

    asyncio.run(race())


def test_a_number_that_is_being_deleted_is_no_copy_yet(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """The copy's files would be removed with those of the one before."""

    async def race() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            await client.new_model()
            await client.save(1)
            path = f"tinker://{client.model}/weights/x"
            copy = {"source_path": path, "session_id": client.session, "model_seq_id": 7}
            assert (await client.post("copy_weights", copy)).status_code == 200
            busy = threading.Event()
            client.front.worker.call(lambda: assert_(busy.wait(30)))
            at = client.at.replace(client.model, f"{client.session}:train:7")
            assert (await client.api.delete(at)).status_code == 204
            assert (await client.post("copy_weights", copy)).status_code == 409
            busy.set()
            await client.idle()
            assert (await client.post("copy_weights", copy)).status_code == 200
            await client.idle()
            assert client.front.executor.host.store(f"{client.session}:train:7", "training").path("x").is_dir()

    asyncio.run(race())


def assert_(is_so: bool) -> None:
    assert is_so


def test_a_key_has_no_more_models_for_asking_at_once(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """They were counted, journaled and only then there to be counted."""

    async def ask() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state", "max_models_per_key=3") as client:
            await client.new_session()
            answers = await asyncio.gather(*(client.create(number) for number in range(12)))
            assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 9
            (first, *_) = [await client.result(answer) for answer in answers if answer.status_code == 200]
            # What was refused takes no place.
            await client.done("unload_model", {"model_id": first["model_id"]})
            assert sorted([(await client.create(number)).status_code for number in (20, 21)]) == [200, 429]

    asyncio.run(ask())


def test_a_key_has_no_more_operations_waiting_for_asking_at_once(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    async def ask() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state", "max_waiting_per_key=4") as client:
            model = await client.new_model()
            # The first has not come, so these wait.
            answers = await asyncio.gather(*(client.post("optim_step", step_body(model, seq)) for seq in range(2, 14)))
            assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 8
            assert not client.front.coming

    asyncio.run(ask())


def test_what_was_journaled_is_done_though_its_client_has_gone(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """It was in the journal and nowhere else: a repeat was told of it, and waited for it until the next restart."""

    async def go() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state") as client:
            model = await client.new_model()
            async with waiting_for_the_disk(client):
                asking = asyncio.create_task(client.post("forward_backward", pass_body(model, 1)))
                ending = asyncio.create_task(client.post(f"sessions/{client.session}/finish", {}))
                await asyncio.sleep(0.1)
                for task in (asking, ending):
                    task.cancel()
            await asyncio.gather(asking, ending, return_exceptions=True)
            assert "metrics" in await asyncio.wait_for(client.done("forward_backward", pass_body(model, 1)), 20)
            assert client.front.books.sessions[client.session].finished is not None

    asyncio.run(go())


def test_finished_and_silent_sessions_leave_room_for_models(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """A refusal said that finishing them helps, and it did not: after 64 runs of a script its key was of no use."""
    now = 0.0

    async def ask() -> None:
        nonlocal now
        options = ("max_models_per_key=2", "session_timeout_seconds=600")
        async with served(tiny_folder("llama-tied"), tmp_path / "state", *options) as client:
            books, janitor = client.front.books, Janitor(client.front, result_seconds=1e9)
            began = books.clock()
            books.clock = lambda: began + now
            first = await client.new_session()
            for number in range(2):
                await client.result(await client.create(number))
            await client.done("forward_backward", pass_body(f"{first}:train:0", 1))
            assert (await client.create(2)).status_code == 429
            behind_a_gap = await client.post("forward_backward", pass_body(f"{first}:train:0", 7))
            assert (await client.post(f"sessions/{first}/finish", {})).status_code == 204
            await client.new_session()
            second = client.session
            for number in range(2):
                await client.result(await client.create(number))
            assert (await client.create(2)).status_code == 429
            # The key has four, and should have two: those of the session that is over give way.
            await janitor.look()
            await client.idle()
            assert states(books) == {f"{first}:train:0": "unloaded", f"{first}:train:1": "unloaded",
                                     f"{second}:train:0": "live", f"{second}:train:1": "live"}  # fmt: skip
            assert not client.front.executor.host.snapshots(f"{first}:train:0").root.is_dir()
            assert "never came" in (await client.result(behind_a_gap))["error"]
            assert client.front.worker.num_waiting(next(iter(books.models.values())).owner) == 0
            assert bodies(client, f"{first}:train:0") == 0
            # The second was not finished, and is silent: it stays while there is room, and goes on when it is heard of.
            now = 700.0
            await janitor.look()
            await client.idle()
            await client.new_session()
            await client.result(await client.create(0))
            # The key has three now. The worker is busy when that is seen, and the client is back before it gets there.
            is_busy = threading.Event()
            client.front.worker.call(lambda: [is_busy.wait(60)].clear())
            await janitor.look()
            await client.post("session_heartbeat", {"session_id": second})
            is_busy.set()
            await client.idle()
            assert states(books)[f"{second}:train:0"] == "live"
            assert "metrics" in await client.done("forward_backward", pass_body(f"{second}:train:1", 1))
            await janitor.look()
            await client.idle()
            assert states(books)[f"{second}:train:0"] == "live"
            assert "metrics" in await client.done("forward_backward", pass_body(f"{second}:train:1", 2))

    def states(books: Books) -> dict[str, str]:
        return {model.model_id: model.state for model in books.models.values()}

    asyncio.run(ask())


def test_a_finished_session_s_models_go_when_what_was_accepted_is_done(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    async def ask() -> None:
        async with served(tiny_folder("llama-tied"), tmp_path / "state", "session_timeout_seconds=0.01") as client:
            model, janitor = await client.new_model(), Janitor(client.front, result_seconds=1e9)
            busy = threading.Event()
            client.front.worker.call(lambda: assert_(busy.wait(30)))
            asked = await client.post("forward_backward", pass_body(model, 1))
            assert (await client.post(f"sessions/{client.session}/finish", {})).status_code == 204
            await asyncio.sleep(0.1)
            await janitor.look()
            busy.set()
            assert "metrics" in await client.result(asked)
            await client.idle()
            assert client.front.books.models[model].state == "live"
            await asyncio.sleep(0.1)
            await janitor.look()
            await client.idle()
            assert client.front.books.models[model].state == "unloaded"
            assert (await client.done("optim_step", step_body(model, 2)))["category"] == "user"

    asyncio.run(ask())
