"""The recipe of preferences: what it learns, what it is measured by, what its reference is, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from model_foundry.config.preference import DpoConfig
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import CheckFailedError, DataError
from model_foundry.recipes.preference import prepare_pairs, sums_of_answers
from model_foundry.recipes.training_run import plan_run, run_training
from model_foundry.run.directory import utc_now
from model_foundry.run.metrics import comparable_lines
from tests.tiny_runs import losses, records, tiny_config, tiny_pairs_config, write_jsonl, write_pairs

FAST = {"training__max_steps": 30, "training__learning_rate": 0.01, "training__save_steps": 0}
REWARDS = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"
}  # fmt: skip


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("enabled", [True, False], ids=["lora", "full"])
def test_the_better_answers_become_likelier(loss: str, enabled: bool, model: Path, tmp_path: Path) -> None:
    """Prevents branches that change places, and a reference that moves with the model."""
    config = tiny_pairs_config(
        tmp_path, model=model, dpo={"loss": loss, "beta": 0.5}, lora__enabled=enabled, criteria__pairs_preferred=0.9,
        criteria__loss_fall=0.2, data__validation_file=str(write_pairs(tmp_path / "held.jsonl")), **FAST,
    )  # fmt: skip
    report = run_training(config)
    assert report.verdict == "passed", report.checks
    steps, held_out = records(config.run_dir), records(config.run_dir, "validation")
    assert all(steps[0].keys() >= REWARDS and record.keys() >= REWARDS for record in held_out)
    # Nothing has moved at the first step: no reward, and the loss of a coin's throw.
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    start = {"sigmoid": math.log(2), "ipo": 1.0, "hinge": 1.0}[loss]
    assert steps[0]["loss"] == pytest.approx(start, abs=1e-4)
    assert held_out[-1]["rewards/accuracies"] == 1.0
    assert held_out[-1]["rewards/margins"] > 0.3
    assert held_out[-1]["logps/chosen"] - held_out[-1]["logps/rejected"] > 0.3


@pytest.mark.parametrize("enabled", [True, False], ids=["lora", "full"])
def test_orpo_learns_without_a_reference(enabled: bool, model: Path, tmp_path: Path) -> None:
    """Prevents a pass over all pairs that nobody reads, and rewards beside a reference that there is none of."""
    config = tiny_pairs_config(
        tmp_path, model=model, dpo={"loss": "orpo", "beta": 0.5}, lora__enabled=enabled, criteria__pairs_preferred=0.9,
        criteria__loss_fall=0.2, data__validation_file=str(write_pairs(tmp_path / "held.jsonl")), **FAST,
    )  # fmt: skip
    report = run_training(config)
    assert report.verdict == "passed", report.checks
    assert not (tmp_path / "work").exists()
    first, last = records(config.run_dir, "validation")[0], records(config.run_dir, "validation")[-1]
    assert last["rewards/accuracies"] == 1.0
    assert last["logps/chosen"] > first["logps/chosen"] + 5, "it imitates the better answers"
    prepared = prepare_pairs(config, now=utc_now())
    assert not prepared.batches_read_before


def test_records_are_what_a_model_says_of_the_answers(model: Path, tmp_path: Path) -> None:
    """Prevents rewards of another reference, of tokens of the prompt, or of a mean instead of a sum."""
    config = tiny_pairs_config(tmp_path, model=model, dpo={"beta": 0.3}, training__max_steps=4, training__batch_size=8)
    run_training(config)
    first, last = records(config.run_dir)[0], records(config.run_dir)[-1]
    prepared = prepare_pairs(config, now=utc_now())
    own = TorchEngine(device="cpu", dtype="float32", num_threads=1)
    base = own.create_model(prepared.source.folder, lora=None, trainable=False)
    said = own.forward(base, list(prepared.train.datums)).logprobs
    sums = np.array([sums_of_answers(*each) for each in zip(prepared.train.datums, said, strict=True)])
    assert first["logps/chosen"] == pytest.approx(sums[:, 0].mean(), rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(sums[:, 1].mean(), rel=1e-5)
    assert last["rewards/chosen"] == pytest.approx(0.3 * (last["logps/chosen"] - sums[:, 0].mean()), abs=1e-4)
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-9)


def test_one_by_eight_equals_eight_by_one(model: Path, tmp_path: Path) -> None:
    """Prevents a mean of means over pairs."""
    common = {"training__max_steps": 5, "training__learning_rate": 1e-3}
    ways = {
        "whole": {"training__batch_size": 8},
        "parts": {"training__batch_size": 1, "training__gradient_accumulation_steps": 8},
        "pieces": {"training__batch_size": 8, "training__micro_batch_tokens": 60},
    }
    curves = []
    for name, way in ways.items():
        config = tiny_pairs_config(tmp_path / name, model=model, **common, **way)
        run_training(config)
        curves.append(losses(config.run_dir))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)


def test_the_reference_is_kept_and_verified(model: Path, tmp_path: Path) -> None:
    """Prevents a pass over all pairs for every beta, and a reference of other pairs or with flipped bits."""
    common: dict[str, Any] = {"training__max_steps": 2}
    first = tiny_pairs_config(tmp_path, model=model, run_dir=str(tmp_path / "a"), **common)
    run_training(first)
    (kept,) = (tmp_path / "work").iterdir()
    again = tiny_pairs_config(tmp_path, model=model, run_dir=str(tmp_path / "b"), dpo={"beta": 0.9}, **common)
    run_training(again)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [kept.name]
    assert "are read from" in (tmp_path / "b" / "run.log").read_text()
    values = load_file(kept / "logprobs.safetensors")["logprobs"]
    assert values.dtype == np.float32
    assert (values < 0).all()

    file = kept / "logprobs.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    third = tiny_pairs_config(tmp_path, model=model, run_dir=str(tmp_path / "c"), **common)
    run_training(third)
    assert "computed again" in (tmp_path / "c" / "run.log").read_text()
    assert file.read_bytes() == whole
    assert comparable_lines(tmp_path / "a" / "metrics.jsonl") == comparable_lines(tmp_path / "c" / "metrics.jsonl")

    write_pairs(tmp_path / "pairs.jsonl", chosen="scarlet")
    run_training(tiny_pairs_config(tmp_path, model=model, run_dir=str(tmp_path / "d"), **common))
    assert len(list((tmp_path / "work").iterdir())) == 2

    # Other pieces are other sums: a run that is split must not read what whole batches gave.
    run_training(tiny_pairs_config(tmp_path, model=model, run_dir=str(tmp_path / "e"), **common), piece_tokens=60)
    assert len(list((tmp_path / "work").iterdir())) == 3


@pytest.mark.parametrize("enabled", [True, False], ids=["adapter", "every weight"])
def test_a_fine_tuned_run_is_trained_on_and_is_the_reference(enabled: bool, model: Path, tmp_path: Path) -> None:
    """Prevents preferences that start from the base again, or are measured against it."""
    tuned = tiny_config(
        tmp_path / "sft", model=model, training__max_steps=10, training__learning_rate=0.01, lora__enabled=enabled
    )
    run_training(tuned)
    config = tiny_pairs_config(
        tmp_path / "dpo", model=tuned.run_dir, training__max_steps=2, training__batch_size=8, lora__enabled=enabled,
        training__learning_rate=1e-4,
    )  # fmt: skip
    run_training(config)
    plain = tiny_pairs_config(
        tmp_path / "plain", model=model, training__max_steps=2, training__batch_size=8, lora__enabled=enabled
    )
    run_training(plain)
    first, from_base = records(config.run_dir)[0], records(plain.run_dir)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["logps/chosen"] > from_base["logps/chosen"] + 5, "the fine-tuned model knows the answers"
    if enabled:
        adapter = json.loads((config.run_dir / "checkpoints/final/adapter/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(model)


def test_the_plan_counts_pairs_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    """Prevents a dry run that asks the model for all of the reference, or counts an answer as a row."""
    config = tiny_pairs_config(tmp_path, model=model)
    plan = plan_run(config)
    train = plan["data"]["train"]
    assert (train["rows"], train["kept"], train["format"]) == (8, 8, "preference")
    assert train["shared_tokens"] > 100
    assert plan["memory"]["total"] > 0
    assert not (tmp_path / "work").exists()
    assert not config.run_dir.exists()


def test_pairs_that_cannot_be_used_are_counted_and_named(model: Path, tmp_path: Path) -> None:
    """Prevents a preference for nothing, and an answer of several turns of which some are ignored."""
    talk = [
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "r"},
    ]
    changes: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("alike", {"rejected": "red"}, "two answers of the same tokens"),
        ("talk", {"chosen": talk}, "an answer of several turns"),
    )
    for name, first, reason in changes:
        folder = tmp_path / name
        folder.mkdir()
        write_pairs(folder / "pairs.jsonl", **first)
        config = tiny_pairs_config(folder, model=model, training__max_steps=1)
        with pytest.raises(CheckFailedError, match=r"pairs\.jsonl:1"):
            run_training(config)
        allowed = config.model_copy(update={"gate": config.gate.model_copy(update={"action": "warn"})})
        prepared = prepare_pairs(allowed, now=utc_now())
        assert prepared.data_summary()["train"]["reasons"] == {reason: 1}
        assert len(prepared.train.datums) == 7


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "learns from pairs"),
        ({"prompt": "a", "completion": "b", "label": True}, "learns from pairs"),
        ({"chosen": "b", "rejected": "c"}, r"rows\.jsonl:1: prompt: nothing where"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    """Prevents answers without a prompt, and labelled ones taken for the better half of a pair."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [row] * 3)
    config = tiny_pairs_config(tmp_path, model=model, data__train_file=str(rows))
    with pytest.raises(DataError, match=said) as caught:
        prepare_pairs(config, now=utc_now())
    assert "method=sft" in str(caught.value) or "prompt" in str(caught.value)


def test_a_pair_longer_than_max_length_is_dropped_whole(model: Path, tmp_path: Path) -> None:
    """Prevents half a pair, and a length that counts both answers."""
    write_pairs(tmp_path / "pairs.jsonl", rejected="red " * 40)
    config: DpoConfig = tiny_pairs_config(tmp_path, model=model, data__max_length=64)
    prepared = prepare_pairs(config, now=utc_now())
    assert prepared.data_summary()["train"]["reasons"] == {"longer than 64 tokens": 1}
    assert all(datum.num_positions < 64 for datum in prepared.train.datums)
