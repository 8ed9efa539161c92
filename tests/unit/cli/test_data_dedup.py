"""`foundry data dedup`: what stays, what goes and why, and that nothing is lost when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from model_foundry.cli.main import main

ANSWER = " ".join(f"word{number}" for number in range(60))


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [("system", "Answer briefly."), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


ROWS = [
    chat("What is in the box?", ANSWER, id=0),
    chat("what is in  THE box?", ANSWER, id=1),
    chat("What is in the box?", ANSWER + " and more", id=2),
    chat("Name every word that there is", ANSWER, id=3),
    chat("Where is the box?", "On the table.", id=4),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dedup(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", "dedup", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def test_the_first_of_each_group_stays_as_it_stands_and_the_rest_is_written_down(source: Path, tmp_path: Path) -> None:
    """One answer to two questions is no duplicate; a change of case is; every row is in one of the two files."""
    done = dedup(source, "--out", tmp_path / "out.jsonl", "--dropped", tmp_path / "dropped.jsonl", "--json")
    assert done.exit_code == 0, done.output
    assert read(tmp_path / "out.jsonl") == [ROWS[0], ROWS[3], ROWS[4]]
    exact, near = read(tmp_path / "dropped.jsonl")
    assert exact == {
        "source": f"{source}:2", "reason": "exact", "similarity": 1.0, "repeats": f"{source}:1", "row": ROWS[1],
    }  # fmt: skip
    assert (near["reason"], near["repeats"], near["row"]) == ("near", f"{source}:1", ROWS[2])
    assert 0.9 < near["similarity"] < 1
    said = json.loads(done.stdout)
    assert (said["rows_read"], said["rows_kept"], said["exact_duplicates"], said["near_duplicates"]) == (5, 3, 1, 1)
    assert said["examples"] == [{"row": f"{source}:3", "repeats": f"{source}:1", "similarity": near["similarity"]}]


def test_people_read_how_many_stay(source: Path, tmp_path: Path) -> None:
    done = dedup(source, "--out", tmp_path / "out.jsonl")
    assert f"{tmp_path / 'out.jsonl'}: 3 of 5 rows kept" in done.stdout
    assert f"rows.jsonl:3 is 0.97 like {source}:1" in done.stdout


def test_the_gate_finds_no_duplicate_in_what_stays(tmp_path: Path) -> None:
    """The gate sends people here; both must mean the same by a duplicate."""
    from model_foundry.data.gate.repeats import find_repeats
    from model_foundry.data.gate.subject import comparable_text, find_shared_lines, last_question
    from model_foundry.data.rows import read_rows

    task = "Translate what follows into the dialect of the harbour, word for word, and keep every comma."
    numbers = [number // 2 for number in range(60)]
    rows = [chat(f"{task}\nthe {number} kettles of {number % 7}", f"kettle {number} " * 4) for number in numbers]
    source = write(tmp_path / "rows.jsonl", rows)
    assert dedup(source, "--out", tmp_path / "out.jsonl").exit_code == 0
    for path, num_repeats in ((source, 30), (tmp_path / "out.jsonl", 0)):
        read = read_rows(path).rows
        shared = find_shared_lines(read)
        assert shared == {task}
        questions = [last_question(row, shared) for row in read]
        found = find_repeats([comparable_text(row, shared) for row in read], questions, threshold=0.8)
        assert found.num_exact + found.num_near == num_repeats


def test_rows_that_call_tools_with_other_arguments_are_other_rows(tmp_path: Path) -> None:
    def row(city: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        turns = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": turns}

    source = write(tmp_path / "rows.jsonl", [row("Hull"), row("Oslo"), row("Hull")])
    dedup(source, "--out", tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [row("Hull"), row("Oslo")]


def test_one_field_alone(source: Path, tmp_path: Path) -> None:
    done = dedup(source, "--out", tmp_path / "out.jsonl", "--field", "id")
    assert "5 of 5 rows kept" in done.stdout
    write(source, [{"code": "a = 1", "n": 1}, {"code": "A  = 1", "n": 2}, {"code": "b = 1", "n": 1}])
    dedup(source, "--out", tmp_path / "out.jsonl", "--field", "code")
    assert [row["n"] for row in read(tmp_path / "out.jsonl")] == [1, 1]
    dedup(source, "--out", tmp_path / "out.jsonl", "--field", "n")
    assert [row["code"] for row in read(tmp_path / "out.jsonl")] == ["a = 1", "A  = 1"]


def test_a_folder_and_other_kinds_of_file(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("some words to keep here")
    (folder / "b.txt").write_text("Some words to  keep here\n")
    (folder / "c.lua").write_text("return 1")
    done = dedup(folder, "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [{"text": "some words to keep here", "path": "a.txt"}]
    assert "1 files not read" in done.stdout
    assert dedup(tmp_path / "out.json", "--out", tmp_path / "out.csv").exit_code == 0
    assert "some words to keep here" in (tmp_path / "out.csv").read_text()


@pytest.mark.parametrize(
    "lines, arguments, said",
    [
        (['{"text": "a"}', "{broken", '{"text": 3}'], [], "rows.jsonl:2"),
        (['{"text": "a"}'], ["--field", "body"], "there is no field 'body', only 'text'"),
        (['{"text": "a"}'], ["--threshold", "0"], "0.1"),
        ([], [], "no rows"),
    ],
)
def test_what_cannot_be_used_is_named_and_the_old_file_stays(
    tmp_path: Path, lines: list[str], arguments: list[str], said: str
) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    target.write_text("what was there")
    done = dedup(source, "--out", target, "--dropped", tmp_path / "dropped.jsonl", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert target.read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_files_are_never_written_over_what_is_read(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    for arguments in (
        ("--out", source),
        ("--out", tmp_path / "o.jsonl", "--dropped", source),
        ("--out", tmp_path / "o.jsonl", "--dropped", tmp_path / "o.jsonl"),
        ("--out", tmp_path / "nowhere" / "o.jsonl"),
    ):
        assert dedup(source, *arguments).exit_code == 2
    assert dedup(tmp_path, "--out", tmp_path / "out.jsonl").exit_code == 2
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_that_the_file_cannot_hold_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "a", "tags": {"n": 1}}, {"text": "b", "tags": ["x", {}]}])
    done = dedup(source, "--out", tmp_path / "out.csv")
    if done.exit_code:
        assert "rows.jsonl:" in done.stderr
        assert not (tmp_path / "out.csv").exists()
    else:
        assert "2 of 2 rows kept" in done.stdout
