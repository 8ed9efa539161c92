"""Reading rows: every format, and every way a file can be wrong, named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_foundry.data.rows import read_rows
from model_foundry.errors import DataError
from model_foundry.types import Message

USER, ASSISTANT = Message("user", "q"), Message("assistant", "a")
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, row, messages",
    [
        ("messages", {"messages": TURNS}, (USER, ASSISTANT)),
        ("messages", {"conversations": TURNS}, (USER, ASSISTANT)),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            (Message("system", "s"), USER, ASSISTANT),
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, (USER, ASSISTANT)),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["x", "y"]]},
            (
                Message("system", "s"),
                Message("user", "x"),
                Message("assistant", "y"),
                Message("user", "q\ni", {"instruction": "q", "input": "i"}),
                ASSISTANT,
            ),
        ),
        ("input_output", {"input": "q", "output": "a"}, (USER, ASSISTANT)),
        ("input_output", {"question": "q", "answer": "a", "system": "s"}, (Message("system", "s"), USER, ASSISTANT)),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, (USER, ASSISTANT)),
        ("prompt_completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, (USER, ASSISTANT)),
    ],
)
def test_each_format_is_detected_named_and_turned_into_messages(
    tmp_path: Path, name: str, row: dict[str, Any], messages: tuple[Message, ...]
) -> None:
    read = read_rows(write(tmp_path, row))
    assert read.format == name
    assert read.rows[0].messages == messages
    assert read.rows[0].source == f"{tmp_path / 'rows.jsonl'}:1"
    assert read_rows(write(tmp_path, row), format=name).rows == read.rows


def test_plain_text_rows(tmp_path: Path) -> None:
    read = read_rows(write(tmp_path, {"text": "once"}, {"text": "upon"}))
    assert read.format == "text"
    assert [row.text for row in read.rows] == ["once", "upon"]


def test_content_parts_tools_and_tool_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "f"},
    ]
    row = read_rows(write(tmp_path, {"messages": turns, "tools": [{"name": "f"}]})).rows[0]
    assert row.messages[0].content == "ab"
    assert row.messages[1] == Message("assistant", "", {"tool_calls": [call]})
    assert row.messages[2].extra == {"name": "f"}
    assert row.tools == ({"name": "f"},)


def test_fields_nothing_reads_are_counted(tmp_path: Path) -> None:
    """A column that is ignored must be told, or a misspelt "system" is lost in silence."""
    read = read_rows(write(tmp_path, {"input": "q", "output": "a", "sytem": "s"}, {"input": "q", "output": "a"}))
    assert read.ignored_fields == {"sytem": 1}


def test_byte_order_mark_blank_lines_and_crlf_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    read = read_rows(path)
    assert [row.text for row in read.rows] == ["a", "b"]
    assert read.rows[1].source.endswith(":4")


def test_a_json_array_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    assert [row.source for row in read_rows(path).rows] == [f"{path} row 1", f"{path} row 2"]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"messages": "hello"}, r"messages: text \('hello'\) where a list of messages was expected"),
        ({"messages": []}, r"messages: an empty list where at least one message was expected"),
        ({"messages": ["hi"]}, r"messages\[0\]: text \('hi'\) where an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: nothing where text was expected"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\.content: a number \(5\) where text"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: null where text"),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            r"messages\[0\]\.role: text \('usr'\) where one of system, user",
        ),
        ({"messages": [{"role": None, "content": "x"}]}, r"messages\[0\]\.role: null where text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\]\.content\[0\]: an object where a text part",
        ),
        ({"messages": TURNS, "tools": "f"}, r"tools: text \('f'\) where a list of objects"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            r"conversations\[0\]\.from: text \('alien'\) where one of",
        ),
        ({"conversations": [{"from": "human", "value": 1}]}, r"conversations\[0\]\.value: a number \(1\) where text"),
        ({"instruction": 1, "output": "a"}, r"instruction: a number \(1\) where text"),
        ({"instruction": "q", "output": ["a"]}, r"output: a list where text"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, r"history\[0\]: a list where a pair"),
        ({"input": "q", "output": True}, r"output: true or false \(True\) where text"),
        ({"question": "q", "answer": None}, r"answer: null where text"),
        ({"prompt": "q", "completion": 1}, r"completion: a number \(1\) where text or a list of messages"),
        ({"prompt": "q", "completion": []}, r"completion: an empty list"),
        ({"text": ""}, r"text: an empty text where at least one character"),
        ({"text": 3.5}, r"text: a number \(3\.5\) where text"),
        ({"input": "q", "output": "a", "system": 1}, r"system: a number \(1\) where text"),
    ],
)
def test_wrong_fields_are_named_with_what_was_there_and_what_was_expected(
    tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    path = write(tmp_path, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: {problem}"):
        read_rows(path)


def test_up_to_ten_wrong_rows_are_named_and_all_counted(tmp_path: Path) -> None:
    """Stopping at the first wrong row costs one run per row to clean a file."""
    rows = [{"text": "ok"}, *({"text": number} for number in range(30))]
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, *rows))
    message = str(caught.value)
    assert "30 of 31 rows" in message
    assert "rows.jsonl:2:" in message
    assert "rows.jsonl:11:" in message
    assert "rows.jsonl:12:" not in message
    assert "and 20 more" in message


def test_a_row_of_another_format_than_the_first_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":2: text: nothing where text was expected \(format text\)"):
        read_rows(write(tmp_path, {"text": "a"}, {"messages": TURNS}))


def test_fields_of_no_format_list_the_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'foo', 'bar'.*data\.format.*sharegpt"):
        read_rows(write(tmp_path, {"foo": 1, "bar": 2}))


def test_an_unknown_format_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row format 'chat'.*sharegpt"):
        read_rows(write(tmp_path, {"text": "a"}), format="chat")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: there is no such file"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(path)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r":2: not UTF-8: byte 0xe9 at offset 13"),
        (b'{"text": "a"}\n{"text": "b', r":2: the last line is cut off or not JSON"),
        (b'{"text": "a"}\n{"text": }\n', r":2: not JSON"),
        (b'{"text": "a"}\n["a"]\n', r":2: a list where an object was expected"),
        (b'{"text": "a"}\nnull\n', r":2: null where an object was expected"),
        (b'{"text": "a"}\n"b"\n', r":2: text \('b'\) where an object was expected"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r":2: not JSON"),
        (b'{"text": "a"}\n' + b"[" * 5000 + b"\n", r":2: not JSON"),
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08\x00", "compressed or binary"),
        (b"[1, 2", "not a JSON array"),
    ],
)
def test_bytes_that_are_not_rows_are_errors_with_their_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_rows(path)


def test_a_ten_megabyte_row_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "word " * 2_000_000}, {"text": "b"})
    assert [len(row.text or "") for row in read_rows(path).rows] == [10_000_000, 1]
