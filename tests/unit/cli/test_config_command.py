"""`foundry config`: valid or not, which files, which digest, without loading a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model_foundry.cli.config import command
from model_foundry.config.commands import COMMAND_SCHEMAS
from model_foundry.config.fields import schema_fields
from model_foundry.config.load import config_digest, load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.errors import ConfigError


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n", encoding="utf-8")
    path = tmp_path / "a.yaml"
    path.write_text("inherits: chat\ndata: {train_file: train.jsonl}\n", encoding="utf-8")
    return path


def test_a_valid_configuration_gives_its_files_and_digest(config: Path) -> None:
    result = invoke("check", str(config), "seed=4")
    digest = config_digest(load_config(TrainConfig, path=config, overrides=["seed=4"], environ={}).config)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"valid for foundry train: {config}, profile chat, 1 override",
        f"data.train_file: {config.parent / 'train.jsonl'}",
        f"digest: {digest}",
    ]


def test_what_a_program_reads(config: Path) -> None:
    found = json.loads(invoke("check", str(config), "--json").stdout)
    assert found["valid"] is True
    assert found["files"] == {"data.train_file": str(config.parent / "train.jsonl")}


def test_files_that_are_not_there_are_all_named_with_the_line(config: Path) -> None:
    config.write_text("data: {train_file: gone.jsonl}\nevaluation:\n  file: .\n", encoding="utf-8")
    error = invoke("check", str(config), "model.template=mine.jinja").exception
    assert isinstance(error, ConfigError)
    assert f"{config}:1: data.train_file names {config.parent / 'gone.jsonl'}, which does not exist" in error.what
    assert f"{config}:3: evaluation.file names" in error.what
    assert "which is a folder" in error.what
    assert "override model.template=mine.jinja: model.template names mine.jinja" in error.what


def test_rows_may_be_a_folder_or_a_data_set_of_the_hub(config: Path) -> None:
    """Prevents an address from losing a slash on its way through a Path, and from being looked for on the disk."""
    address = "hf://datasets/acme/rows@v1:train"
    changes = [f"data.train_file={address}", f"data.validation_file={config.parent}"]
    found = json.loads(invoke("check", str(config), *changes, "--json").stdout)
    assert found["files"] == {"data.train_file": address, "data.validation_file": str(config.parent)}
    loaded = load_config(TrainConfig, path=config, overrides=changes).config
    assert (loaded.data.train_file, loaded.data.validation_file) == (address, config.parent)
    assert schema_fields(TrainConfig)["data.train_file"].expected == "a path or an address hf://datasets/… or null"


def test_training_without_rows_is_refused_and_chatting_is_not() -> None:
    error = invoke("check").exception
    assert isinstance(error, ConfigError)
    assert error.what == "data.train_file is not given"
    assert invoke("check", "--command", "chat", "temperature=0.5").exit_code == 0


def test_explain_comes_with_the_check(config: Path) -> None:
    assert f"file {config}:2" in invoke("check", str(config), "--explain").stdout


@pytest.mark.parametrize("verb", list(COMMAND_SCHEMAS))
def test_the_schema_is_json_schema(verb: str) -> None:
    described = json.loads(invoke("schema", "--command", verb).stdout)
    assert set(COMMAND_SCHEMAS[verb].model_fields) < set(described["properties"])


@pytest.mark.slow
def test_checking_loads_no_model_and_no_torch(config: Path) -> None:
    script = (
        "import sys\nfrom model_foundry.cli.main import main\n"
        f"try:\n    main(['config', 'check', {str(config)!r}])\nexcept SystemExit as left:\n    assert not left.code\n"
        "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_a_domain_is_judged_as_what_generate_reads_and_not_as_a_training_run(tmp_path: Path) -> None:
    """Prevents every configuration from being judged as a training run, and a list of folders from being no file."""
    (tmp_path / "code").mkdir()
    (tmp_path / "base.yaml").write_text("corpus: {min_lines: 2}\nprompt: {voices: {a: who}}\n", encoding="utf-8")
    domain = tmp_path / "domain.yaml"
    domain.write_text("inherits: base.yaml\ncorpus:\n  roots: [code]\n  concepts: {Door: opens}\n", encoding="utf-8")
    result = invoke("check", str(domain))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:2] == [
        f"valid for foundry generate: {domain}",
        f"corpus.roots[0]: {tmp_path / 'code'}",
    ]
    assert json.loads(invoke("check", str(domain), "--json").stdout)["command"] == "generate"


@pytest.mark.parametrize(
    "text, command",
    [
        ("model: x\ntraining: {epochs: 1}\n", "train"),
        ("model: x\nprompt: who are you?\n", "chat"),
        ("source: rows.jsonl\nseed: 1\n", "data pack"),
        ("evaluation: {file: q.jsonl}\ntrainig: {epochs: 1}\ndata: {train_file: r.jsonl}\n", "train"),
    ],
)
def test_a_problem_says_what_the_configuration_was_taken_for(tmp_path: Path, text: str, command: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{text}no_such_key: 1\n", encoding="utf-8")
    error = invoke("check", str(path)).exception
    assert isinstance(error, ConfigError)
    assert f"taken for a configuration of foundry {command}; --command NAME chooses another" in (error.hint or "")


def test_keys_that_several_commands_have_leave_it_open_and_the_option_decides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: x\nseed: 1\n", encoding="utf-8")
    error = invoke("check", str(path)).exception
    assert isinstance(error, ConfigError)
    assert "its keys would also do for rl, evaluate, chat" in (error.hint or "")
    assert invoke("check", str(path), "--command", "evaluate").stdout.startswith("valid for foundry evaluate")


def test_a_folder_of_code_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = invoke("check", "--command", "generate", f"corpus.roots=[{tmp_path}, {tmp_path / 'gone'}]").exception
    assert isinstance(error, ConfigError)
    assert error.what == f"corpus.roots[1] names {tmp_path / 'gone'}, which does not exist"
