"""The data in examples/ is what its generators write, bytes and all, and passes the gate that users' data must pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model_foundry.data.synth.writing import write_synthetic
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import foundry_here

EXAMPLES = Path(__file__).parents[2] / "examples"
SYNTHETIC = {"chat": 24, "instruction": 24, "preference": 24, "geography": 60, "arithmetic": 60, "pattern": 60}
OBJECTIVE = ("geography", "arithmetic", "pattern")
NUM_HELD_OUT = 20


def questions_of(name: str, folder: Path) -> Path | None:
    return folder / f"{name}-heldout.jsonl" if name in OBJECTIVE else None


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_sets_are_what_the_command_writes(name: str, tmp_path: Path) -> None:
    """Prevents a generator that changes its mind, and a figure measured on rows that nobody can make again."""
    write_synthetic(
        name, tmp_path / f"{name}.jsonl", num_rows=SYNTHETIC[name], heldout=questions_of(name, tmp_path),
        num_heldout=NUM_HELD_OUT,
    )  # fmt: skip
    written = sorted(tmp_path.iterdir())
    assert len(written) == (2 if name in OBJECTIVE else 1)
    for path in written:
        assert path.read_bytes() == (EXAMPLES / "synthetic" / path.name).read_bytes(), path.name


def test_every_synthetic_file_is_one_of_these() -> None:
    names = {f"{name}.jsonl" for name in SYNTHETIC} | {f"{name}-heldout.jsonl" for name in OBJECTIVE}
    assert {path.name for path in (EXAMPLES / "synthetic").iterdir()} == names


@pytest.mark.parametrize("name", OBJECTIVE)
def test_held_out_questions_are_asked_in_no_training_row(name: str) -> None:
    """Prevents a set that measures memory where it says that it measures a rule."""
    lines = (EXAMPLES / "synthetic" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    trained = {json.loads(line)["messages"][0]["content"] for line in lines}
    questions = (EXAMPLES / "synthetic" / f"{name}-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(questions) == NUM_HELD_OUT
    assert not trained & {json.loads(line)["prompt"] for line in questions}


def test_the_preference_example_is_what_its_generator_writes(tmp_path: Path) -> None:
    folder = EXAMPLES / "preference"
    command = [sys.executable, str(folder / "make_data.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["heldout.jsonl", "imitated.jsonl", "train.jsonl", "validation.jsonl"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "path, method",
    [
        ("synthetic/chat", "sft"),
        ("synthetic/instruction", "sft"),
        ("synthetic/preference", "dpo"),
        ("preference/imitated", "sft"),
        ("preference/train", "dpo"),
    ],
)
def test_the_gate_lets_the_examples_through(path: str, method: str, tmp_path: Path) -> None:
    """Prevents an example that the next command refuses."""
    model = write_tiny_model(tmp_path / "model")
    done = foundry_here(
        "data", "check", EXAMPLES / f"{path}.jsonl", f"model.name={model}", "model.template=chatml",
        f"method={method}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
