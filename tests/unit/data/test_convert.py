"""Conversion: what one format holds comes back from another the same, and what it cannot hold is refused by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.convert import convert_rows
from model_foundry.data.fields import FieldError
from model_foundry.data.files import iter_records
from model_foundry.data.formats import PARSERS
from model_foundry.data.rows import Row, read_rows
from model_foundry.data.writers import WRITERS, differences
from model_foundry.errors import DataError
from model_foundry.types import Message

CALL = {"type": "function", "function": {"name": "bmi", "arguments": {"kg": 70, "m": 1.8}}}
TOOLS = ({"name": "bmi", "description": "d", "parameters": {"type": "object", "properties": {"kg": {}}}},)
Q, A, B, S = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b"), Message("system", "s")
SAMPLES: dict[str, Row] = {
    "one turn": Row((Q, A)),
    "with a system message": Row((S, Q, A)),
    "several turns": Row((S, Q, A, Q, B)),
    "tools": Row((Q, Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", '{"bmi": 21}'), A), tools=TOOLS),
    "a named speaker": Row((Message("user", "q", {"name": "Ann"}), A)),
    "text": Row(text="once\nupon"),
    "pair": Row((S, Q), chosen=(A,), rejected=(B,)),
    "good": Row((Q, A), label=True),
    "bad": Row((Q, A), label=False),
}
# Which format holds which sample whole.
HOLDS: dict[str, set[str]] = {
    "messages": {"one turn", "with a system message", "several turns", "tools", "a named speaker"},
    "sharegpt": {"one turn", "with a system message", "several turns", "tools"},
    "alpaca": {"one turn", "with a system message", "several turns"},
    "input_output": {"one turn", "with a system message"},
    "prompt_completion": {"one turn", "with a system message", "several turns", "tools", "a named speaker"},
    "text": {"text"},
    "preference": {"pair"},
    "kto": {"good", "bad"},
}
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.zst", ".csv.bz2", ".jsonl.xz"]


def write(folder: Path, *rows: Any, name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same(row: Row, path: Path, *, format: str = "auto") -> bool:
    (found,) = read_rows(path, format=format).rows
    return not differences(row, found)


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_holds_what_it_says_and_refuses_the_rest(name: str, tmp_path: Path) -> None:
    """Prevents a conversion that drops the tools, the label or the speaker's name without a word."""
    held = set()
    for sample, row in SAMPLES.items():
        origin = next(other for other in WRITERS if sample in HOLDS[other])
        source = write(tmp_path, WRITERS[origin](row))
        target = tmp_path / "out.jsonl"
        target.unlink(missing_ok=True)
        if sample not in HOLDS[name]:
            with pytest.raises(DataError, match=r"in\.jsonl:1: (.|\n)*--lossy"):
                convert_rows(source, target, to_format=name)
            assert not target.exists()
            continue
        convert_rows(source, target, to_format=name)
        held.add(sample)
        assert same(row, target)
        assert read_rows(target).format == name
    assert held


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_every_format(name: str, suffix: str, tmp_path: Path) -> None:
    """Prevents nulls, JSON in cells or joined structs from changing rows on their way through a table."""
    rows = [WRITERS[name](SAMPLES[sample]) for sample in sorted(HOLDS[name])]
    source, target = write(tmp_path, *rows), tmp_path / f"out{suffix}"
    done = convert_rows(source, target, to_format=name)
    assert (done.num_read, done.num_written, done.lost) == (len(rows), len(rows), {})
    back = tmp_path / "back.jsonl"
    convert_rows(target, back, to_format=name)
    before, after = read_rows(source), read_rows(back)
    assert after.format == name
    assert [differences(*pair) for pair in zip(before.rows, after.rows, strict=True)] == [[] for _ in rows]


CONTENT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ['[{"role": "user"}]', "[]", "true", "\r\n", "a\rb", '"', ",", "\0", "", " x ", "null", "1"]
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
EXTRA = st.dictionaries(st.sampled_from(["name", "weight"]), st.text(max_size=3), max_size=1)
TURNS = st.lists(st.builds(Message, ROLES, CONTENT, EXTRA), min_size=1, max_size=4) | st.lists(
    st.tuples(CONTENT, CONTENT).map(lambda pair: [Message("user", pair[0]), Message("assistant", pair[1])]),
    min_size=1,
    max_size=2,
).map(lambda pairs: [message for pair in pairs for message in pair])
ANSWERS = CONTENT.map(lambda text: (Message("assistant", text),))
ROWS = (
    st.builds(lambda turns, tools: Row(tuple(turns), tools=tools), TURNS, st.sampled_from([None, TOOLS]))
    | st.builds(lambda text: Row(text=text), CONTENT.filter(bool))
    | st.builds(lambda turns, a, b: Row(tuple(turns), chosen=a, rejected=b), TURNS, ANSWERS, ANSWERS)
    | st.builds(lambda turns, a, label: Row((*turns, *a), label=label), TURNS, ANSWERS, st.booleans())
)
EXTRAS = st.dictionaries(
    st.sampled_from(["id", "score", "label", "text", "system", " x"]),
    st.integers(-(2**63), 2**64 - 1) | st.booleans() | st.none() | CONTENT | st.lists(CONTENT, max_size=1),
    max_size=2,
)


@settings(max_examples=40, deadline=None)
@given(ROWS, EXTRAS, st.sampled_from(sorted(WRITERS)), st.sampled_from(SUFFIXES))
def test_there_and_back_is_the_same_row_whenever_it_is_not_refused(
    row: Row, extras: dict[str, Any], name: str, suffix: str
) -> None:
    """Prevents a text that looks like JSON, a lone carriage return or an id from being changed by the way."""
    kind = "text" if row.text is not None else "preference" if row.chosen else "kto" if row.label is not None else ""
    origin = kind or "messages"
    start = {**extras, **WRITERS[origin](row)}
    try:
        first = PARSERS[origin](start)
    except FieldError:
        return  # an extra "system" that is no text
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder), start)
        there, back = Path(folder, f"there{suffix}"), Path(folder, "back.jsonl")
        try:
            convert_rows(source, there, to_format=name, from_format=origin)
        except DataError:
            assert not there.exists()
            return
        convert_rows(there, back, to_format=origin, from_format=name)
        (record,) = iter_records(back)
        again = PARSERS[origin](record.value)
        for part in ("messages", "text", "tools", "chosen", "rejected", "label"):
            assert getattr(again, part) == getattr(first, part), part
        unread = start.keys() - first.read
        assert {key: record.value.get(key) for key in unread} == {key: start[key] for key in unread}


def test_fields_that_no_format_reads_go_along(tmp_path: Path) -> None:
    """Prevents ids and scores from being lost on the way."""
    row = {"instruction": "q", "output": "a", "id": 7, "score": None, "meta": {"tags": ["x"]}}
    convert_rows(write(tmp_path, row), tmp_path / "out.jsonl", to_format="messages")
    found = json.loads((tmp_path / "out.jsonl").read_bytes())
    assert {key: found[key] for key in ("id", "score", "meta")} == {"id": 7, "score": None, "meta": {"tags": ["x"]}}
    with pytest.raises(DataError, match="the field 'meta' holds a list or an object, which only JSON keeps"):
        convert_rows(tmp_path / "out.jsonl", tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"that the field 'id' is not text .*would be lost"):
        convert_rows(tmp_path / "out.jsonl", tmp_path / "out.csv")


def test_only_the_file_changes_when_the_format_stays(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "id": 1}, {"prompt": "q", "completion": "b", "system": None}]
    convert_rows(write(tmp_path, *rows), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_bytes()) == rows


def test_losses_that_are_asked_for_are_counted_with_examples(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "completion": "b", "label": False},
        {"prompt": "p", "completion": "c", "label": True, "messages": "mine"},
    ]
    source, target = write(tmp_path, *rows), tmp_path / "out.jsonl"
    done = convert_rows(source, target, to_format="messages", lossy=True)
    assert (done.num_read, done.num_written) == (3, 2)
    assert done.lost == {"the label": 2, "the field 'messages', which the format messages reads otherwise": 1}
    assert done.left_out == {"an answer labelled as bad would be learned as a good one": 1}
    assert done.examples["the label"] == (f"{source}:1", f"{source}:3")
    assert [row.messages[-1].content for row in read_rows(target).rows] == ["a", "c"]


def test_a_pair_becomes_two_labelled_rows_when_that_is_asked_for(tmp_path: Path) -> None:
    source, target = write(tmp_path, WRITERS["preference"](SAMPLES["pair"])), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="which two answers are a pair would be lost"):
        convert_rows(source, target, to_format="kto")
    assert convert_rows(source, target, to_format="kto", lossy=True).num_written == 2
    assert [(row.messages[-1], row.label) for row in read_rows(target).rows] == [(A, True), (B, False)]


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("out.xlsx", {}, r"the suffix '\.xlsx' names no kind of file.*\.parquet"),
        ("no/out.jsonl", {}, "there is no such folder"),
        ("out.jsonl", {"to_format": "chat"}, "there is no row format 'chat'.*sharegpt"),
        ("out.jsonl", {"to_format": "text", "lossy": True}, "no row can be written: 2 × a conversation becomes a text"),
        ("in.jsonl", {}, "written over themselves"),
    ],
)
def test_what_cannot_be_done_leaves_everything_as_it_was(
    name: str, options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    source = write(tmp_path, {"input": "q", "output": "a"}, {"input": "q", "output": "b"})
    before = source.read_bytes()
    with pytest.raises(DataError, match=problem):
        convert_rows(source, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert source.read_bytes() == before


def test_wrong_rows_are_named_and_the_old_target_stays(tmp_path: Path) -> None:
    source, target = write(tmp_path, {"text": "a"}, {"text": 5}), tmp_path / "out.jsonl"
    target.write_bytes(b"old")
    with pytest.raises(DataError, match=r"in\.jsonl:2: text: a number \(5\) where text was expected"):
        convert_rows(source, target, lossy=True)
    assert target.read_bytes() == b"old"


def test_a_parquet_column_has_one_type(tmp_path: Path) -> None:
    source = write(tmp_path, {"text": "a", "id": 1}, {"text": "b", "id": "two"})
    with pytest.raises(DataError, match="the column 'id' holds values of several types"):
        convert_rows(source, tmp_path / "out.parquet")
    numbers = write(tmp_path, {"text": "a", "id": 1}, {"text": "b", "id": 2.5}, {"text": "c"})
    convert_rows(numbers, tmp_path / "out.parquet")
    assert [record.value["id"] for record in iter_records(tmp_path / "out.parquet")] == [1.0, 2.5, None]


def test_a_target_inside_the_folder_that_is_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"text": "a"})
    with pytest.raises(DataError, match="the target lies in the folder that is read"):
        convert_rows(tmp_path, tmp_path / "out.jsonl")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    """Prevents the time of day in a gzip header from changing a file's hash."""
    source = write(tmp_path, {"text": "a"})
    for suffix in (".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet"):
        one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
        convert_rows(source, one)
        convert_rows(source, two)
        assert one.read_bytes() == two.read_bytes()
