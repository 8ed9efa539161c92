"""Samples of several tenants in one batch: the same as alone, and nobody keeps the others out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError
from model_foundry.models.finder import resolve_model
from model_foundry.service.books import Books, Operation
from model_foundry.service.host import Host
from model_foundry.service.journal import Journal
from model_foundry.service.sampling import Prepared, Texts, sample_alone
from model_foundry.service.sampling_batch import SamplingBatch
from model_foundry.service.scoring import Wanted
from model_foundry.types import SampledSequence, SamplingParams

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


def test_samples_are_those_of_the_engine(batch: SamplingBatch) -> None:
    """Copies of a prompt differ from each other, and are the same as when the engine draws them by itself."""
    want = sample_alone(batch.host.engine, batch.host.base_id, asked(5), batch.texts)
    assert batch.can_batch()
    batch.begin(operation("a"), asked(5), None)
    batch.begin(operation("b"), asked(2, seed=9), None)
    got = finish(batch)
    assert [row.tokens.tolist() for row in got["a:0"]] == [row.tokens.tolist() for row in want]
    assert len({tuple(row.tokens) for row in got["a:0"]}) > 1


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


def test_what_cannot_be_held_is_refused_and_leaves_nothing(batch: SamplingBatch) -> None:
    assert batch.can_batch()
    with pytest.raises(EngineError, match="exceed"):
        batch.begin(operation("a"), asked(3, max_tokens=100_000), None)
    assert not batch.is_active
    assert not batch.owners()


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
