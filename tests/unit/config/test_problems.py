"""Every problem at once, each with its place, the value as typed and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import ChatConfig, EvaluateConfig, TrainConfig
from model_foundry.errors import ConfigError


def error_of(
    *overrides: str, text: str = "", folder: Path | None = None, environ: dict[str, str] | None = None
) -> ConfigError:
    path = None
    if folder is not None:
        path = folder / "a.yaml"
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path=path, overrides=overrides, environ=environ or {})
    return caught.value


@pytest.mark.parametrize(
    "key, meant",
    [
        ("lr", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("training.learning-rate", "training.learning_rate"),
        ("training.Learning_Rate", "training.learning_rate"),
        ("training.leraning_rate", "training.learning_rate"),
        ("training.max_length", "data.max_length"),
        ("data.max_seq_length", "data.max_length"),
        ("trainig", "training"),
        ("lora.rank", "lora.r"),
        ("output_dir", "run_dir"),
        ("evaluation.batchsize", "evaluation.batch_size"),
        ("training.batchsize", "training.batch_size"),
        ("model_name_or_path", "model.name"),
        ("per_device_train_batch_size", "training.batch_size"),
    ],
)
def test_an_unknown_key_suggests_the_field_it_means(key: str, meant: str) -> None:
    error = error_of(f"{key}=1")
    assert error.what == f"unknown key {key}"
    assert error.where == f"override {key}=1"
    assert error.hint == f"Did you mean {meant}?"


def test_an_unknown_section_is_named_once_whatever_it_holds(tmp_path: Path) -> None:
    error = error_of(text="trainig:\n  epochs: 1\n  batch_size: 2\n", folder=tmp_path)
    assert (error.what, error.hint) == ("unknown key trainig", "Did you mean training?")
    assert error.where == f"{tmp_path / 'a.yaml'}:1"


def test_a_key_like_nothing_is_answered_with_what_there_is() -> None:
    hint = error_of("zebra=1").hint
    assert hint is not None
    assert hint.startswith("There are ")
    assert {"run_dir", "training", "lora"} <= set(hint.removeprefix("There are ").split(", "))
    assert (error_of("criteria.foo=1").hint or "").startswith("criteria has ")
    for key in ("data.zebra", "data.zebra.stripes"):
        hint = error_of(f"{key}=1").hint
        assert hint is not None
        assert hint.startswith("data has ")
        assert "max_length" in hint
        assert "run_dir" not in hint


def test_a_key_of_another_command_says_whose_it_is() -> None:
    with pytest.raises(ConfigError, match="It belongs to foundry train"):
        load_config(EvaluateConfig, path=None, overrides=["training.learning_rate=1"], environ={})
    with pytest.raises(ConfigError, match="It belongs to foundry train method=sft"):  # who asks has typed `train`
        load_config(ExperimentConfig, path=None, overrides=["model.quantization=nf4"], environ={})
    with pytest.raises(ConfigError, match="It belongs to foundry chat"):
        load_config(TrainConfig, path=None, overrides=["temperature=1"], environ={})
    with pytest.raises(ConfigError, match="inherits stands at the top of a file"):
        load_config(ChatConfig, path=None, overrides=["inherits=chat"], environ={})


@pytest.mark.parametrize(
    "override, what",
    [
        ("training.learning_rate=-1", "training.learning_rate is -1; expected a number above 0 and at most 10"),
        ("training.learning_rate=fast", 'training.learning_rate is "fast"; expected a number above 0 and at most 10'),
        ("training.learning_rate=.nan", "training.learning_rate is nan; expected a number above 0 and at most 10"),
        ("training.learning_rate=1e999", "training.learning_rate is inf; expected a number above 0 and at most 10"),
        ("training.batch_size=2.5", "training.batch_size is 2.5; expected a whole number of at least 1"),
        ("training.batch_size=true", "training.batch_size is true; expected a whole number of at least 1"),
        ("training.batch_size=", "training.batch_size is null; expected a whole number of at least 1"),
        ("training.batch_size=[1]", "training.batch_size is [1]; expected a whole number of at least 1"),
        ("training.save_at=[5,0]", "training.save_at[1] is 0; expected a list, each a whole number of at least 1"),
        ("training.max_steps=0", "training.max_steps is 0; expected a whole number of at least 1 or null"),
        ("criteria.loss_fall=1", "criteria.loss_fall is 1; expected a number of at least 0 and below 1 or null"),
        ("lora.enabled=maybe", 'lora.enabled is "maybe"; expected true or false'),
        ("lora.target_modules={a: 1}", 'lora.target_modules is {"a": 1}; expected text or a list, each text'),
        ("data.packing=null", "data.packing is null; expected true or false"),
        ("lora=smol", 'lora is "smol"; expected a section of fields'),
        ("seed.x=1", 'seed is {"x": 1}; expected a whole number of at least 0 and below 4294967296'),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(override: str, what: str) -> None:
    error = error_of(override)
    assert error.what == what
    assert error.where == f"override {override}"


def test_a_wrong_choice_suggests_the_right_one() -> None:
    assert error_of("training.lr_scheduler=cosin").hint == "Did you mean cosine?"
    assert error_of("model.dtype=BFLOAT16").hint == "Did you mean bfloat16?"
    assert error_of("logging.report_to=wandb").hint == "Write a list: [wandb]"


def test_all_problems_come_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = "training:\n  batch_size: 0\n  lr: 1\ndata: {format: mesages}\nlora: 3\n"
    error = error_of("seed=-1", text=text, folder=tmp_path, environ={"LORA_R": "0", "TRAINING_EPOCHS": "0"})
    first, *lines = error.what.split("\n")
    assert first == f"{len(lines)} problems in the configuration:"
    places = [line.strip().rpartition(": ")[0] for line in lines]
    assert [place.startswith(f"{tmp_path / 'a.yaml'}:") for place in places].count(True) == 3
    numbers = [int(line.split("a.yaml:")[1].split(":")[0]) for line in lines if "a.yaml:" in line]
    assert numbers == sorted(numbers) == [2, 3, 4]
    assert any("environment variable TRAINING_EPOCHS: training.epochs is 0" in line for line in lines)
    assert any("override seed=-1: seed is -1" in line for line in lines)


def test_a_union_is_one_problem_not_one_a_branch() -> None:
    assert "problems" not in error_of("lora.target_modules=[1]").what


def test_a_problem_in_a_profile_or_parent_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("\n\nseed: -3\n", encoding="utf-8")
    error = error_of(text="inherits: base.yaml\n", folder=tmp_path)
    assert error.where == f"{tmp_path / 'base.yaml'}:3"


@pytest.mark.parametrize(
    "overrides, where, what",
    [
        (["training.save_schedule=explicit"], "training.save_schedule=explicit", "needs training.save_at"),
        (["training.save_at=[3]"], "training.save_at=[3]", "is read only with"),
        (["training.max_steps=5", "training.warmup_steps=6"], "training.warmup_steps=6", "is more than max_steps 5"),
        (["training.eval_steps=5"], "training.eval_steps=5", "needs data.validation_file"),
        (["training.optimizer=muon"], "training.optimizer=muon", "lora.enabled is true"),
        (
            ["training.lr_scheduler=wsd", "training.warmup_ratio=0.9", "training.decay_ratio=0.2"],
            "training.decay_ratio=0.2",
            "add up to more than 1",
        ),
    ],
)
def test_rules_between_fields_point_at_the_field_that_breaks_them(overrides: list[str], where: str, what: str) -> None:
    error = error_of(*overrides)
    assert error.where == f"override {where}"
    assert what in error.what


def test_a_long_value_is_shortened() -> None:
    assert len(error_of(f"seed={'x' * 10_000}").what) < 200


def test_an_error_shows_no_traceback_of_pydantic() -> None:
    text = str(error_of("training.learning_rate=-1"))
    assert "pydantic" not in text
    assert "validation error" not in text
