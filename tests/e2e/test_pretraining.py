"""Pretraining as a user runs it: processes of the command line, killed and resumed, and the folder that is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from model_foundry.checkpoint.lock import FileLock
from tests.tiny_runs import assert_one_paragraph, foundry, foundry_here, start, write_jsonl
from tests.tiny_text import documents, write_experiment

pytestmark = pytest.mark.slow


def all_pass(stdout: str) -> None:
    found = json.loads(stdout)
    assert found["passed"], found
    assert {check["name"] for check in found["checks"]} == {
        "final_checkpoint_identical", "metrics_identical", "kills_done"
    }  # fmt: skip


def test_killed_and_resumed_with_loader_processes(chatml_folder: Path, tmp_path: Path) -> None:
    """Over the border of an epoch, two processes reading ahead: a chunk read and not trained must be read again."""
    config = write_experiment(
        tmp_path, tokenizer=chatml_folder, training__max_steps=None, training__epochs=1.6, training__batch_size=12,
        data__loader_processes=2, evaluation={"prompts": ["the fox"], "max_new_tokens": 8},
    )  # fmt: skip
    done = foundry("verify", "resume", config, "--kills", 2, "--json", timeout=250)
    assert done.returncode == 0, done.stderr
    all_pass(done.stdout)


def test_killed_and_resumed_in_float16(chatml_folder: Path, tmp_path: Path) -> None:
    """The loss scale and the steps since it last changed are state: begun anew, they would grow at other steps."""
    write_experiment(tmp_path, tokenizer=chatml_folder)
    done = foundry(
        "verify", "resume", tmp_path / "config.yaml", "model.dtype=float16", "--kills", 2, "--json", timeout=250
    )
    assert done.returncode == 0, done.stderr
    all_pass(done.stdout)


@pytest.mark.prove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_twenty_of_twenty_kills(chatml_folder: Path, tmp_path: Path, optimizer: str) -> None:
    config = write_experiment(
        tmp_path, tokenizer=chatml_folder, training__max_steps=60, training__batch_size=12, training__save_steps=2,
        training__optimizer=optimizer, data__loader_processes=2,
    )  # fmt: skip
    done = foundry("verify", "resume", config, "--kills", 20, "--json", timeout=3500)
    assert done.returncode == 0, done.stderr
    all_pass(done.stdout)


def test_from_text_to_a_chat_model(chatml_folder: Path, tmp_path: Path) -> None:
    """A pretrained run is a model by its name: fine-tuned on, and run again to the same bits."""
    write_experiment(tmp_path, tokenizer=chatml_folder)
    done = foundry("train", tmp_path / "config.yaml", "--json")
    assert done.returncode == 0, done.stderr
    chats = [
        {"messages": [{"role": "user", "content": f"Where is {n}?"}, {"role": "assistant", "content": "Here."}]}
        for n in range(4)
    ]
    rows = write_jsonl(tmp_path / "chats.jsonl", chats)
    done = foundry(
        "train", f"model.name={tmp_path / 'run'}", f"data.train_file={rows}", f"run_dir={tmp_path / 'chat'}",
        "lora.enabled=false", "training.max_steps=4", "criteria.loss_fall=null", "data.max_length=32",
        "model.template=chatml", "training.warmup_steps=0", "gate.action=warn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The context is 32 tokens: less than rows of the suite asked by default, and than an answer usually has.
    assert "general; nobody asked for this suite, so it is left out" in done.stderr
    done = foundry("chat", tmp_path / "chat", "prompt=Where is 1?")
    assert done.returncode == 0, done.stderr
    done = foundry("verify", "run", tmp_path / "run", "--json", timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]


def test_a_run_waits_for_another_that_packs_the_same_text(chatml_folder: Path, tmp_path: Path) -> None:
    """A sweep over one corpus: every run but the first once ended because another was packing."""
    config = write_experiment(tmp_path, tokenizer=chatml_folder)
    assert foundry_here("train", config, "--dry-run").returncode == 0
    (packed,) = (tmp_path / "work" / "shards").glob("train-*")
    shutil.rmtree(packed)
    with FileLock.acquire(packed.with_name(f".{packed.name}.lock"), wait_seconds=1):
        process = start("train", config, "--dry-run")
        assert process.stderr is not None
        assert any("packing the same text; waiting for it" in line for line in process.stderr)
        assert not packed.exists()
    assert process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert packed.exists()


def test_bad_input_is_one_paragraph(chatml_folder: Path, tmp_path: Path) -> None:
    config = write_experiment(tmp_path, tokenizer=chatml_folder)
    assert_one_paragraph(foundry("train", config, "method=pretrian"), code=2, words=("method is", "pretrain"))
    assert_one_paragraph(
        foundry("train", config, "data.train_file=nowhere.txt"), code=2, words=("nowhere.txt", "no such file")
    )
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff" * 1000)
    assert_one_paragraph(
        foundry("train", config, f"data.train_file={tmp_path / 'binary.txt'}", "data.validation_share=0",
                "criteria.below_unigram=null"),
        code=2, words=("binary.txt",),
    )  # fmt: skip
    write_jsonl(tmp_path / "few.jsonl", documents(1))
    assert_one_paragraph(
        foundry("train", config, f"data.train_file={tmp_path / 'few.jsonl'}"), code=2, words=("no document falls on",)
    )
    assert not (tmp_path / "run").exists()
