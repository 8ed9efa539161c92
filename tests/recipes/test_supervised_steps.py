"""Batches, steps and records: what must coincide, and what metrics.jsonl says about it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from model_foundry.checkpoint.compare import compare_checkpoints
from model_foundry.errors import ConfigError, InterruptedRunError
from model_foundry.recipes import session, training_run
from model_foundry.recipes.preparation import prepare
from model_foundry.recipes.proof import memory_task
from model_foundry.recipes.supervised import trailing_skips
from model_foundry.recipes.training_run import plan_run, run_training
from model_foundry.recipes.verify import verify_run
from model_foundry.run.directory import RunDirectory, utc_now
from model_foundry.run.metrics import comparable_lines
from model_foundry.run.report import read_report
from tests.tiny_runs import COLOURS, chat_row, checkpoint_names, losses, records, tiny_config, write_jsonl

STEP_KEYS = {
    "kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "skipped", "clock"
}  # fmt: skip
CLOCK_KEYS = {"time", "seconds", "tokens_per_second", "memory_bytes"}


def trained(folder: Path, model: Path, **changes: Any) -> Path:
    """Train; the run's folder."""
    config = tiny_config(folder, model=model, **changes)
    run_training(config)
    return config.run_dir


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / "final" / "adapter" / "adapter_model.safetensors")


def assert_close(a: Path, b: Path, *, atol: float) -> None:
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)
    theirs = adapter(b)
    for name, tensor in adapter(a).items():
        np.testing.assert_allclose(tensor, theirs[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_by_eight_equals_eight_by_one(dropout: float, model: Path, tmp_path: Path) -> None:
    """Prevents accumulation that averages means, or dropout masks that depend on the split."""
    common = {"lora__lora_dropout": dropout, "training__max_steps": 6, "training__learning_rate": 1e-3}
    whole = trained(tmp_path / "a", model, training__batch_size=8, **common)
    parts = trained(tmp_path / "b", model, training__batch_size=1, training__gradient_accumulation_steps=8, **common)
    pieces = trained(tmp_path / "c", model, training__micro_batch_tokens=90, **common)
    # Adam divides by the gradient's own size, so a rounding error may show as a small share of the rate.
    assert_close(whole, parts, atol=2e-4)
    assert_close(whole, pieces, atol=2e-4)


def test_a_packed_step_has_the_loss_of_its_rows(model: Path, tmp_path: Path) -> None:
    """Prevents cross-talk between the rows of a bin, and tokens lost in packing."""
    common = {"training__max_steps": 4, "training__learning_rate": 1e-3}
    plain = trained(tmp_path / "a", model, **common)
    packed = trained(
        tmp_path / "b", model, data__packing=True, data__max_length=100, training__batch_size=8, **common
    )  # fmt: skip
    assert losses(plain) == pytest.approx(losses(packed), rel=1e-5)
    assert [each["tokens"] for each in records(plain)] == [each["tokens"] for each in records(packed)]


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not(model: Path, tmp_path: Path) -> None:
    """Prevents hidden state: order, initialisation or time leaking into the result."""
    runs = [
        trained(tmp_path / name, model, seed=seed, training__batch_size=3, training__max_steps=6)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    lines = [comparable_lines(run / "metrics.jsonl") for run in runs]
    assert lines[0] == lines[1] != lines[2]
    first, second = adapter(runs[0]), adapter(runs[1])
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_records_say_what_the_contract_names(model: Path, tmp_path: Path) -> None:
    """Prevents a reader of metrics.jsonl from finding a key missing or renamed."""
    run = trained(
        tmp_path, model, training__epochs=2, training__max_steps=None, training__batch_size=4, training__eval_steps=3,
        data__validation_file=str(tmp_path / "train.jsonl"),
    )  # fmt: skip
    steps, validations = records(run), records(run, "validation")
    assert all(set(record) == STEP_KEYS and set(record["clock"]) == CLOCK_KEYS for record in steps)
    assert all(set(record) == {"kind", "step", "loss", "tokens", "clock"} for record in validations)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["epoch"] for record in steps] == [0.5, 1.0, 1.5, 2.0]
    assert [record["step"] for record in validations] == [0, 3, 4]
    per_epoch = sum(record["tokens"] for record in steps[:2])
    assert per_epoch == sum(record["tokens"] for record in steps[2:]) == validations[0]["tokens"]
    assert all(0 < record["trained_tokens"] < record["tokens"] and not record["skipped"] for record in steps)


def test_the_last_step_takes_what_is_left_and_weighs_it_right(model: Path, tmp_path: Path) -> None:
    """Prevents rows dropped at an epoch's end, and a short last step divided by a full one's tokens."""
    common = {"training__max_steps": None, "training__epochs": 1, "data__shuffle": False}
    rate = {"training__learning_rate": 1e-9}
    run = trained(
        tmp_path / "a", model, training__batch_size=3, training__gradient_accumulation_steps=2, **common, **rate
    )  # fmt: skip
    steps = records(run)
    assert [record["epoch"] for record in steps] == [0.666667, 1.0]
    single = records(trained(tmp_path / "b", model, training__batch_size=1, **common, **rate))
    for record, rows in zip(steps, (single[:6], single[6:]), strict=True):
        assert record["tokens"] == sum(row["tokens"] for row in rows)
        mean = sum(row["loss"] * row["trained_tokens"] for row in rows) / sum(row["trained_tokens"] for row in rows)
        assert record["loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    "changes, steps, last_epoch",
    [
        ({"training__max_steps": 5, "training__epochs": 1}, 5, 2.5),
        ({"training__max_steps": None, "training__epochs": 0.5}, 1, 0.5),
        ({"training__max_steps": None, "training__epochs": 0.01}, 1, 0.5),
        ({"training__max_steps": None, "training__epochs": 2.5}, 5, 2.5),
    ],
)
def test_max_steps_overrides_epochs(
    changes: dict[str, Any], steps: int, last_epoch: float, model: Path, tmp_path: Path
) -> None:
    """Prevents a run of another length than was asked for."""
    prepared = prepare(tiny_config(tmp_path, model=model, training__batch_size=4, **changes), now=utc_now())
    assert prepared.total_steps == steps
    assert prepared.positions(steps).stop / prepared.batches.num_batches_per_epoch == last_epoch


def test_a_save_beyond_the_end_is_refused(model: Path, tmp_path: Path) -> None:
    """Prevents a checkpoint that was asked for and never comes, without a word."""
    config = tiny_config(
        tmp_path, model=model, training__max_steps=5, training__save_schedule="explicit", training__save_at=[2, 6]
    )
    with pytest.raises(ConfigError, match=r"training\.save_at: step 6 is beyond the last of 5 steps"):
        prepare(config, now=utc_now())


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(model: Path, tmp_path: Path) -> None:
    """Prevents rows left out or repeated when batches do not divide the data."""
    config = tiny_config(tmp_path, model=model, training__batch_size=3, training__epochs=3, training__max_steps=None)
    prepared = prepare(config, now=utc_now())
    epochs = [
        [row for position in range(3 * epoch, 3 * epoch + 3) for row in prepared.batches.rows(position)]
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_batch_that_is_tried_is_the_longest_of_all_epochs(model: Path, tmp_path: Path) -> None:
    """Prevents a run that passes its trial and runs out of memory in a later epoch."""
    config = tiny_config(
        tmp_path, model=model, training__batch_size=2, training__epochs=40, training__max_steps=None,
        data__max_length=256,
    )  # fmt: skip
    rows = [chat_row(name * (1 + 9 * (number < 2)), "x") for number, name in enumerate(COLOURS)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    prepared = prepare(config, now=utc_now())
    tried = sum(datum.num_tokens for datum in prepared.longest_batch())
    sizes = [
        sum(datum.num_tokens for datum in batch)
        for step in range(1, prepared.total_steps + 1)
        for batch in prepared.micro_batches(step)
    ]
    assert tried == max(sizes)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "wsd"])
def test_the_rate_of_every_step_is_the_schedule_s(scheduler: str, model: Path, tmp_path: Path) -> None:
    """Prevents an off-by-one between the schedule and the step that uses it."""
    config = tiny_config(
        tmp_path, model=model, training__lr_scheduler=scheduler, training__warmup_steps=3, training__min_lr_ratio=0.1
    )
    run_training(config)
    rates = [record["learning_rate"] for record in records(config.run_dir)]
    prepared = prepare(config, now=utc_now())
    assert rates == [prepared.learning_rate.at(step) for step in range(1, 13)]
    assert rates[:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    assert rates[-1] == 0.02 if scheduler == "constant" else 0.002 < rates[-1] < 0.02


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"save_steps": 5, "save_total_limit": None}, [5, 10]),
        ({"save_steps": 0}, []),
        ({"save_schedule": "log", "save_total_limit": None}, [1, 2, 4, 8]),
        ({"save_schedule": "explicit", "save_at": [3, 11], "save_total_limit": None}, [3, 11]),
        ({"save_steps": 2, "save_total_limit": 2}, [8, 10]),
        ({"save_steps": 3, "save_total_limit": 1}, [9]),
    ],
)
def test_checkpoints_are_saved_on_schedule_and_few_are_kept(
    changes: dict[str, Any], names: list[int], model: Path, tmp_path: Path
) -> None:
    """Prevents a schedule that is read wrongly, and a disk filled with checkpoints."""
    run = trained(tmp_path, model, **{f"training__{key}": value for key, value in changes.items()})
    assert checkpoint_names(run) == ["final", *(f"step-{step:08d}" for step in names)]


def test_the_replay_starts_at_a_checkpoint_of_its_own(model: Path, tmp_path: Path) -> None:
    """Prevents a proof that has nothing to start from, because no scheduled save is near the end."""
    report = run_training(tiny_config(tmp_path, model=model, training__save_steps=0, criteria__replay_steps=3))
    assert {check.name: check.passed for check in report.checks} == {"artefacts_load": True, "replay_identical": True}
    assert "from step 9" in next(check.evidence for check in report.checks if check.name == "replay_identical")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_shorter_than_its_replay_is_repeated_from_the_start(steps: int, model: Path, tmp_path: Path) -> None:
    """Prevents the shortest runs from failing a proof that they could pass."""
    changes = {"training__max_steps": steps, "criteria__replay_steps": 5, "training__save_steps": 0}
    report = run_training(
        tiny_config(tmp_path, model=model, data__validation_file=str(tmp_path / "train.jsonl"), **changes)
    )
    assert report.verdict == "passed"


def test_a_run_in_a_thread_trains_as_one_in_the_main_thread(model: Path, tmp_path: Path) -> None:
    """Prevents signal handlers, which only the main thread may set, from keeping a library's user from training."""
    caught: list[BaseException] = []

    def work() -> None:
        try:
            trained(tmp_path, model, training__max_steps=2)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not caught
    assert (tmp_path / "run" / "report.json").exists()


def test_skips_that_a_smaller_loss_scale_may_mend_are_not_counted_on_resume() -> None:
    """float16 starts with a scale that may be too large by far: that is no reason to stop."""

    def record(*, skipped: bool, loss: float | None = 2.0, **more: float) -> dict[str, Any]:
        return {"kind": "step", "skipped": skipped, "loss": loss, **more}

    mended = record(skipped=True, loss_scale=65536.0)
    assert trailing_skips([mended] * 9) == 0
    assert trailing_skips([record(skipped=True), record(skipped=False), record(skipped=True), mended]) == 1
    assert trailing_skips([record(skipped=True, loss=None, loss_scale=65536.0)]) == 1
    assert trailing_skips([record(skipped=True, loss_scale=1.0)] * 3) == 3


def test_a_batch_that_the_free_memory_does_not_take_is_split(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a run that Linux ends in its first step although pieces of the batch would have fitted."""
    common = {"training__max_steps": 4, "training__batch_size": 8, "training__learning_rate": 1e-3}
    whole = trained(tmp_path / "whole", model, **common)
    # Less than none, since what this process has taken before counts as room.
    monkeypatch.setattr(session, "memory_facts", lambda: {"available_bytes": -(2**40)})
    split = trained(tmp_path / "split", model, **common)
    assert_close(whole, split, atol=2e-4)
    assert plan_run(tiny_config(tmp_path / "plan", model=model, **common))["pieces_of_the_longest_batch"] > 1
    as_asked = tiny_config(tmp_path / "asked", model=model, training__micro_batch_tokens=1000, **common)
    assert plan_run(as_asked)["pieces_of_the_longest_batch"] == 1, "what was asked for is done"


def test_a_run_goes_on_in_the_pieces_that_it_was_begun_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents bits that depend on the memory that happens to be free when a run is resumed or run again."""
    common = {"training__max_steps": 4, "training__batch_size": 8, "training__save_steps": 0}
    monkeypatch.setattr(session, "memory_facts", lambda: {"available_bytes": -(2**40)})
    split = trained(tmp_path / "split", model, criteria__replay_steps=4, **common)
    tokens = RunDirectory.read(split).facts["piece_tokens"]
    assert tokens > 0
    assert read_report(split).verdict == "passed", "repeated from its start, in whole batches, it would differ"

    small, large = {"available_bytes": -(2**40)}, {"available_bytes": 2**50}
    for name, begun, later, limit in (("to large", small, large, tokens), ("to small", large, small, 0)):
        config = tiny_config(tmp_path / name, model=model, **common)
        monkeypatch.setattr(session, "memory_facts", lambda begun=begun: begun)
        with monkeypatch.context() as patched:
            patched.setattr(training_run, "held_out_answers", _interrupted)  # before its first save
            with pytest.raises(InterruptedRunError):
                run_training(config)
        monkeypatch.setattr(session, "memory_facts", lambda later=later: later)
        run_training(config, resume="must")
        assert RunDirectory.read(config.run_dir).facts["piece_tokens"] == limit
        state = json.loads((config.run_dir / "checkpoints" / "final" / "state" / "engine.json").read_text())
        assert (state["max_piece_tokens"] or 0) == limit
        log = (config.run_dir / "run.log").read_text()
        assert ("pieces as this run was begun" in log) == (limit > 0)
        assert ("are predicted and" in log) == (limit == 0), "that it may not fit is said"
        assert "it is split at" not in log

    resumed = tmp_path / "to large" / "run"
    assert not compare_checkpoints(split / "checkpoints" / "final", resumed / "checkpoints" / "final")
    assert comparable_lines(split / "metrics.jsonl") == comparable_lines(resumed / "metrics.jsonl")


def _interrupted(*_: Any, **__: Any) -> list[str]:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_in_pieces_is_verified_where_more_memory_is_free(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents `foundry verify run` from calling a run another one because it was begun on a fuller machine."""
    config = tiny_config(tmp_path, model=model, training__max_steps=3, training__batch_size=8)
    with monkeypatch.context() as patched:
        patched.setattr(session, "memory_facts", lambda: {"available_bytes": -(2**40)})
        run_training(config)
    assert [check.passed for check in verify_run(config.run_dir, config)] == [True, True]


def test_memory_is_measured_in_the_pieces_of_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a proof that computes whole batches, for which there is no memory, after a run that was split."""
    monkeypatch.setattr(session, "memory_facts", lambda: {"available_bytes": -(2**40)})
    work = prepare(tiny_config(tmp_path, model=model, training__batch_size=8), now=utc_now())
    opened = session.open_session(work)
    assert opened.piece_tokens > 0
    assert memory_task(work, opened.engine, opened.model_id, lora=None).micro_batch_tokens == opened.piece_tokens
