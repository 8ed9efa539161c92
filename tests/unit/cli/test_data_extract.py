"""`foundry data extract`: what a person and a program read, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model_foundry.cli.data_extract import command
from model_foundry.errors import DataError, FoundryError, UsageError

ROOT = Path(__file__).parents[3]
CODE = ROOT / "examples" / "code"


def extract(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def facts(*arguments: object) -> dict[str, object]:
    result = extract(*arguments, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def raised(*arguments: object) -> FoundryError:
    error = extract(*arguments).exception
    assert isinstance(error, FoundryError)
    return error


def test_a_domain_reads_its_fixtures_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = facts(ROOT / "configs" / "domains" / "avorion_lua.yaml", "--out", "new/units.jsonl")
    assert (found["language"], found["num_files"], found["num_units"]) == ("lua", 3, 24)
    assert found["kinds"] == {"callback": 13, "function": 9, "method": 2}
    rows = [json.loads(line) for line in Path("new/units.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    by_name = {row["name"]: row for row in rows}
    secured = by_name["Ambush.secure"]
    assert secured["kind"] == "callback", "what the engine calls by name is the domain's to say"
    assert secured["code"] in (CODE / "lua" / secured["path"]).read_text()
    assert set(secured) == {
        "path", "language", "kind", "name", "code", "comment", "first_line", "last_line", "sha256", "context"
    }  # fmt: skip


def test_folders_go_before_the_domain_s_own(tmp_path: Path) -> None:
    (tmp_path / "a.gd").write_text("signal only(a)\n\n\nfunc f():\n\tpass\n")
    (tmp_path / "b.gd").write_bytes(b"\0\1")
    found = facts(ROOT / "configs" / "domains" / "gdscript.yaml", tmp_path)
    assert (found["num_files"], found["kinds"]) == (1, {"signal": 1, "function": 1})
    assert found["skipped_files"] == {"binary file": 1}
    assert found["examples"] == {"binary file": ["b.gd"]}


def test_the_language_is_that_of_the_files(tmp_path: Path) -> None:
    assert facts(CODE / "gdscript")["language"] == "gdscript"
    assert facts(CODE / "lua", "corpus.min_lines=1")["language"] == "lua"
    error = raised(CODE)
    assert isinstance(error, UsageError)
    assert "3 files of lua, 3 files of gdscript" in str(error)
    assert facts(CODE, "--language", "lua")["num_files"] == 3
    assert "no file of lua or gdscript" in str(raised(tmp_path))


def test_the_table_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.lua").write_text("function a()\n  return 1\nend\nfunction b() end\nfunction c(\n")
    (tmp_path / "latin.lua").write_bytes("-- é\nfunction d()\n  return 1\nend\n".encode("cp1252"))
    lines = extract(tmp_path).stdout.splitlines()
    assert lines[1].startswith("files        2 read, 0.00 MB in")
    assert "1 with syntax errors (50.0%)" in lines[2]
    assert lines[3] == "encodings    cp1252 1, the rest utf-8"
    assert lines[4] == "units        2: function 2"
    assert "left out     1 units: under 3 lines (as a.lua:4 b)" in lines
    assert any(line.startswith("left out     1 units: syntax error (as a.lua:5") for line in lines)


def test_nothing_found_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    """A mistyped folder must not replace an hour's extraction by an empty file."""
    out = tmp_path / "units.jsonl"
    out.write_text("kept\n")
    (tmp_path / "empty.lua").touch()
    error = raised(tmp_path, "--language", "lua", "--out", out)
    assert isinstance(error, DataError)
    assert "no lua file could be read (left out 1: empty file)" in str(error)
    assert "no unit of lua meets the rules" in str(raised(CODE / "lua", "corpus.min_lines=150", "--out", out))
    assert out.read_text() == "kept\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no CONFIG and no FOLDER is given"),
        (["/no/such/folder"], "/no/such/folder: there is no such folder or file"),
        ([CODE / "lua", "corpus.kinds=[klass]"], "lua has no units of kind klass"),
        ([CODE / "lua", "corpus.langauge=lua"], "Did you mean corpus.language?"),
        ([CODE / "lua", "--language", "lau"], "the language lau is not built in"),
        ([CODE / "lua", "--out", "/proc/none/units.jsonl"], "the file cannot be written"),
        (["gone.yaml"], "there is no such file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[object], words: str) -> None:
    error = raised(*arguments)
    assert words in str(error)
    assert error.exit_code == 2
