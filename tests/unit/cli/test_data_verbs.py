"""`foundry data convert` and `foundry data synth`: what a person and a program read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from model_foundry.cli import data_synth
from model_foundry.cli.data import command
from model_foundry.data.synth.writing import KINDS
from model_foundry.data.writers import WRITERS
from model_foundry.errors import DataError, UsageError


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_synth_then_convert_and_back(tmp_path: Path) -> None:
    rows, table, back = tmp_path / "rows.jsonl", tmp_path / "rows.csv", tmp_path / "back.json"
    made = invoke("synth", "instruction", "--rows", 20, "--seed", 3, "--out", rows)
    assert made.stdout == f"{rows}: 20 instruction rows, seed 3\n"
    assert invoke("convert", rows, table).stdout == f"{table}: 20 rows, alpaca\n"
    done = json.loads(invoke("convert", table, back, "--to", "messages", "--json").stdout)
    assert (done["from"], done["to"], done["rows_read"], done["rows_written"]) == ("alpaca", "messages", 20, 20)
    assert len(json.loads(back.read_bytes())) == 20


def test_losses_are_refused_and_then_said(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    invoke("synth", "kto", "--rows", 10, "--out", rows)
    refused = invoke("convert", rows, tmp_path / "out.jsonl", "--to", "messages")
    assert isinstance(refused.exception, DataError)
    assert not (tmp_path / "out.jsonl").exists()
    lines = invoke("convert", rows, tmp_path / "out.jsonl", "--to", "messages", "--lossy").stdout.splitlines()
    assert lines[0].startswith("lost in ")
    assert f"the label (as in {rows}:" in lines[0]
    assert "learned as a good one" in lines[1]
    assert lines[-1].startswith(f"{tmp_path / 'out.jsonl'}: ")


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "in" / "model.bin").write_bytes(b"")
    done = invoke("convert", tmp_path / "in", tmp_path / "out.jsonl")
    assert done.stdout.splitlines() == [
        "1 files not read: with the suffix .bin", f"{tmp_path / 'out.jsonl'}: 1 rows, text",
    ]  # fmt: skip


def test_questions_come_with_the_sets_whose_answers_are_known(tmp_path: Path) -> None:
    rows, questions = tmp_path / "rows.jsonl", tmp_path / "questions.jsonl"
    arguments = ("synth", "pattern", "--rows", 50, "--out", rows, "--heldout", questions, "--heldout-rows", 7, "--json")
    assert json.loads(invoke(*arguments).stdout) == {
        "kind": "pattern", "seed": 0, "out": str(rows), "rows": 50, "heldout": str(questions), "heldout_rows": 7,
    }  # fmt: skip
    assert len(questions.read_text().splitlines()) == 7
    refused = invoke("synth", "pattern", "--out", tmp_path / "more.jsonl", "--heldout-rows", 7)
    assert isinstance(refused.exception, UsageError), "a number of questions was passed over where no file was named"
    assert not (tmp_path / "more.jsonl").exists()


def test_the_help_names_every_kind_and_format() -> None:
    """Prevents a kind that exists and cannot be asked for."""
    assert data_synth.KINDS == KINDS
    text = " ".join(invoke("convert", "--help").stdout.split())
    assert [name for name in WRITERS if name not in text] == []
