"""Tier 1: the whole way on a random model that is written on the spot. Nothing is fetched; under half a minute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_foundry.config.load import config_digest, dump_yaml, load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message
from tests.tiers.record import Tier, require
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import foundry_here, write_project, write_questions

LIMIT_SECONDS = 30
PROFILES = ("chat", "instruction", "code")
CUSTOM = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def run(tier: Tier) -> None:
    folder = tier.folder
    model = tier.step("write a random model", lambda: _model(folder))
    tier.step("profiles, saved and read again", lambda: _profiles(folder))
    if model is None:
        return
    tier.step("synthetic rows, converted and checked", lambda: _rows(folder, model))
    tier.step("templates: alpaca, chatml, llama3, one of our own", lambda: _templates(folder, model))
    questions = write_questions(folder / "questions.jsonl")
    config = write_project(
        folder / "project", model=model, evaluation__file=str(questions), evaluation__max_new_tokens=8,
        training__max_steps=40, criteria={"loss_fall": 0.05, "parameters_changed": 0.8, "memory_saving": None,
                                          "answers_improved": 0.3, "replay_steps": 4},
    )  # fmt: skip
    run_dir = folder / "project" / "run"
    tier.step("plan: steps, memory, disk", lambda: _plan(config))
    if tier.step("train, prove, report", lambda: _said("train", config)) is None:
        return
    tier.num_runs += 1
    tier.take_checks(
        run_dir, required=("loss_fall", "answers_improved", "parameters_changed", "artefacts_load", "replay_identical")
    )
    tier.step("go on with a finished run: nothing to do", lambda: _said("resume", run_dir))
    tier.step("chat with it", lambda: _chat(run_dir))
    tier.step("export a merged model that equals the adapter", lambda: _export(run_dir, folder))


def _said(*arguments: object) -> str:
    done = foundry_here(*arguments)
    require(done.returncode == 0, f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _model(folder: Path) -> Path:
    return write_tiny_model(folder / "model", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)


def _profiles(folder: Path) -> None:
    for profile in PROFILES:
        path = folder / f"{profile}.yaml"
        path.write_text(f"inherits: {profile}\nrun_dir: {folder}/run\n")
        config = load_config(TrainConfig, path=path).config
        (folder / "again.yaml").write_text(dump_yaml(config))
        again = load_config(TrainConfig, path=folder / "again.yaml").config
        require(config_digest(config) == config_digest(again), f"{profile} is another after saving and reading")


def _templates(folder: Path, model: Path) -> None:
    (folder / "own.jinja").write_text(CUSTOM)
    llama = folder / "llama3-tokenizer"
    _said("tokenizer", "train", folder / "messages.jsonl", "--vocab-size", 300, "--template", "llama3", "--out", llama)
    for template in ("alpaca", "chatml", "llama3", str(folder / "own.jinja")):
        tokenizer = Tokenizer.load(llama if template == "llama3" else model)
        row = Renderer(tokenizer, template).render([Message("user", "Where?"), Message("assistant", "Here.")])
        trained = tokenizer.decode(row.tokens[row.weights > 0], skip_special=True)
        require(trained.strip().startswith("Here.") and "Where" not in trained, f"{template} trains {trained!r}")


def _rows(folder: Path, model: Path) -> None:
    _said("data", "synth", "instruction", "--rows", 50, "--out", folder / "rows.jsonl")
    _said("data", "convert", folder / "rows.jsonl", folder / "messages.jsonl", "--to", "messages")
    _said("data", "check", folder / "messages.jsonl", f"model.name={model}", "model.template=chatml")


def _plan(config: Path) -> None:
    plan: dict[str, Any] = json.loads(_said("train", config, "--dry-run", "--json"))
    require(plan["steps"] == 40 and plan["memory"]["total"] > 0 and plan["disk_bytes"] > 0, f"the plan is {plan}")


def _chat(run_dir: Path) -> None:
    answer = _said("chat", run_dir, "prompt=Colour of the owl? ").strip()
    require(answer == "brown", f"it answers {answer!r}, and was taught 'brown'")


def _export(run_dir: Path, folder: Path) -> None:
    certificate = json.loads(_said("export", run_dir, "--to", "merged", "--out", folder / "merged", "--json"))
    require(all(check["passed"] for check in certificate["checks"]), "a check of the certificate failed")
