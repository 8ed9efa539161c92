"""Loads and snapshots: what was loaded outlives its checkpoint, and a load that cannot be kept is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ArchitectureMismatchError, CheckpointError
from model_foundry.models.finder import resolve_model
from model_foundry.service.books import Books, Checkpoint, Model, Session
from model_foundry.service.host import Host
from model_foundry.service.journal import Journal
from model_foundry.types import AdamParams, Datum
from tests.service_rig import files_of

MakeHost = Callable[[float], Host]


@pytest.fixture
def make_host(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[MakeHost]:
    journals: list[Journal] = []

    def make(linked_from_bytes: float) -> Host:
        journals.append(Journal(tmp_path))
        engine = TorchEngine(device="cpu", dtype="float32", num_threads=1)
        source = resolve_model(str(tiny_folder("llama-tied")))
        return Host(
            Books(journals[-1]), engine, source, folder=tmp_path, max_models=3, snapshot_seconds=1.0,
            linked_from_bytes=linked_from_bytes,
        )  # fmt: skip

    yield make
    for journal in journals:
        journal.close()


def put(host: Host, *items: Session | Model | Checkpoint) -> None:
    for item in items:
        work, apply = host.books.put(item)
        host.books.journal.run(work).result()
        apply()


def created(host: Host, model_id: str, *, seed: int, **facts: bool) -> Model:
    every = {"rank": 4, "seed": seed, "train_unembed": True, "train_mlp": True, "train_attn": True, **facts}
    put(host, Session("s", "me", 0.0, {}), model := Model(model_id, "s", "me", 0.0, 0.0, every, done_seq=0))
    host.create(model)
    return model


def trained(host: Host, model_id: str, *, seed: int, **facts: bool) -> Model:
    """A model after a step."""
    model = created(host, model_id, seed=seed, **facts)
    step(host, model, seed=seed)
    host.note(model_id, seq=2, seconds=0.0, body_bytes=0)
    return model


def step(host: Host, model: Model, *, seed: int) -> None:
    engine_id, tokens = host.resident(model).engine_id, np.random.default_rng(seed).integers(3, 200, 9)
    host.engine.forward_backward(engine_id, [Datum.from_row(tokens.astype(np.int32), np.ones(9, np.float32))])
    host.engine.optim_step(engine_id, AdamParams(learning_rate=1e-2))


def saved(host: Host, model: Model) -> Checkpoint:
    engine_id, store = host.resident(model).engine_id, host.store(model.model_id, "training")
    metadata = {"model": host.fingerprint}
    store.save("a", 2, lambda folder: host.engine.save_state(engine_id, folder), metadata)
    put(host, checkpoint := Checkpoint(model.model_id, "training", "a", "me", 0.0, 1, {"lora": model.facts}))
    return checkpoint


def state_of(host: Host, model: Model, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    host.engine.save_state(host.resident(model).engine_id, folder)
    return files_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [True, False], ids=["with-optimizer", "weights-alone"])
@pytest.mark.parametrize("linked_from", [0.0, 1e9], ids=["linked", "copied"])
def test_what_was_loaded_outlives_its_checkpoint(
    linked_from: float, optimizer: bool, make_host: MakeHost, tmp_path: Path
) -> None:
    """A snapshot that shares the checkpoint's files must not follow them when they are replaced and deleted."""
    host = make_host(linked_from)
    first, second = trained(host, "s:train:0", seed=1), trained(host, "s:train:1", seed=2)
    checkpoint = saved(host, first)
    host.load(second, checkpoint, optimizer=optimizer, seq=3)
    put(host, second := Model(second.model_id, "s", "me", 0.0, 0.0, second.facts, done_seq=3))
    want = state_of(host, second, tmp_path / "want")
    assert (want == state_of(host, first, tmp_path / "first")) == optimizer
    names = {path.stat().st_nlink for path in (tmp_path / "snapshots" / "s-train-1").rglob("*.safetensors")}
    assert max(names) == (2 if linked_from == 0 else 1)
    step(host, first, seed=3)
    saved(host, first)
    host.drop(second.model_id)
    assert state_of(host, second, tmp_path / "replaced") == want
    host.store(first.model_id, "training").save("a", 2, lambda folder: None)
    host.drop(second.model_id)
    assert state_of(host, second, tmp_path / "deleted") == want


def test_a_load_that_cannot_be_written_down_is_none(make_host: MakeHost, tmp_path: Path) -> None:
    """Its client is told that it failed; in memory it would go on until the next restart, and be gone after it."""
    host = make_host(0.0)
    first, second = trained(host, "s:train:0", seed=1), trained(host, "s:train:1", seed=2)
    checkpoint = saved(host, first)
    host.snapshot(second.model_id)
    want = state_of(host, second, tmp_path / "want")
    index = host.snapshots(second.model_id).root.parent / "checkpoints.jsonl"
    index.unlink()
    index.mkdir()
    with pytest.raises(CheckpointError, match="could not be saved"):
        host.load(second, checkpoint, optimizer=True, seq=3)
    assert not host.is_resident(second.model_id)
    put(host, second := Model(second.model_id, "s", "me", 0.0, 0.0, second.facts, done_seq=3))
    assert state_of(host, second, tmp_path / "after") == want


@pytest.mark.parametrize("linked_from", [0.0, 1e9], ids=["linked", "copied"])
def test_layers_that_a_checkpoint_leaves_out_begin_afresh_in_a_new_model(
    linked_from: float, make_host: MakeHost, tmp_path: Path
) -> None:
    """Clients up to 0.6 make a model that trains everything, and then load into it whatever there is."""
    host = make_host(linked_from)
    first = trained(host, "s:train:0", seed=1, train_unembed=False, train_mlp=False)
    checkpoint, fresh = saved(host, first), created(host, "s:train:1", seed=2)
    began = host.engine.trained_tensors(host.resident(fresh).engine_id)
    began = {name: tensor.clone() for name, tensor in began.items()}
    with pytest.raises(ArchitectureMismatchError, match=r"tinker://s:train:0/weights/a: .*leaves out"):
        host.load(fresh, checkpoint, optimizer=True, seq=1)
    host.load(fresh, checkpoint, optimizer=False, seq=1)
    theirs = host.engine.trained_tensors(host.resident(first).engine_id)
    for name, tensor in host.engine.trained_tensors(host.resident(fresh).engine_id).items():
        assert torch.equal(tensor, theirs.get(name, began[name])), name
    want = state_of(host, fresh, tmp_path / "want")
    host.drop(fresh.model_id)
    put(host, fresh := Model(fresh.model_id, "s", "me", 0.0, 0.0, fresh.facts, done_seq=1))
    assert state_of(host, fresh, tmp_path / "back") == want
    used = trained(host, "s:train:2", seed=3)
    with pytest.raises(ArchitectureMismatchError, match="leaves out"):
        host.load(used, checkpoint, optimizer=False, seq=3)
    narrow = created(host, "s:train:3", seed=4, train_attn=False)
    with pytest.raises(ArchitectureMismatchError, match="adapts"):
        host.load(narrow, checkpoint, optimizer=False, seq=1)


def test_what_a_kill_left_of_a_model_that_was_unloaded_goes(make_host: MakeHost) -> None:
    """Its state was in the journal already, so nobody ever asked for the rest of its folder again."""
    host = make_host(1e9)
    gone, live = trained(host, "s:train:0", seed=1), trained(host, "s:train:1", seed=2)
    for model in (gone, live):
        host.snapshot(model.model_id)
    put(host, replace(gone, state="unloaded"))
    kept = host.snapshots(gone.model_id).root
    kept.rename(kept.with_name(".tmp-kept-1"))
    host.forget_unloaded()
    assert not kept.parent.exists()
    assert host.snapshots(live.model_id).newest_valid(print) is not None
