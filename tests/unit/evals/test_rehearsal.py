"""A suite that cannot be asked is found out without a model, and every one that can is left alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_foundry.errors import DataError, MissingExtraError, UsageError
from model_foundry.evals import text_scores
from model_foundry.evals.rehearsal import rehearse
from model_foundry.evals.suite import Suite, builtin_suites, load_suite
from model_foundry.evals.targets import MAX_BATCH_TOKENS, RowTooLongError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def renderer(tiny_folder: TinyFolder) -> Renderer:
    return Renderer(Tokenizer.load(tiny_folder("llama")), "chatml")


def suite_of(folder: Path, rows: list[Any], **changes: Any) -> Suite:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(yaml.safe_dump({"rows": "rows.jsonl"} | changes))
    return load_suite(str(folder / "mine.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", builtin_suites())
def test_every_suite_that_comes_along_can_be_asked(name: str, renderer: Renderer) -> None:
    rehearse(load_suite(name), renderer, context=8192)


@pytest.mark.parametrize("kind, row, metrics", [
    ("answers", {"prompt": "why? " * 30, "answer": "so"}, ["f1"]),
    ("choices", {"prompt": "why?", "choices": ["so " * 60, "no"], "answer": 0}, ["margin"]),
    ("consistency", {"prompts": ["why?", "why? " * 30]}, ["batch_agreement"]),
    ("pairs", {"prompt": "why {group}? " * 10, "groups": ["he", "she"], "favourable": "a", "unfavourable": "b"},
     ["likelihood_bias"]),
    ("safety", {"prompt": "why? " * 30, "unsafe": True}, ["refusal"]),
])  # fmt: skip
def test_a_row_that_does_not_fit_is_found(
    kind: str, row: dict[str, Any], metrics: list[str], renderer: Renderer, tmp_path: Path
) -> None:
    """Prevents the news that a suite's last row is too long from coming after the training."""
    suite = suite_of(tmp_path, [row], kind=kind, metrics=metrics, decoding={"max_new_tokens": 8, "temperature": 1})
    rehearse(suite, renderer, context=2048)
    with pytest.raises(RowTooLongError, match="context of 100"):
        rehearse(suite, renderer, context=100)


def test_a_text_without_a_token_to_begin_with_is_found(
    renderer: Renderer, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    (tmp_path / "rows.txt").write_text("It was a dark and stormy night.")
    (tmp_path / "prose.yaml").write_text(yaml.safe_dump({"kind": "text", "rows": "rows.txt"}))
    suite = load_suite(str(tmp_path / "prose.yaml"))
    rehearse(suite, renderer, context=200)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        values = json.loads((tiny_folder("llama") / name).read_text())
        values.pop("eos_token", None)
        (folder / name).write_text(json.dumps(values))
    with pytest.raises(DataError, match="neither BOS nor end-of-text"):
        rehearse(suite, Renderer(Tokenizer.load(folder), "chatml"), context=200)


def test_what_is_not_installed_is_found(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a training whose suite asks for a package that is not there, told hours later."""
    suite = suite_of(tmp_path, [{"prompt": "why?", "answer": "so"}], metrics=["rouge_l"])
    text_scores._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtraError, match="rouge-score"):
        rehearse(suite, renderer, context=200)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"kind": "harness", "tasks": ["arc_easy"]}))
    with pytest.raises(UsageError, match="lm-evaluation-harness is not installed"):
        rehearse(load_suite(str(tmp_path / "tasks.yaml")), renderer, context=200)


@pytest.mark.parametrize("choices, refused", [
    (["yes", "yes, it does"], True), (["120", "12"], True), (["a", "a dog", "c"], True),
    (["yes.", "yes, it does."], False), (["no", "yes"], False),
])  # fmt: skip
def test_a_choice_whose_tokens_begin_anothers_is_refused(
    choices: list[str], refused: bool, renderer: Renderer, tmp_path: Path
) -> None:
    """Prevents a question that every model answers with the shorter ending, for its likelihood is a factor of the
    longer one's."""
    rows = [{"prompt": "?", "choices": choices, "answer": 0}]
    suite = suite_of(tmp_path, rows, kind="choices", metrics=["accuracy"])
    if not refused:
        rehearse(suite, renderer, context=200)
        return
    with pytest.raises(DataError, match=r"begin those of.*likelier whatever") as found:
        rehearse(suite, renderer, context=200)
    assert found.value.where == "suite mine, rows.jsonl:1"
    rehearse(suite_of(tmp_path, rows, kind="choices", metrics=["accuracy_per_byte"]), renderer, context=200)


def test_choices_whose_tokens_part_are_weighed_although_their_letters_do_not(
    renderer: Renderer, chatml_folder: Path, tmp_path: Path
) -> None:
    """Prevents the refusal of numbers that are a token each."""
    rows = [{"prompt": "?", "choices": ["2", "23"], "answer": 0}]
    suite = suite_of(tmp_path, rows, kind="choices", metrics=["accuracy", "margin"])
    rehearse(suite, Renderer(Tokenizer.load(chatml_folder)), context=200)
    with pytest.raises(DataError, match="the tokens of '2' begin those of '23'"):
        rehearse(suite, renderer, context=200)  # this one has a token a character


def test_what_is_held_at_once_is_counted(renderer: Renderer, tmp_path: Path) -> None:
    """Prevents a plan that counts the training's batch alone, and is far off where the questions need more."""
    rows = [{"prompt": "why? " * number, "answer": "so"} for number in range(1, 8)]
    suite = suite_of(tmp_path, rows, metrics=["f1"], decoding={"max_new_tokens": 30})
    lengths = [len(renderer.prompt(row.prompts[0])) for row in suite.rows]
    asked = rehearse(suite, renderer, context=None, batch_size=3)
    assert asked.sampled == tuple(length + 30 for length in lengths[:-4:-1])
    assert asked.read == ()

    rows = [{"prompt": "why? " * 40, "choices": ["so it is", "no"], "answer": 0} for _ in range(9)]
    asked = rehearse(suite_of(tmp_path, rows, kind="choices"), renderer, context=None)
    assert asked.sampled == ()
    assert 0.8 * MAX_BATCH_TOKENS < sum(asked.read) <= MAX_BATCH_TOKENS
    assert max(asked.read) > len(renderer.prompt(suite.rows[0].prompts[0]))
