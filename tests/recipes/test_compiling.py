"""Layers compiled where it pays or is asked for: the same bits again, the same curve, and the decision written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ModelError
from model_foundry.models.compiled import compile_obstacle
from model_foundry.models.language_model import NativeModel, load_language_model
from model_foundry.recipes.compiling import Compiling, choose_compiling
from model_foundry.recipes.corpus import prepare_corpus
from model_foundry.recipes.training_run import run_training
from model_foundry.run.directory import RunDirectory, utc_now
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import losses
from tests.tiny_text import tiny_experiment


def experiment(folder: Path, tokenizer: Path, compile_layers: str, **changes: Any) -> ExperimentConfig:
    return tiny_experiment(folder, tokenizer=tokenizer, training__compile=compile_layers, **changes)


def chosen(config: ExperimentConfig, *, seconds: float, before: dict[str, Any] | None = None) -> Compiling:
    work = prepare_corpus(config, now=utc_now())
    engine = TorchEngine(**work.engine_options())
    model_id = engine.create_model(work.source.folder, lora=None)
    found = choose_compiling(work, engine, model_id, seconds=seconds, before=before)
    assert found is not None
    model = engine.language_model(model_id)
    assert isinstance(model, NativeModel)
    assert bool(model.decoder.compiled_layers) == found.on
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_run_repeats_to_the_bit_and_learns_the_same(chatml_folder: Path, tmp_path: Path) -> None:
    """Kernels that depend on the steps before would make a resumed run another one; the last batch is a shorter one."""
    runs = {
        how: experiment(
            tmp_path / how, chatml_folder, how, training__max_steps=None, training__epochs=1.0,
            training__batch_size=16, criteria={"below_unigram": None, "replay_steps": 2},
        )
        for how in ("off", "on")
    }  # fmt: skip
    for how, config in runs.items():
        report = run_training(config)
        assert report.verdict == "passed", report.checks
        assert RunDirectory.read(config.run_dir).facts["compiling"] == {"on": how == "on", "why": "as asked"}
    assert losses(runs["on"].run_dir) == pytest.approx(losses(runs["off"].run_dir), rel=1e-4)
    assert "compile     on: as asked" in (runs["on"].run_dir / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_auto_measures_where_the_run_is_long_and_a_resumed_run_does_not(chatml_folder: Path, tmp_path: Path) -> None:
    config = experiment(tmp_path, chatml_folder, "auto")
    measured = chosen(config, seconds=1e9)
    assert "s compiled and" in measured.why
    assert "compiling took" in measured.why
    assert chosen(config, seconds=1e9, before={"on": True, "why": "…"}) == Compiling(True, "as this run was begun")


def test_a_short_run_is_not_compiled_and_says_so(chatml_folder: Path, tmp_path: Path) -> None:
    config = experiment(tmp_path, chatml_folder, "auto")
    assert chosen(config, seconds=30) == Compiling(False, "the run takes about 30 s, too short for compiling to pay")
    assert not chosen(config, seconds=1e9, before={"on": False, "why": "…"}).on


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_the_layers_as_they_are(
    chatml_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` must train on, by layers that work."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(compiler),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    wide = experiment(tmp_path, chatml_folder, "auto", model__hidden_size=48)  # kernels that no test has compiled yet
    found = chosen(wide, seconds=1e9)
    assert not found.on
    assert "torch.compile failed" in found.why


def test_a_compiler_that_is_missing_is_named(
    chatml_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`on` must not train uncompiled, and `auto` must not fail."""
    monkeypatch.setenv("CXX", "nowhere/g++-99")
    found = chosen(experiment(tmp_path, chatml_folder, "auto"), seconds=1e9)
    assert found == Compiling(False, "torch.compile needs a C++ compiler, and nowhere/g++-99 is not found")
    with pytest.raises(ModelError, match=r"nowhere/g\+\+-99 is not found") as error:
        run_training(experiment(tmp_path, chatml_folder, "on"))
    assert "training.compile=off" in (error.value.hint or "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, changes, words",
    [("qwen3-moe", {}, "expert"), ("llama", {"attention_dropout": 0.1}, "dropout")],
)  # fmt: skip
def test_what_would_be_compiled_at_every_step_is_refused(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = load_language_model(write_tiny_model(tmp_path / "model", kind, **changes), dtype=torch.float32)
    assert isinstance(model, NativeModel)
    obstacle = compile_obstacle(model.decoder, torch.device("cpu"))
    assert obstacle is not None
    assert words in obstacle[0]
    with pytest.raises(ModelError, match=words):
        model.compile_layers(True)
