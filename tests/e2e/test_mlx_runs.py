"""A run on MLX by the command line: the recipe's own, on the same files, going on after a kill to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="MLX has no build for this machine")

from model_foundry.tokenizer import Tokenizer
from tests.tiny_runs import assert_one_paragraph, foundry, foundry_here, losses, write_project, write_questions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BOUND = 1e-3
"""Largest relative difference of a step's loss from torch's, float32, over the whole run."""


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For both engines: MLX takes no number of threads."""
    folder = tmp_path_factory.mktemp("mlx")
    training = {"max_steps": 24, "learning_rate": 0.02, "save_steps": 8}
    return write_project(
        folder, model=model, training=training, evaluation__file=str(write_questions(folder / "questions.jsonl")),
        criteria__loss_fall=0.05, criteria__parameters_changed=0.8, criteria__replay_steps=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    done = foundry_here("train", config, "engine=mlx", f"run_dir={config.parent / 'mlx'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return config.parent / "mlx"


def test_the_run_says_its_engine_and_its_loss_is_torchs(run: Path, config: Path) -> None:
    """`engine: mlx` that quietly trains by torch would give the very same curve."""
    assert json.loads((run / "run.json").read_text())["engine"] == "mlx"
    first_lines = "\n".join((run / "run.log").read_text().splitlines()[:12])
    assert "by mlx, float32 on cpu" in first_lines, first_lines
    facts = json.loads((run / "checkpoints" / "final" / "state" / "engine.json").read_text())
    assert facts["engine"] == "mlx"
    done = foundry_here("train", config, "engine=torch", f"run_dir={config.parent / 'torch'}")
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = losses(run), losses(config.parent / "torch")
    assert theirs[-1] < 0.5 * theirs[0]
    assert np.allclose(mine, theirs, rtol=BOUND), np.max(np.abs(np.array(mine) / theirs - 1))


def test_its_adapter_is_read_by_torch_and_its_merged_model_by_mlx_lm(run: Path, tmp_path: Path) -> None:
    """Three readers of one result: a wrong scale or a rotation by pairs shows in the answers."""
    question = "prompt=Colour of the owl? "
    answers = [foundry_here("chat", run, question, f"engine={engine}") for engine in ("mlx", "torch")]
    assert [done.returncode for done in answers] == [0, 0], answers
    assert answers[0].stdout == answers[1].stdout
    done = foundry_here("export", run, "--to", "merged", "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stdout + done.stderr

    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    shape = json.loads((tmp_path / "merged" / "config.json").read_text())
    model = Model(ModelArgs.from_dict(shape))
    weights: dict[str, mx.array] = mx.load(str(tmp_path / "merged" / "model.safetensors"))  # pyright: ignore
    model.load_weights(list(model.sanitize(weights).items()))
    tokenizer = Tokenizer.load(tmp_path / "merged")
    ids = tokenizer.encode(
        "<|im_start|>user\nColour of the owl? <|im_end|>\n<|im_start|>assistant\n", parse_special=True
    )
    said: list[int] = []
    while len(said) < 16 and 2 not in said:
        said.append(int(np.array(mx.argmax(model(mx.array([[*ids, *said]]))[0, -1]))))
    assert tokenizer.decode(said, skip_special=True).strip() == answers[0].stdout.strip()


def test_killed_and_resumed_is_the_same_to_the_last_bit(config: Path) -> None:
    done = foundry("verify", "resume", config, "engine=mlx", "--kills", 2, "--json", timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check["passed"] for check in json.loads(done.stdout)["checks"]}
    assert checks == dict.fromkeys(checks, True)
    assert {"final_checkpoint_identical", "metrics_identical", "kills_done"} <= checks.keys()


def test_a_run_goes_on_by_the_engine_that_began_it(run: Path, config: Path, tmp_path: Path) -> None:
    """Moments of one engine are not another's: `engine: auto` must not choose anew in the middle of a run."""
    begun = tmp_path / "run"
    done = foundry_here("train", config, f"run_dir={begun}")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(begun / "checkpoints" / "final")
    record = json.loads((begun / "run.json").read_text())
    assert record["engine"] == "torch"
    (begun / "run.json").write_text(json.dumps(record | {"engine": "mlx"}))
    assert_one_paragraph(foundry_here("resume", begun), code=3, words=("written by the engine 'torch'",))


@pytest.mark.parametrize(
    ("field", "words"),
    [("training.num_threads=2", "training.num_threads"), ("model.quantization=nf4", "quantization"),
     ("model.attention=sdpa", "attention")],
)  # fmt: skip
def test_what_mlx_lacks_is_refused_before_there_is_a_run(field: str, words: str, config: Path, tmp_path: Path) -> None:
    done = foundry_here("train", config, "engine=mlx", field, f"run_dir={tmp_path / 'run'}")
    assert_one_paragraph(done, code=2, words=("the engine mlx has no", words, "engine=torch"))
    assert not (tmp_path / "run").exists()
