"""Samples of several tenants in one batch: the same as alone, and nobody keeps the others out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError
from model_foundry.models.finder import resolve_model
from model_foundry.service.books import Books, Checkpoint, Operation
from model_foundry.service.host import Host
from model_foundry.service.journal import Journal
from model_foundry.service.sampling import Prepared, Texts, sample_alone
from model_foundry.service.sampling_batch import SamplingBatch
from model_foundry.service.scoring import Wanted
from model_foundry.types import LoraConfig, SampledSequence, SamplingParams

TinyFolder = Callable[[str], Path]


@pytest.fixture
def batch(tiny_folder: TinyFolder, tmp_path: Path) -> Iterator[SamplingBatch]:
    journal = Journal(tmp_path)
    source = resolve_model(str(tiny_folder("llama-tied")))
    engine = TorchEngine(device="cpu", dtype="float32", num_threads=1)
    host = Host(Books(journal), engine, source, folder=tmp_path, max_models=2, snapshot_seconds=1.0)
    yield SamplingBatch(host, Texts(source.folder), max_sequences=8, cache_tokens=4096)
    journal.close()


def operation(owner: str, number: int = 0) -> Operation:
    return Operation(f"{owner}:{number}", owner, owner, "asample", "json", b"", seed=0)


def asked(num_samples: int, **settings: Any) -> Prepared:
    params = SamplingParams(**{"max_tokens": 6, "temperature": 1.0, "seed": 3, **settings})
    return Prepared(np.arange(5, 12, dtype=np.int32), params, [], num_samples, Wanted())


def finish(batch: SamplingBatch) -> dict[str, list[SampledSequence]]:
    found = {}
    while batch.is_active:
        for done in batch.step():
            assert done.error is None
            found[done.operation.request_id] = done.sequences
    return found


@pytest.mark.slow
def test_samples_are_those_of_the_engine(batch: SamplingBatch) -> None:
    """Copies of a prompt differ from each other, and are the same as when the engine draws them by itself."""
    want = sample_alone(batch.host.engine, batch.host.base_id, asked(5), batch.texts)
    assert batch.can_batch()
    batch.begin(operation("a"), asked(5), None)
    batch.begin(operation("b"), asked(2, seed=9), None)
    got = finish(batch)
    assert [row.tokens.tolist() for row in got["a:0"]] == [row.tokens.tolist() for row in want]
    assert len({tuple(row.tokens) for row in got["a:0"]}) > 1


@pytest.mark.slow
def test_a_thousand_samples_leave_places_for_others(batch: SamplingBatch) -> None:
    """One operation of a hundred samples must not make another tenant's single one wait for them all."""
    assert batch.can_batch()
    batch.begin(operation("hog"), asked(100), None)
    assert not batch.takes("hog")
    assert batch.takes("guest")
    for _ in range(3):
        assert not list(batch.step())
    batch.begin(operation("guest"), asked(1), None)
    ends: dict[str, int] = {}
    steps = 0
    while batch.is_active:
        steps += 1
        ends.update({done.operation.owner: steps for done in batch.step()})
    assert ends["guest"] <= 8 < ends["hog"]


def saved_adapters(batch: SamplingBatch, number: int) -> list[Checkpoint]:
    host = batch.host
    lora = LoraConfig(r=4, lora_alpha=32.0, target_modules="all-linear")
    model = host.engine.create_model(host.source.folder, lora=lora, seed=0)
    found = []
    for index in range(number):

        def write(folder: Path) -> None:
            host.engine.save_weights(model, folder)

        host.store("s:train:0", "sampler").save(f"c{index}", 0, write, {"model": host.fingerprint})
        found.append(Checkpoint("s:train:0", "sampler", f"c{index}", "me", float(index), 1, {}))
    return found


def test_an_adapter_stays_while_samples_of_it_are_to_come(batch: SamplingBatch) -> None:
    """Another tenant's checkpoints drove it out: its next sample failed, and the whole service ended with it."""
    first, *others = saved_adapters(batch, 4)
    assert batch.can_batch()
    batch.begin(operation("many"), asked(20), first)
    for number, checkpoint in enumerate(others):
        batch.begin(operation("others", number), asked(1, max_tokens=2), checkpoint)
    done = finish(batch)
    assert {name: len(rows) for name, rows in done.items()} == {
        "many:0": 20, "others:0": 1, "others:1": 1, "others:2": 1
    }  # fmt: skip
    running = batch._batch
    assert running is not None
    assert len(running.adapters) == batch.host.max_models, "those that nobody samples from are let go"


def test_what_gets_no_place_is_lost_alone(batch: SamplingBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to whoever came meanwhile, or to nobody: the thread that does everything ended."""
    assert batch.can_batch()
    running = batch._batch
    assert running is not None
    batch.begin(operation("many"), asked(20), None)
    while batch.owners()["many"] == 4:
        assert not list(batch.step())
    real = running.add

    def add(*arguments: Any, **named: Any) -> int:
        if named["copy"] > 0:
            raise EngineError("no place")
        return real(*arguments, **named)

    monkeypatch.setattr(running, "add", add)
    batch.begin(operation("one"), asked(1), None)
    (lost,) = batch.step()
    assert (lost.operation.owner, str(lost.error)) == ("many", "no place")
    assert {name: len(rows) for name, rows in finish(batch).items()} == {"one:0": 1}
    assert not batch.owners()


def test_a_sample_whose_text_cannot_be_read_ends_its_operation_alone(
    batch: SamplingBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch.can_batch()
    stops = dataclasses.replace(asked(3), stops=["x"])
    batch.begin(operation("a"), stops, None)
    batch.begin(operation("b"), asked(2), None)

    def fail(tokens: Any, texts: Any) -> bool:
        raise ValueError("a fault")

    monkeypatch.setattr(batch.texts, "holds", fail)
    lost = [done for _ in range(2) for done in batch.step()]
    assert [(done.operation.owner, str(done.error)) for done in lost] == [("a", "a fault")]
    assert {name: len(rows) for name, rows in finish(batch).items()} == {"b:0": 2}


def test_what_cannot_be_held_is_refused_and_leaves_nothing(batch: SamplingBatch) -> None:
    assert batch.can_batch()
    with pytest.raises(EngineError, match="exceed"):
        batch.begin(operation("a"), asked(3, max_tokens=100_000), None)
    assert not batch.is_active
    assert not batch.owners()


@pytest.mark.slow
def test_a_step_that_fails_ends_its_samples_and_nothing_else(
    batch: SamplingBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory: the ones that came last give way. Anything else: nobody waits for ever."""
    assert batch.can_batch()
    running = batch._batch
    assert running is not None
    for name in ("a", "b"):
        batch.begin(operation(name), asked(2), None)
    real = running.step
    failures: list[Exception] = [MemoryError()]

    def step() -> Any:
        if failures:
            raise failures.pop()
        return real()

    monkeypatch.setattr(running, "step", step)
    (lost,) = batch.step()
    assert lost.operation.owner == "b"
    assert "memory ran out" in str(lost.error)
    assert finish(batch).keys() == {"a:0"}
    batch.begin(operation("c"), asked(2), None)
    failures.append(ValueError("a fault"))
    (lost,) = batch.step()
    assert isinstance(lost.error, ValueError)
    assert not batch.is_active
    assert running.num_running == running.num_waiting == 0
