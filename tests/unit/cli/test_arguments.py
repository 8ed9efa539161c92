"""`foundry VERB [CONFIG] [key=value ...]`, the same for every verb."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.cli.arguments import load_command_config, split_arguments, takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.schema import ChatConfig, TrainConfig
from model_foundry.errors import UsageError


@click.command()
@takes_config(TrainConfig)
@click.option("--dry-run", is_flag=True)
def train(resolved: Resolved[TrainConfig], *, as_json: bool, dry_run: bool) -> None:
    """A verb like any other."""
    click.echo(f"ran seed={resolved.config.seed} as_json={as_json} dry_run={dry_run}")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "a.yaml"
    path.write_text("seed: 3\n", encoding="utf-8")
    return str(path)


def output(*arguments: str, **environ: str) -> str:
    result = CliRunner().invoke(train, list(arguments), env=environ)
    assert result.exception is None, result.exception
    return result.stdout


def test_config_overrides_and_flags_come_in_any_order(config: str) -> None:
    assert output(config, "training.epochs=1", "--dry-run") == "ran seed=3 as_json=False dry_run=True\n"
    assert output("--json", "training.epochs=1", config) == "ran seed=3 as_json=True dry_run=False\n"
    assert output("training.learning_rate=1e-3") == "ran seed=0 as_json=False dry_run=False\n"


def test_the_environment_is_read(config: str) -> None:
    assert "seed=8" in output(config, FOUNDRY_SEED="8")
    assert "seed=9" in output(config, "seed=9", FOUNDRY_SEED="8")


def test_print_config_and_explain_run_nothing(config: str) -> None:
    printed = output(config, "--print-config")
    assert f"seed: 3  # file {config}:1; default 0\n" in printed
    explained = output(config, "--explain", "lora.r=4")
    assert "lora.r = 4" in explained
    assert "ran" not in printed.split() + explained.split()


def test_what_a_program_reads(config: str) -> None:
    read = json.loads(output(config, "--print-config", "--json"))
    assert read["config"]["seed"] == 3
    assert read["provenance"]["seed"] == f"file {config}:1"
    assert len(read["digest"]) == 64


def test_warnings_go_to_stderr(config: str) -> None:
    result = CliRunner().invoke(train, [config], env={"TRAINING_LR": "3"})
    assert (
        result.stderr
        == "warning: environment variable TRAINING_LR sets nothing; did you mean TRAINING_LEARNING_RATE?\n"
    )
    assert result.stdout.startswith("ran")


def test_two_configurations_are_refused(config: str) -> None:
    with pytest.raises(UsageError, match="one CONFIG at a time"):
        load_command_config(TrainConfig, [config, "b.yaml"], {})


def test_a_path_that_holds_an_equals_sign_is_a_path() -> None:
    assert split_arguments(["runs/a=b/x.yaml", "./k=v.yaml", "k=v"]) == (["runs/a=b/x.yaml", "./k=v.yaml"], ["k=v"])


def test_a_name_without_yaml_sets_the_subject(config: str, tmp_path: Path) -> None:
    """`foundry chat runs/demo`, `foundry chat 007 chat.yaml`: a folder is the model, not the configuration."""
    chat = tmp_path / "chat.yaml"
    chat.write_text("temperature: 0.5\n", encoding="utf-8")
    resolved = load_command_config(ChatConfig, ["007", str(chat), "top_p=0.9"], {}, subject="model.name")
    assert resolved.config.model.name == "007"
    assert (resolved.config.temperature, resolved.config.top_p) == (0.5, 0.9)
    with pytest.raises(UsageError, match="one at a time"):
        load_command_config(ChatConfig, ["runs/a", "runs/b"], {}, subject="model.name")


WORDS = st.text(alphabet="abc_./ =-", min_size=1, max_size=12)


@given(st.lists(WORDS))
def test_no_argument_is_lost(arguments: list[str]) -> None:
    names, overrides = split_arguments(arguments)
    assert sorted(names + overrides) == sorted(arguments)
    assert all("=" in override for override in overrides)
