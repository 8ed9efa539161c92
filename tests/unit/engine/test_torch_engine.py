"""The engine's verbs: typed errors, state saved and continued bit by bit, loads that change nothing when they fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_foundry.engine.base import Engine
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ArchitectureMismatchError, CheckpointError, EngineError, ModelError
from model_foundry.models.folder import read_config, read_tensors
from model_foundry.types import AdamParams, Datum, LoraConfig, SamplingParams
from tests.tiny_models import VOCAB_SIZE, random_data

TinyFolder = Callable[[str], Path]
LORA = LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.1)
STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def train(own: TorchEngine, model_id: str, *, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        losses.append(own.forward_backward(model_id, random_data((12, 30, 7), seed=step)).loss_sum)
        own.optim_step(model_id, STEP)
    return losses


def everything(own: TorchEngine, model_id: str) -> dict[str, torch.Tensor]:
    tensors = {**own.trained_tensors(model_id), **own.state_tensors(model_id)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_it_is_an_engine() -> None:
    assert isinstance(engine(), Engine)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_saved_state_continues_bit_by_bit(lora: LoraConfig | None, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Moments, step, dropout and the pieces of a batch: whatever is forgotten makes a resumed run another run."""
    own = engine(micro_batch_tokens=40)
    straight = own.create_model(tiny_folder("llama-tied"), lora=lora, seed=5)
    train(own, straight, steps=3)
    own.save_state(straight, tmp_path)
    losses = train(own, straight, steps=3, first=3)
    other = engine(micro_batch_tokens=40)
    resumed = other.create_model(tiny_folder("llama-tied"), lora=lora, seed=99)
    train(other, resumed, steps=1, first=7)
    other.forward_backward(resumed, random_data((5,)))
    assert other.load_state(resumed, tmp_path, optimizer=True) == ()
    assert train(other, resumed, steps=3, first=3) == losses
    assert_equal(everything(other, resumed), everything(own, straight))


def test_pieces_learnt_from_memory_are_part_of_the_state(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own = engine()
    model_id = own.create_model(tiny_folder("llama"), lora=LORA)
    own._get(model_id).passes.max_piece_tokens = 33
    own.save_state(model_id, tmp_path)
    again = own.create_model(tiny_folder("llama"), lora=LORA)
    own.load_state(again, tmp_path, optimizer=True)
    assert own.forward_backward(again, random_data((20, 20, 20))).num_micro_batches == 3


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_weights_loaded_without_the_optimizer_start_afresh(
    lora: LoraConfig | None, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    own = engine()
    first, second = (own.create_model(tiny_folder("llama"), lora=lora) for _ in range(2))
    train(own, first, steps=2)
    own.save_state(first, tmp_path)
    shutil.rmtree(tmp_path / "state")
    for model_id in (first, second):
        own.load_state(model_id, tmp_path, optimizer=False)
        assert not any(tensor.any() for tensor in own.state_tensors(model_id).values())
    assert train(own, first, steps=2) == train(own, second, steps=2)
    assert_equal(everything(own, first), everything(own, second))
    assert own.state_facts(first)["optimizer_step"] == 2
    with pytest.raises(CheckpointError, match="no optimizer state"):
        own.load_state(first, tmp_path, optimizer=True)


def spoil(folder: Path, how: str) -> None:
    """One way in which a checkpoint is not this model's."""
    config = folder / "adapter" / "adapter_config.json"
    facts = folder / "state" / "engine.json"
    if how == "engine":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"engine": "mlx"}))
    elif how == "facts":
        facts.write_text("[]")
    elif how == "step":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"optimizer_step": "two"}))
    elif how == "moments":
        (folder / "state" / "optimizer.safetensors").unlink()
    elif how == "alpha":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 9}))
    elif how == "no adapter":
        shutil.rmtree(folder / "adapter")
    else:
        path = folder / "adapter" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("how", ["engine", "facts", "step", "moments", "alpha", "no adapter", "cut"])
def test_a_state_that_cannot_be_loaded_changes_nothing(how: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own = engine()
    saved, model_id = (own.create_model(tiny_folder("llama"), lora=LORA, seed=s) for s in (1, 2))
    train(own, saved, steps=1)
    own.save_state(saved, tmp_path)
    spoil(tmp_path, how)
    train(own, model_id, steps=1, first=5)
    before, facts = everything(own, model_id), own.state_facts(model_id)
    with pytest.raises((CheckpointError, ModelError)):
        own.load_state(model_id, tmp_path, optimizer=True)
    assert_equal(everything(own, model_id), before)
    assert own.state_facts(model_id) == facts


OTHERS: dict[str, tuple[str, LoraConfig | None]] = {
    "rank": ("llama", LoraConfig(r=8, lora_alpha=16.0)),
    "dora": ("llama", LoraConfig(r=4, lora_alpha=8.0, use_dora=True)),
    "layers": ("llama", LoraConfig(r=4, lora_alpha=8.0, target_modules=("q_proj",))),
    "model": ("llama-one-head", LoraConfig(r=4, lora_alpha=8.0)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_adapter_of_another_model_changes_nothing(other: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own = engine()
    kind, lora = OTHERS[other]
    own.save_state(own.create_model(tiny_folder(kind), lora=lora), tmp_path)
    model_id = own.create_model(tiny_folder("llama"), lora=LORA)
    train(own, model_id, steps=1)
    before = everything(own, model_id)
    for optimizer in (True, False):
        with pytest.raises(ArchitectureMismatchError, match=str(tmp_path)):
            own.load_state(model_id, tmp_path, optimizer=optimizer)
    assert_equal(everything(own, model_id), before)


def test_full_weights_of_another_model_change_nothing(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own = engine()
    own.save_state(own.create_model(tiny_folder("llama-one-head"), lora=None), tmp_path)
    model_id = own.create_model(tiny_folder("llama"), lora=None)
    before = everything(own, model_id)
    with pytest.raises(ArchitectureMismatchError, match="k_proj"):
        own.load_state(model_id, tmp_path, optimizer=False)
    assert_equal(everything(own, model_id), before)


def test_another_machine_is_said(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own = engine()
    model_id = own.create_model(tiny_folder("llama"), lora=LORA)
    own.save_state(model_id, tmp_path)
    facts = tmp_path / "state" / "engine.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"num_threads": 7, "torch": "2.0"}))
    warnings = own.load_state(model_id, tmp_path, optimizer=True)
    assert len(warnings) == 2
    assert "num_threads was 7" in warnings[1]


def datum(tokens: Any = (3, 4), targets: Any = (4, 5), weights: Any = (1.0, 1.0)) -> Datum:
    inputs = {"target_tokens": np.asarray(targets), "weights": np.asarray(weights, dtype=np.float32)}
    return Datum(tokens=np.asarray(tokens), loss_inputs=inputs)


WRONG_ROWS: dict[str, tuple[Datum, str]] = {
    "token": (datum(tokens=(3, VOCAB_SIZE)), f"token {VOCAB_SIZE} in tokens"),
    "negative token": (datum(tokens=(-1, 3)), "token -1 in tokens"),
    "ignored target": (datum(targets=(-100, 3)), "token -100 in target_tokens"),
    "target": (datum(targets=(3, 999)), "token 999 in target_tokens"),
    "length": (datum(weights=(1.0,)), "2 tokens and weights"),
    "no tokens": (datum(tokens=np.zeros(0, dtype=np.int32), targets=(), weights=()), "shape"),
    "two axes": (datum(tokens=[[3, 4]], targets=[[3, 4]], weights=[[1.0, 1.0]]), "shape"),
    "fractions": (datum(tokens=(3.5, 4.0)), "float64"),
    "too long": (datum(*(np.full(2049, 3) for _ in range(3))), "context of 2048"),
    "lacking": (Datum(np.array([3]), {"target_tokens": np.array([3])}), "lacks weights"),
}


@pytest.fixture(scope="module")
def trainable(tiny_folder: TinyFolder) -> tuple[TorchEngine, str]:
    own = engine()
    return own, own.create_model(tiny_folder("llama"), lora=LORA)


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_row_that_cannot_be_computed_is_refused_by_number(wrong: str, trainable: tuple[TorchEngine, str]) -> None:
    """An index beyond a table fails deep inside, or on an accelerator kills the process."""
    own, model_id = trainable
    row, words = WRONG_ROWS[wrong]
    for verb in (own.forward, own.forward_backward):
        with pytest.raises(EngineError, match=words) as error:
            verb(model_id, [datum(), row])
        assert error.value.where == "row 1"


def test_calls_that_mean_nothing_are_typed_errors(
    trainable: tuple[TorchEngine, str], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    own, model_id = trainable
    reader = own.create_model(tiny_folder("llama"), lora=None, trainable=False)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("no model 'model-99'", lambda: own.forward("model-99", [datum()])),
        ("without rows", lambda: own.forward_backward(model_id, [])),
        ("no loss 'hinge'", lambda: own.forward(model_id, [datum()], loss_fn="hinge")),
        ("takes no settings", lambda: own.forward_backward(model_id, [datum()], loss_config={"beta": 1.0})),
        ("to be read, not trained", lambda: own.forward_backward(reader, [datum()])),
        ("to be read, not trained", lambda: own.optim_step(reader, STEP)),
        ("to be read, not trained", lambda: own.load_state(reader, tmp_path, optimizer=False)),
        ("no model 'x'", lambda: own.delete_model("x")),
    ]
    for words, call in calls:
        with pytest.raises(EngineError, match=words):
            call()
    own.delete_model(reader)
    with pytest.raises(EngineError, match="no model"):
        own.sample(reader, [], SamplingParams())


def test_rows_of_a_loss_of_nothing_give_no_gradient_and_no_error(trainable: tuple[TorchEngine, str]) -> None:
    own, model_id = trainable
    own.discard_gradients(model_id)
    output = own.forward_backward(model_id, [datum(weights=(0.0, 0.0))])
    assert output.loss_sum == 0
    assert np.isnan(output.logprobs[0]).all()
    before = everything(own, model_id)
    assert own.optim_step(model_id, AdamParams(learning_rate=1e-2)).grad_norm == 0
    assert set(own.trained_tensors(model_id)) <= set(before)


def test_logprobs_come_where_the_loss_is_due_or_everywhere(trainable: tuple[TorchEngine, str]) -> None:
    own, model_id = trainable
    row = datum((3, 4, 5), (4, 5, 6), (0.0, 2.0, 0.0))
    due, whole = (own.forward(model_id, [row], logprobs=scope).logprobs[0] for scope in ("due", "all"))
    assert np.isnan(due).tolist() == [True, False, True]
    assert due[1] == pytest.approx(whole[1], abs=1e-6)
    assert due.dtype == whole.dtype == np.float32
    assert own.forward(model_id, [row]).loss_sum == pytest.approx(-2 * whole[1], rel=1e-5)


def test_gradients_that_are_not_numbers_are_reported_and_skipped(tiny_folder: TinyFolder) -> None:
    own = engine()
    model_id = own.create_model(tiny_folder("llama"), lora=LORA)
    train(own, model_id, steps=1)
    before = everything(own, model_id)
    output = own.forward_backward(model_id, [datum(weights=(float("inf"), 1.0))])
    assert not np.isfinite(output.loss_sum)
    result = own.optim_step(model_id, STEP)
    assert (result.skipped, result.step) == (True, 1)
    assert not np.isfinite(result.grad_norm)
    assert_equal(everything(own, model_id), before)
    train(own, model_id, steps=1)
    assert all(torch.isfinite(tensor).all() for tensor in everything(own, model_id).values())


def test_generation_between_two_passes_leaves_training_as_it_was(tiny_folder: TinyFolder) -> None:
    """An evaluation in the middle that leaves dropout off, or moves a random state, changes the run."""
    results = []
    for asks in (False, True):
        own = engine()
        model_id = own.create_model(tiny_folder("llama"), lora=LORA)
        own.forward_backward(model_id, random_data((12, 30)))
        if asks:
            own.sample(model_id, [np.array([3, 4], dtype=np.int32)], SamplingParams(max_tokens=5, temperature=1.0))
            own.forward(model_id, random_data((9,)))
            next(iter(own.stream(model_id, [np.array([3], dtype=np.int32)], SamplingParams(max_tokens=5))))
        own.optim_step(model_id, STEP)
        train(own, model_id, steps=2, first=3)
        results.append(everything(own, model_id))
    assert_equal(results[1], results[0])


def test_a_seed_decides_the_start_and_the_same_one_repeats_it(tiny_folder: TinyFolder) -> None:
    own = engine()
    ids = [own.create_model(tiny_folder("llama"), lora=LORA, seed=seed) for seed in (1, 1, 2)]
    tensors = [own.trained_tensors(model_id) for model_id in ids]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert_equal(dict(tensors[0]), dict(tensors[1]))
    assert not torch.equal(tensors[0][name], tensors[2][name])
    assert float(tensors[0][name].abs().max()) <= 1 / np.sqrt(32)
    assert not any(t.any() for n, t in tensors[0].items() if "lora_B" in n)


def test_fully_trained_weights_are_written_as_a_model_folder(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """config.json of a bfloat16 base over float32 weights makes transformers round them on loading."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("llama-tied"), base)
    config = read_config(base) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    own = engine()
    model_id = own.create_model(base, lora=None)
    train(own, model_id, steps=1)
    (tmp_path / "out").mkdir()
    own.save_weights(model_id, tmp_path / "out")
    written = read_config(tmp_path / "out" / "model")
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    stored = dict(read_tensors(tmp_path / "out" / "model"))
    assert_equal(stored, dict(own.trained_tensors(model_id)))
    assert "lm_head.weight" not in stored
    assert (tmp_path / "out" / "model" / "tokenizer.json").exists()
    again = own.create_model(tmp_path / "out" / "model", lora=None, trainable=False)
    data = random_data((20,))
    assert own.forward(again, data).loss_sum == own.forward(model_id, data).loss_sum


def test_facts_of_a_model(tiny_folder: TinyFolder) -> None:
    own = engine()
    adapted, full = (own.create_model(tiny_folder("llama"), lora=lora) for lora in (LORA, None))
    base = sum(tensor.numel() for _, tensor in read_tensors(tiny_folder("llama")))
    one, other = own.describe(adapted), own.describe(full)
    assert (one["base_parameters"], other["base_parameters"], other["trained_parameters"]) == (base, base, base)
    assert one["trained_parameters"] == sum(t.numel() for t in own.trained_tensors(adapted).values())
    assert (one["implementation"], one["context"], one["dtype"]) == ("native", 2048, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe", "gpt2"])
def test_adapters_over_a_base_that_is_held_share_its_weights(kind: str, tiny_folder: TinyFolder) -> None:
    """One copy of the base however many models; and what a model on shared weights does, it does alone."""
    own, alone = engine(), engine()
    base = own.create_model(tiny_folder(kind), lora=None, trainable=False)
    prompt = np.arange(4, 9, dtype=np.int32)
    before = own.sample(base, [prompt], SamplingParams(max_tokens=4))[0].logprobs
    wide = LoraConfig(r=7, lora_alpha=32.0)
    small = LoraConfig(r=3, lora_alpha=8.0)
    models = [own.create_model(tiny_folder(kind), lora=lora, seed=3) for lora in (small, wide)]
    frozen = {p.data_ptr() for p in own._get(base).language_model.parameters()}
    for model_id in models:
        mine = own._get(model_id).language_model.base_parameters().values()
        assert {p.data_ptr() for p in mine} == frozen
    single = alone.create_model(tiny_folder(kind), lora=wide, seed=3)
    losses = []
    for step in range(2):
        train(own, models[0], steps=1, first=step)
        losses += train(own, models[1], steps=1, first=step)
    assert losses == train(alone, single, steps=2)
    assert_equal(everything(own, models[1]), everything(alone, single))
    assert np.array_equal(own.sample(base, [prompt], SamplingParams(max_tokens=4))[0].logprobs, before)


def test_a_base_that_is_trained_whole_is_not_shared(tiny_folder: TinyFolder) -> None:
    own = engine()
    whole = own.create_model(tiny_folder("llama"), lora=None)
    other = own.create_model(tiny_folder("llama"), lora=LORA)
    taken = {p.data_ptr() for p in own._get(whole).language_model.parameters()}
    assert not taken & {p.data_ptr() for p in own._get(other).language_model.parameters()}
