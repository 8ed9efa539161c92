"""What is over is let go: a model that was replaced, an adapter whose reader stands still, a load that nobody needs;
and a checkpoint that cannot be had now is tried again."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_foundry.checkpoint.store import CheckpointStore
from model_foundry.config.schema import ModelSection
from model_foundry.config.serve import LimitsSection, ServeConfig
from model_foundry.server import opening
from model_foundry.server.adapters import TRIES, Follower
from model_foundry.server.admission import Admission
from model_foundry.server.answering import Answering, Sampling
from model_foundry.server.backends.base import TokenRequest
from model_foundry.server.backends.torch_batch import TorchBackend
from model_foundry.server.opening import open_model
from model_foundry.server.stats import Stats
from model_foundry.tokenizer import Tokenizer


def config_for(model: Path, **fields: Any) -> ServeConfig:
    batch = {"max_sequences": 2, "max_cache_tokens": 2048}
    return ServeConfig.model_validate({"model": {"name": str(model), "dtype": "float32"}, "batch": batch} | fields)


def load(base: Path) -> Any:
    section = ModelSection(name=str(base), dtype="float32")
    return opening._load_batch(config_for(base), opening._engine(section), base)[0]


def request(max_tokens: int) -> TokenRequest:
    prompt = np.arange(5, 12, dtype=np.int32)
    return TokenRequest(prompt, max_tokens=max_tokens, temperature=0.0, top_p=1.0, top_k=0, seed=0, stop_token_ids=())


def wait_for(condition: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("is_left_early", [False, True])
def test_a_model_that_was_replaced_is_freed_while_nobody_asks(endless: Path, is_left_early: bool) -> None:
    """The batch's thread kept it in a name while it waited: after two checkpoints there were three models in memory."""
    first = load(endless)
    gone = weakref.ref(first)
    backend = TorchBackend(first, Tokenizer.load(endless), context=512, num_slots=2, facts={})
    del first

    async def replace_under_way() -> None:
        pieces = backend.stream(request(60))
        await anext(pieces)
        await backend.go_over(load(endless))
        assert gone() is not None, "its answer ends there"
        if is_left_early:
            await pieces.aclose()
        else:
            assert [piece.finish async for piece in pieces][-1] == "length"

    try:
        asyncio.run(replace_under_way())
        wait_for(lambda: backend.gauges()["batch_running"] == 0)
        gc.collect()
        wait_for(lambda: gone() is None, seconds=2)
        assert backend.alive()
    finally:
        backend.close()


def test_an_answer_that_nobody_reads_holds_no_adapter(tiny: Path) -> None:
    """A client that stopped reading kept a removed adapter in memory for as long as its connection stood."""
    opened = open_model(config_for(tiny / "final" / "adapter"))
    admission = Admission(places=2, waiting=4, waiting_per_client=4)

    async def read_one_piece() -> None:
        answering = Answering(opened.backend, opened.catalog, admission, LimitsSection(), Stats())
        model = opened.catalog.default
        assert model.adapter is not None
        sampling = Sampling(max_tokens=6, temperature=1.0, n=2, seed=3)
        answers = await answering.open(model, [model.plain_prompt("Go on")], sampling, client="one")
        deltas = answers.deltas()
        await anext(deltas)
        async with asyncio.timeout(20):
            await opened.catalog.unused(model.adapter)
        assert admission.num_running == 0
        opened.catalog.hold(model)
        rest = [delta async for delta in deltas]
        assert {delta.index for delta in rest if delta.piece.finish} == {0, 1}
        await answers.close()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await opened.catalog.unused(model.adapter)  # another request's hold is not taken from it

    try:
        asyncio.run(read_one_piece())
    finally:
        opened.backend.close()


def test_going_away_does_not_wait_for_a_load(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the pool waited in the event loop: a server that was told to stop stood still until one was loaded."""
    opened = open_model(config_for(endless))
    assert isinstance(opened.backend, TorchBackend)
    backend, really, begun, may_load = opened.backend, opening._load_batch, threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> Any:
        begun.set()
        assert may_load.wait(20)
        return really(*arguments)

    monkeypatch.setattr(opening, "_load_batch", slowly)

    async def stop_while_loading() -> float:
        section = ModelSection(name=str(endless), dtype="float32")
        task = asyncio.create_task(opening._go_over(config_for(endless), section, backend, endless))
        await asyncio.to_thread(begun.wait, 20)
        threading.Timer(3, may_load.set).start()
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    try:
        assert asyncio.run(stop_while_loading()) < 2
    finally:
        may_load.set()
        backend.close()


def test_a_checkpoint_that_memory_was_short_for_is_tried_again(
    endless: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first error that was not ours (CUDA out of memory) ended the following, and nothing said so."""
    opened = open_model(config_for(endless, served_name="run"))
    store, tries, failing = CheckpointStore(tmp_path / "checkpoints"), [], 2

    async def go_over(folder: Path) -> None:
        tries.append(folder.parent.name)
        if len(tries) <= failing:
            raise MemoryError("short")

    def save(name: str, step: int) -> None:
        store.save(name, step, lambda folder: (folder / "model").mkdir() or (folder / "model" / "x").touch())

    async def follow() -> list[str]:
        nonlocal failing
        follower = Follower(tmp_path, "run", opened.backend, opened.catalog, every_seconds=0.01, go_over=go_over)
        save("step-1", 1)
        following = asyncio.create_task(follower.run(lambda: False))
        while opened.catalog.find("run").checkpoint != "step-1":
            await asyncio.sleep(0.01)
            assert not following.done()
        failing = 3 + TRIES
        save("step-2", 2)
        while len(tries) < 3 + TRIES:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert opened.catalog.find("run").checkpoint == "step-1", "the one before stays"
        save("step-3", 3)
        while opened.catalog.find("run").checkpoint != "step-3":
            await asyncio.sleep(0.01)
        following.cancel()
        return tries

    try:
        with caplog.at_level(logging.ERROR):
            tried = asyncio.run(asyncio.wait_for(follow(), 30))
    finally:
        opened.backend.close()
    assert tried == ["step-1"] * 3 + ["step-2"] * TRIES + ["step-3"]
    said = [record for record in caplog.records if "is not served" in record.getMessage()]
    assert [record.exc_info is not None for record in said] == [True] * (2 + TRIES)
