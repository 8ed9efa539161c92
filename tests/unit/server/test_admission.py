"""Places in the batch: bounded, given back, and dealt fairly between clients."""

from __future__ import annotations

import asyncio

import pytest

from model_foundry.server.admission import Admission, OverloadedError, Ticket


def admission(places: int = 2, waiting: int = 10, per_client: int = 8) -> Admission:
    return Admission(places=places, waiting=waiting, waiting_per_client=per_client)


async def queue_up(gate: Admission, names: str, units: int = 1) -> list[asyncio.Task[Ticket]]:
    tasks = [asyncio.create_task(gate.enter(name, units)) for name in names]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def served_order(gate: Admission, held: list[Ticket], tasks: list[asyncio.Task[Ticket]]) -> str:
    order = ""
    waiting = list(tasks)
    while waiting:
        gate.leave(held.pop(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in [task for task in waiting if task.done()]:
            waiting.remove(task)
            held.append(task.result())
            order += task.result().client
    return order


def test_a_client_with_many_requests_delays_nobody_by_more_than_its_places() -> None:
    async def run() -> str:
        gate = admission(places=2, waiting=50, per_client=40)
        held = [await gate.enter("a"), await gate.enter("a")]
        tasks = await queue_up(gate, "aaaaaaaabbc")
        return await served_order(gate, held, tasks)

    order = asyncio.run(run())
    assert order[0] == "b", "whoever holds nothing is next"
    assert order.index("c") < 4, order
    assert len(order) == 11


def test_equals_are_served_in_their_order() -> None:
    async def run() -> str:
        gate = admission(places=1)
        held = [await gate.enter("x")]
        return await served_order(gate, held, await queue_up(gate, "abcde"))

    assert asyncio.run(run()) == "abcde"


def test_a_full_queue_is_told_to_the_client_or_to_all() -> None:
    async def run() -> None:
        gate = admission(places=1, waiting=3, per_client=2)
        await gate.enter("a")
        tasks = await queue_up(gate, "aab")
        with pytest.raises(OverloadedError) as mine:
            await gate.enter("a")
        assert mine.value.scope == "client"
        with pytest.raises(OverloadedError) as everybody:
            await gate.enter("c")
        assert everybody.value.scope == "server"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate.num_waiting == 0, "whoever stops waiting gives the room back"

    asyncio.run(run())


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    async def run() -> None:
        gate = admission(places=4, waiting=50, per_client=50)
        held = [await gate.enter(name) for name in "abcd"]
        large = await queue_up(gate, "x", units=4)
        small = await queue_up(gate, "efgh")
        for ticket in held:
            gate.leave(ticket)
        await asyncio.sleep(0.01)
        assert large[0].done()
        assert not any(task.done() for task in small)
        gate.leave(large[0].result())
        gate.leave(large[0].result())
        await asyncio.sleep(0.01)
        assert all(task.done() for task in small)
        assert gate.num_running == 4, "a place given back twice counts once"

    asyncio.run(run())
