"""Records out of any file: every container, every compression, every way in which bytes are not what they should be."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data import byte_streams, json_stream
from model_foundry.data.byte_streams import UnreadableError, split_lines
from model_foundry.data.files import Record, find_inputs, input_files, iter_records
from model_foundry.data.json_stream import list_elements
from model_foundry.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'say "hi"', "completion": "line\nbreak, comma\ttab"},
    {"prompt": "[not json", "completion": "ünïcödé ] } { ["},
    {"prompt": "", "completion": "\r\n"},
]


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    import csv

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    "-object.json": lambda rows: json.dumps({"version": [1], "rows": rows, "end": {"a": [1]}}).encode(),
    "-lines.json": as_jsonl,
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".parquet": as_parquet,
}


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def xz_for_much_memory() -> bytes:
    """A file of two bytes whose header says that unpacking takes a window of 4 GB."""
    packed = bytearray(lzma.compress(b"{}"))
    packed[16] = 40
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    return bytes(packed)


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def problems(path: Path) -> list[str]:
    return [f"{record.source}: {record.problem}" for record in iter_records(path) if record.problem is not None]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_the_same_rows_come_out_of_every_container(suffix: str, packing: str, tmp_path: Path) -> None:
    data = CONTAINERS[suffix](ROWS)
    data = PACKINGS[packing](data)
    path = put(tmp_path, f"rows{suffix}{packing}", data)
    assert [record.value for record in iter_records(path)] == ROWS
    assert len({record.source for record in iter_records(path)}) == len(ROWS)


def test_compression_and_parquet_are_told_by_their_bytes(tmp_path: Path) -> None:
    """Prevents a download without its suffix from being taken for damaged JSON."""
    assert [r.value for r in iter_records(put(tmp_path, "a.jsonl", gzip.compress(as_jsonl(ROWS))))] == ROWS
    assert [r.value for r in iter_records(put(tmp_path, "b.jsonl", zstandard.compress(as_jsonl(ROWS))))] == ROWS
    assert [r.value for r in iter_records(put(tmp_path, "c.jsonl", as_parquet(ROWS)))] == ROWS
    assert [r.value for r in iter_records(put(tmp_path, "d.jsonl", bz2.compress(as_jsonl(ROWS))))] == ROWS
    assert [r.value for r in iter_records(put(tmp_path, "e.jsonl", lzma.compress(as_jsonl(ROWS))))] == ROWS


@pytest.mark.parametrize("packing", [".gz", ".zst", ".bz2", ".xz"])
def test_files_joined_by_cat_are_read_to_their_end(packing: str, tmp_path: Path) -> None:
    """Prevents the rows behind the first of several compressed streams from being lost."""
    pack, between = PACKINGS[packing], bytes(8) if packing == ".xz" else b""  # xz may fill up with zeros
    several = pack(as_jsonl(ROWS[:1])) + between + pack(b"") + between + pack(as_jsonl(ROWS[1:])) + between
    assert [r.value for r in iter_records(put(tmp_path, f"a.jsonl{packing}", several))] == ROWS


def test_sources_name_the_line_a_person_would_look_at(tmp_path: Path) -> None:
    mixed = put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}\r{"a": 3}\n  \n{"a": 4}')
    assert [record.source for record in iter_records(mixed)] == [f"{mixed}:{line}" for line in (1, 3, 4, 6)]
    table = put(tmp_path, "a.csv", b'a,b\r\n1,"x\ny"\n2,z\r3,\n')
    assert [(record.source, record.value) for record in iter_records(table)] == [
        (f"{table}:3", {"a": "1", "b": "x\ny"}),
        (f"{table}:4", {"a": "2", "b": "z"}),
        (f"{table}:5", {"a": "3", "b": ""}),
    ]


def test_csv_cells_hold_json_where_the_header_says_so(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}]
    row = {"messages": json.dumps(turns), "tools": "", "label": "False", "prompt": json.dumps(turns), "id": "007"}
    record = next(iter_records(put(tmp_path, "a.csv", as_csv([row]))))
    assert record.value == {"messages": turns, "tools": None, "label": False, "prompt": turns, "id": "007"}
    broken = put(tmp_path, "b.csv", as_csv([{"messages": "[{"}, {"messages": "[]"}]))
    assert [record.value for record in iter_records(broken)] == [None, {"messages": []}]
    assert problems(broken)[0].startswith(f"{broken}:2: messages: not JSON")


def test_a_json_object_that_is_a_row_itself_is_one_row(tmp_path: Path) -> None:
    """Prevents the turns of a conversation from being taken for rows."""
    row = {"messages": [{"role": "user", "content": "q"}], "id": 1}
    path = put(tmp_path, "a.json", json.dumps(row, indent=2).encode())
    assert [record.value for record in iter_records(path)] == [row]
    two_lists = {"train": ROWS, "test": ROWS}
    assert [record.value for record in iter_records(put(tmp_path, "b.json", json.dumps(two_lists).encode()))] == [
        two_lists
    ]


def test_structs_of_parquet_lose_the_fields_that_their_row_does_not_have(tmp_path: Path) -> None:
    """Prevents each call's arguments from getting the names of all other calls' arguments, as null."""
    rows = [
        {"messages": [{"role": "user", "content": "q", "arguments": argument}]} for argument in ({"a": 1}, {"b": 2})
    ]
    path = put(tmp_path, "a.parquet", as_parquet(rows))
    assert [record.value for record in iter_records(path)] == rows


BAD: dict[str, tuple[str, bytes, str]] = {
    "half a line": ("a.jsonl", b'{"a": 1}\n{"a": ', "a.jsonl:2: the last line is cut off or not JSON"),
    "latin-1": ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl:2: not UTF-8: byte 0xe9 at offset 10"),
    "latin-1 table": ("a.csv", b"a\nx\ncaf\xe9\n", "a.csv:3: not UTF-8: byte 0xe9"),
    "latin-1 text": ("a.txt", b"one\ntwo\ncaf\xe9\n", "a.txt:3: not UTF-8: byte 0xe9"),
    "utf-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl: the file is UTF-16. Save it as UTF-8"),
    "utf-16 without a mark": ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "a.jsonl:1: not text: a NUL byte"),
    "binary": ("a.jsonl", b'{"a": 1}\n' + bytes(range(256)), "a.jsonl:2: not text: a NUL byte"),
    "binary text": ("a.txt", b"one\n\x00", "a.txt:2: not text: a NUL byte"),
    "a picture": ("a.txt", b"\x89PNG\r\n\x1a\n", "a.txt: the file is compressed or binary: a picture"),
    "a zip": ("a.jsonl", b"PK\x03\x04", "a.jsonl: the file is compressed or binary: a zip archive"),
    "twice compressed": ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), "it is compressed twice"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:-9], "not whole gzip data"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n')[:-3], "the Zstandard data are cut off"),
    "flipped zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\xff\xff\xff\xff", "the Zstandard data are damaged"),
    "cut bzip2": ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n')[:-3], "the bzip2 data are cut off"),
    "flipped bzip2": ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n')[:-4] + b"abcd", "the bzip2 data are damaged"),
    "more than bzip2": ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n') + b"abcd", "the bzip2 data are damaged"),
    "cut xz": ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n')[:-3], "the xz data are cut off"),
    "flipped xz": ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n')[:-12] + b"x" * 12, "the xz data are damaged"),
    "an xz of 4 GB": ("a.jsonl.xz", xz_for_much_memory(), "the xz data are damaged: Memory usage limit exceeded"),
    "cut parquet": ("a.parquet", as_parquet(ROWS)[:-20], "a.parquet: not whole Parquet data"),
    "text called parquet": ("a.parquet", b"{}", "a.parquet: not whole Parquet data"),
    "cut list": ("a.json", b'[{"a": 1}, {"a"', "it ends inside the list"),
    "two lists": ("a.json", b"[1] [2]", "something follows the end of the list"),
    "a hole in a list": ("a.json", b"[1,,2]", "a.json row 2: not JSON"),
    "ragged table": ("a.csv", b"a,b\n1,2\n3\n", "a.csv:3: 1 cells where the header has 2"),
    "open quote": ("a.csv", b'a,b\n1,"2\n', "not CSV: unexpected end of data"),
    "double header": ("a.csv", b"a,a\n1,2\n", "a.csv:1: the header names 'a' more than once"),
    "nameless column": ("a.csv", b"a,\n1,2\n", "a.csv:1: a column of the header has no name"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_decoded_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    name, data, expected = BAD[case]
    assert any(expected in problem for problem in problems(put(tmp_path, name, data)))


def test_a_faulty_row_does_not_hide_the_ones_behind_it(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b'{"a":1}\n{a}\n{"a":2}\n'), ("a.json", b'[{"a":1},{a},{"a":2}]')):
        found = list(iter_records(put(tmp_path, name, data)))
        assert [record.value for record in found] == [{"a": 1}, None, {"a": 2}]


@pytest.mark.slow
def test_a_long_line_is_read_and_one_beyond_the_bound_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wrap, num_words in (("a.jsonl", b"%s\n", 10_000_000), ("a.json", b"[%s]", 1_000_000)):
        row = b'{"text": "' + b"word " * num_words + b'"}'
        record = next(iter_records(put(tmp_path, name, wrap % row)))
        assert len(record.value["text"]) == 5 * num_words
    long = [b'{"a": 1}\n', b"x" * 50, b"x" * 60]
    with pytest.raises(UnreadableError, match="a line of more than 100 bytes") as caught:
        list(split_lines(long, max_bytes=100))
    assert caught.value.line == 2
    monkeypatch.setattr(json_stream, "MAX_ROW_BYTES", 1000)
    with pytest.raises(UnreadableError, match="a JSON value of more than 1,000 bytes"):
        list(list_elements(iter([b"[1, ["] + [b"2," * 400] * 5)))


def peak_bytes(records: Iterator[Record]) -> tuple[int, int]:
    """Records, and the most memory that Python held on their way."""
    tracemalloc.start()
    try:
        num_records = sum(1 for _ in records)
        return num_records, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv.zst", "b.json"])
def test_memory_is_bounded_by_a_row_and_not_by_the_file(name: str, tmp_path: Path) -> None:
    """Prevents a corpus larger than memory from being read into it."""
    num_rows, text = 210, "x" * 100_000
    row = json.dumps({"prompt": "p", "completion": text})
    lines = {
        "a.jsonl.gz": "\n".join([row] * num_rows),
        "a.json": f"[{','.join([row] * num_rows)}]",
        "b.json": f'{{"data": [{",".join([row] * num_rows)}]}}',
        "a.csv.zst": "prompt,completion\n" + f"p,{text}\n" * num_rows,
    }[name].encode()
    packed = gzip.compress(lines, 1) if name.endswith("gz") else zstandard.compress(lines) if "zst" in name else lines
    found, peak = peak_bytes(iter_records(put(tmp_path, name, packed)))
    assert found == num_rows
    assert peak < (20e6 if "zst" in name else 8e6) < len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("pack", list(PACKINGS.values())[1:], ids=list(PACKINGS)[1:])
def test_a_decompression_bomb_does_not_fill_the_memory(
    pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents 60 kB from a stranger from becoming 60 MB (or 60 GB) of one line."""
    bomb = pack(b'{"text": "' + bytes([120]) * 60_000_000)
    assert len(bomb) < 100_000
    small = byte_streams.split_lines
    monkeypatch.setattr("model_foundry.data.files.split_lines", lambda chunks: small(chunks, max_bytes=10_000_000))
    path = put(tmp_path, "bomb.jsonl", bomb)
    tracemalloc.start()
    (record,) = iter_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record.problem == "a line of more than 10,000,000 bytes, which is not read"
    assert peak < 50e6


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    path = put(tmp_path, "notes.md", "# Título\n".encode())
    assert list(iter_records(path)) == [Record(str(path), {"text": "# Título\n", "path": "notes.md"})]


def test_a_folder_is_read_in_order_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    put(tmp_path, "b/1.jsonl", b'{"n": 2}\n')
    put(tmp_path, "a.jsonl.gz", gzip.compress(b'{"n": 1}\n'))
    put(tmp_path, "b/2.csv", b"n\n3\n")
    put(tmp_path, "README.md", b"about")
    put(tmp_path, ".hidden/x.jsonl", b"{}")
    put(tmp_path, "b/.DS_Store", b"")
    put(tmp_path, "model.safetensors", b"")
    put(tmp_path, "LICENSE", b"")
    (tmp_path / "dead.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "twin").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert [record.value["n"] for record in iter_records(tmp_path)] == [1, 2, "3"]
    found = find_inputs(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == ["a.jsonl.gz", "b/1.jsonl", "b/2.csv"]
    assert input_files(tmp_path) == list(found.files)
    assert found.examples == {
        "hidden": (".hidden", "b/.DS_Store"),
        "links that lead nowhere": ("dead.jsonl",),
        "that are not plain files": ("pipe.jsonl",),
        "links to what is read already": ("twin", "b/up"),
        "with the suffix .safetensors": ("model.safetensors",),
        "without a suffix": ("LICENSE",),
        "texts beside files of rows": ("README.md",),
    }
    assert dict(found.skipped) == {reason: len(names) for reason, names in found.examples.items()}


def test_a_folder_of_texts_and_of_code(tmp_path: Path) -> None:
    put(tmp_path, "src/a.lua", b"return 1\n")
    put(tmp_path, "b.txt", b"text")
    assert [record.value["path"] for record in iter_records(tmp_path)] == ["b.txt"]
    found = [record.value for record in iter_records(tmp_path, text_suffixes=(".lua",))]
    assert found == [{"text": "return 1\n", "path": "src/a.lua"}]


def test_a_folder_without_rows_says_what_was_there(tmp_path: Path) -> None:
    put(tmp_path, "model.bin", b"")
    with pytest.raises(DataError, match=r"holds no file of rows \(1 with the suffix \.bin\).*\.parquet"):
        list(iter_records(tmp_path))
    with pytest.raises(DataError, match="there is no such file"):
        list(iter_records(tmp_path / "nowhere"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*CONTAINERS, ".jsonl.gz", ".csv.zst", ".txt"]), st.integers(0), st.binary(max_size=3))
@pytest.mark.slow
def test_damage_of_any_kind_is_a_problem_and_never_a_traceback(suffix: str, place: int, what: bytes) -> None:
    """Prevents one flipped byte of a Parquet file from ending in a UnicodeDecodeError."""
    data = CONTAINERS.get(suffix, as_jsonl if "jsonl" in suffix else as_csv)(ROWS)
    data = gzip.compress(data) if "gz" in suffix else zstandard.compress(data) if "zst" in suffix else data
    place %= len(data)
    with tempfile.TemporaryDirectory() as folder:
        for damaged in (data[:place] + what + data[place + len(what) :], data[:place] + what, data[place:]):
            for record in iter_records(put(Path(folder), f"a{suffix}", damaged)):
                assert record.problem is None or record.value is None


@given(st.lists(JSON_VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]))
@pytest.mark.slow
def test_the_elements_of_a_list_do_not_depend_on_where_it_is_cut(values: list[Any], size: int, indent: int) -> None:
    """Prevents a string, an escape or a number that straddles two chunks from being read as two."""
    data = json.dumps(values, ensure_ascii=False, indent=indent).encode()
    assert [json.loads(element) for element in list_elements(pieces(data, size))] == values
    wrapped = json.dumps({"a": values, '"rows"': values, "z": 1}, ensure_ascii=False, indent=indent).encode()
    key = json.dumps('"rows"').encode()
    assert [json.loads(element) for element in list_elements(pieces(wrapped, size), field=key)] == values


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\r\n", b"bc"]), max_size=20), st.integers(1, 5))
def test_lines_do_not_depend_on_where_the_bytes_are_cut(parts: list[bytes], size: int) -> None:
    data = b"".join(parts)
    assert list(split_lines(pieces(data, size))) == data.splitlines(keepends=True)
