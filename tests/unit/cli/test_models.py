"""`foundry models`: what a person and a program read. No network, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TINY_CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 8, "tie_word_embeddings": True,
}  # fmt: skip


def foundry(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environ = {"FOUNDRY_HOME": str(home), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "model_foundry", "models", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import numpy as np

    from model_foundry.checkpoint.tensors import write_tensors

    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    write_tensors(folder / "model.safetensors", {"model.embed_tokens.weight": np.ones((8, 4), np.float32)})
    return folder


def test_list_names_what_can_be_fetched_before_anything_is(tmp_path: Path) -> None:
    done = foundry("list", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(row["name"], row["state"]) for row in json.loads(done.stdout)] == [
        ("smollm2-135m-instruct", "not fetched")
    ]


def test_show_tells_how_a_folder_would_be_run(folder: Path, tmp_path: Path) -> None:
    done = foundry("show", str(folder), "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["architecture"], facts["implementation"], facts["num_layers"]) == ("llama", "native", 1)
    assert facts["stored_as"] == ["F32"]


def test_an_unknown_name_is_one_paragraph_and_exit_code_2(tmp_path: Path) -> None:
    done = foundry("pull", "smollm2-135m-instrct", home=tmp_path)
    assert done.returncode == 2
    assert "Did you mean smollm2-135m-instruct?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_needs_nothing_but_a_config(tmp_path: Path) -> None:
    """The question is asked before sixty gigabytes are fetched."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_CONFIG))
    for name in (config, tmp_path):
        done = foundry("show", str(name), "--plan", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert "no step was measured" in done.stdout
    facts = json.loads(foundry("show", str(config), "--plan", "--json", home=tmp_path / "home").stdout)
    assert facts["num_parameters"] == 4 * 8 + 4 * (4 * 4) + 3 * (4 * 4) + 3 * 4
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    done = foundry("show", str(config), "--plan", home=tmp_path / "home")
    assert (done.returncode, "mamba" in done.stderr) == (2, True)


def test_a_plan_of_a_whole_model_is_made_from_its_config_too(folder: Path, tmp_path: Path) -> None:
    done = foundry("show", str(folder), "--plan", "--json", home=tmp_path / "home")
    assert json.loads(done.stdout)["vocab_size"] == 8
