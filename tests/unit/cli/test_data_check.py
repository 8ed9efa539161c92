"""`foundry data check` and `foundry data inspect`: exit codes, what a program reads, what a person reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from model_foundry.cli.data_check import rendering_progress
from tests.tiny_runs import assert_one_paragraph, chat_row, foundry_here, write_jsonl

CLEAN = [chat_row(f"How many legs have {n} beetles?", f"They have {6 * n}.") for n in range(1, 12)]
HOSTILE = chat_row("<script>alert(1)</script> \x1b[31m\u202e 🎉 數", "</div>&amp;\n\t[bold]no[/bold]")


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", CLEAN)


def test_clean_rows_give_0_and_what_was_measured(rows: Path, model: Path) -> None:
    done = foundry_here("data", "check", rows, f"model={model}", "model.template=chatml")
    assert done.returncode == 0, done.stderr
    assert "all 18 checks passed" in done.stdout
    assert "11 rows of format messages" in done.stdout


def test_a_refusal_gives_1_and_names_the_rows(rows: Path, model: Path, tmp_path: Path) -> None:
    write_jsonl(rows, [*CLEAN, chat_row("And a spider?", "")])
    report = tmp_path / "verdict.json"
    done = foundry_here("data", "check", rows, f"model={model}", "model.template=chatml", "--json", "--report", report)
    assert done.returncode == 1
    verdict = json.loads(done.stdout)
    assert verdict == json.loads(report.read_text())
    failed = [check for check in verdict["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["turns_filled"]
    assert failed[0]["examples"][0]["where"] == f"{rows}:12"
    assert set(failed[0]) == {"name", "passed", "value", "bound", "evidence", "examples"}
    said = foundry_here("data", "check", rows, f"model={model}", "model.template=chatml").stdout
    assert "FAIL  turns filled" in said
    assert f"{rows}:12: messages[1] (assistant) has no text | And a spider?" in " ".join(said.split())
    assert "refused: 1 of 18 checks failed" in said


def test_a_configuration_says_all_there_is_to_know(rows: Path, model: Path, tmp_path: Path) -> None:
    """The file's own settings hold, thresholds and held-out rows among them, and key=value still wins."""
    write_jsonl(tmp_path / "held.jsonl", CLEAN[:2])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{name: {model}, template: chatml}}\ndata: {{train_file: rows.jsonl, validation_file: held.jsonl}}\n"
    )
    done = foundry_here("data", "check", config, "--json")
    assert done.returncode == 1, done.stdout
    verdict = json.loads(done.stdout)
    assert [check["name"] for check in verdict["checks"] if not check["passed"]] == ["apart_from_validation"]
    assert foundry_here("data", "check", config, "gate.max_overlap_share=1").returncode == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.jsonl"], ("nowhere.jsonl",)),
        ([], ("data.train_file",)),
        (["rows.jsonl", "model=no/such/folder"], ("no/such/folder",)),
        (["rows.jsonl", "gate.max_lost=1"], ("gate.max_lost", "gate.max_lost_share")),
        (["rows.jsonl", "other.jsonl"], ("one at a time",)),
    ],
)
def test_what_cannot_be_looked_at_gives_2(
    arguments: list[str], words: tuple[str, ...], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    assert_one_paragraph(foundry_here("data", "check", *arguments), code=2, words=words)


def test_the_inspector_shows_rows_in_the_terminal(rows: Path, model: Path) -> None:
    """Without colours what is trained stands between marks, and nothing in a row moves the cursor."""
    write_jsonl(rows, [HOSTILE, *CLEAN])
    done = foundry_here("data", "inspect", rows, f"model={model}", "model.template=chatml", "--rows", "3")
    assert done.returncode == 0, done.stderr
    assert "3 of 12 rows" in done.stdout
    assert "⟦They have 66.<|im_end|>⟧" in done.stdout
    assert "[bold]no[/bold]" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout


def test_the_inspector_looks_at_rows_that_the_gate_refuses(rows: Path, model: Path, tmp_path: Path) -> None:
    rows.write_bytes(rows.read_bytes() + b'{"messages": [{"role": "us')
    page = tmp_path / "page.html"
    done = foundry_here("data", "inspect", rows, f"model={model}", "model.template=chatml", "--html", page)
    assert done.returncode == 0, done.stderr
    assert "1 of 18 checks failed" in done.stdout
    assert "cannot be read" in done.stdout
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_what_the_inspector_found_is_json(rows: Path, model: Path) -> None:
    done = foundry_here("data", "inspect", rows, f"model={model}", "model.template=chatml", "--json", "--rows", "2")
    shown = json.loads(done.stdout)
    assert [row["source"] for row in shown["rows"]] == [f"{rows}:1", f"{rows}:11"]
    first = shown["rows"][0]["tokens"]
    assert "".join(token["text"] for token in first if token["is_trained"]) == "They have 6.<|im_end|>"
    assert [token["text"] for token in first if token["is_special"]] == ["<|im_start|>", "<|im_end|>"] * 2
    assert shown["gate"]["passed"] is True


def test_progress_is_said_where_it_takes_longer_than_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a minute of silence over a large file, and a bar that flashes over a small one."""
    with rendering_progress(patience_seconds=0.0) as on_progress:
        on_progress(0, 10)
        on_progress(10, 10)
    assert "rows 10/10" in capsys.readouterr().err
    with rendering_progress() as on_progress:
        on_progress(0, 10)
        on_progress(10, 10)
    assert capsys.readouterr().err == ""


def test_a_tokenizer_is_enough_where_no_weights_are_needed(rows: Path, chatml_folder: Path) -> None:
    """Prevents data from being judged only where a whole model lies."""
    assert not (chatml_folder / "config.json").exists()
    assert foundry_here("data", "check", rows, f"model={chatml_folder}").returncode == 0
