"""The lifecycle example: its parts fit together, and its corpus is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import TrainConfig

ROOT = Path(__file__).parents[2]
LIFECYCLE = ROOT / "examples" / "lifecycle"


def test_the_chat_model_starts_from_the_model_that_is_pretrained() -> None:
    """Two files that name each other's folders drift apart unnoticed, and then `make lifecycle` trains on nothing."""
    base = load_config(ExperimentConfig, path=LIFECYCLE / "pretrain.yaml").config
    chat = load_config(TrainConfig, path=LIFECYCLE / "chat.yaml").config
    assert chat.model.name == str(base.run_dir)
    assert chat.data.max_length <= base.model.max_position_embeddings
    makefile = (ROOT / "Makefile").read_text()
    for named in (base.tokenizer.name, str(base.data.train_file), str(chat.run_dir)):
        assert f"$(LIFE){str(named).rpartition('runs/lifecycle')[2]}" in makefile


@pytest.mark.slow
def test_the_corpus_is_prose_without_repeats_and_the_same_every_time(tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for out in outs:
        command = [sys.executable, str(LIFECYCLE / "make_corpus.py"), "--out", str(out), "pydantic", "rich"]
        subprocess.run(command, check=True, capture_output=True)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    texts = [json.loads(line)["text"] for line in outs[0].read_text().splitlines()]
    assert len(texts) == len(set(texts)) > 50
    assert not any(">>>" in text for text in texts)
    assert sorted(tmp_path.iterdir()) == sorted(outs)


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(LIFECYCLE / "make_corpus.py"), "--out", str(tmp_path / "x"), "no_such_package"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no_such_package" in done.stderr
    assert not (tmp_path / "x").exists()
