"""The gate on the way into a run: what it refuses is not trained on, what it lets in is in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_foundry.models.cache import entry_folder, usable
from tests.tiny_runs import COLOURS, assert_one_paragraph, chat_row, foundry, foundry_here, write_jsonl, write_project

ROOT = Path(__file__).parents[2]
GOOD = [chat_row(f"Colour of {name}? ", colour) for name, colour in COLOURS.items()]


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_project(tmp_path, model=model, training__max_steps=2)


def spoil(config: Path) -> Path:
    """An empty answer in line 9 and a control token in line 10."""
    bad = [chat_row("Colour of the owl's egg? ", " "), chat_row("Colour of <|im_end|>? ", "none")]
    return write_jsonl(config.parent / "train.jsonl", [*GOOD, *bad])


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_run_on_refused_rows_does_not_begin(flags: tuple[str, ...], config: Path) -> None:
    """Prevents hours spent on data that is wrong, and a run's folder that is in the way afterwards."""
    rows = spoil(config)
    words = ("turns_filled", f"{rows}:9", "control_tokens", f"{rows}:10", "foundry data check", "gate.action=warn")
    assert_one_paragraph(foundry_here("train", config, *flags), code=1, words=words)
    assert not (config.parent / "run").exists()


def test_with_a_warning_it_is_trained_on_and_recorded(config: Path) -> None:
    """Prevents a gate that is switched off in silence."""
    rows = spoil(config)
    done = foundry_here("train", config, "gate.action=warn")
    assert done.returncode == 0, done.stderr
    assert f"the gate would refuse {rows}: turns_filled" in done.stderr
    report = json.loads((config.parent / "run" / "report.json").read_bytes())
    gate = report["gate"]
    assert (gate["action"], gate["passed"]) == ("warn", False)
    assert [check["name"] for check in gate["checks"] if not check["passed"]] == ["turns_filled", "control_tokens"]
    assert any("gate.action=warn" in note for note in report["notes"])
    page = (config.parent / "run" / "report.html").read_text()
    assert "<h2>Data gate</h2>" in page
    assert "train.jsonl:9" in page


def test_what_passed_is_in_the_plan_and_the_report(config: Path) -> None:
    plan = json.loads(foundry_here("train", config, "--dry-run", "--json").stdout)
    assert plan["gate"]["passed"] is True
    assert "18 checks passed" in foundry_here("train", config, "--dry-run").stdout
    assert foundry_here("train", config).returncode == 0
    report = json.loads((config.parent / "run" / "report.json").read_bytes())
    assert [check["name"] for check in report["gate"]["checks"]] == [check["name"] for check in plan["gate"]["checks"]]
    assert "All 18 checks passed" in (config.parent / "run" / "report.html").read_text()


def test_a_stricter_gate_does_not_make_it_another_run(config: Path) -> None:
    """Thresholds decide what is let in, not what is computed: a run goes on under others."""
    assert foundry_here("train", config).returncode == 0
    done = foundry_here("train", config, "--resume", "auto", "gate.max_lost_share=0.5")
    assert done.returncode == 0, done.stderr


def test_control_tokens_are_let_through_where_the_configuration_says_so(config: Path) -> None:
    write_jsonl(config.parent / "train.jsonl", [*GOOD, chat_row("Colour of <|im_end|>? ", "none")])
    assert foundry_here("train", config).returncode == 1
    assert foundry_here("train", config, "data.allow_control_tokens=true").returncode == 0


def test_the_check_is_a_command_of_its_own(config: Path) -> None:
    rows = spoil(config)
    done = foundry("data", "check", config, "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["passed"] is False
    write_jsonl(rows, GOOD)
    assert foundry("data", "check", config).returncode == 0


def test_the_demo_passes_as_shipped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a demo that our own gate refuses; with the real tokenizer where the model is in the cache."""
    monkeypatch.chdir(ROOT)
    own = usable(entry_folder("smollm2-135m-instruct")) is not None
    others = () if own else (f"model={model}", "model.template=chatml", "data.max_length=512")
    done = foundry_here("data", "check", "examples/demo/demo.yaml", *others)
    assert done.returncode == 0, done.stdout


def test_changed_rows_are_told_from_refused_ones(config: Path) -> None:
    """A run that goes on is told first that its rows are others now; whether those are good is the next question."""
    assert foundry_here("train", config, "training.max_steps=4").returncode == 0
    run = config.parent / "run"
    (run / "report.json").unlink()
    spoil(config)
    assert_one_paragraph(foundry_here("resume", run), code=2, words=("train_file", "has changed"))
