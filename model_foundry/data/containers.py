"""Rows into a file: JSON Lines, a JSON list, CSV, TSV or Parquet, compressed by the suffix; whole or not at all.

A cell of CSV is text and a column of Parquet has one type, so each row is first asked whether it fits (`encode`), and
what would read back as something else is named. Knows nothing of row formats beyond the names in `tables`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from model_foundry.checkpoint.atomic import atomic_file
from model_foundry.data.files import ROW_SUFFIXES, data_suffix
from model_foundry.data.tables import JSON_FIELDS, MAX_CELL_CHARS, MESSAGE_FIELDS, decode_cell
from model_foundry.data.writers import CannotHoldError
from model_foundry.errors import DataError, MissingExtraError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_BATCH_ROWS = 1000
_INT64 = range(-(2**63), 2**63)
Put = Callable[[Mapping[str, Any]], None]


@contextmanager
def open_container(path: Path) -> Iterator[Put]:
    """Yield a function that takes rows as `encode` gives them; the file appears when the block ends well.

    JSON is written as it comes. CSV and Parquet need to know every row's fields first: their rows wait in a temporary
    file beside `path`, so memory stays flat there too.

    Raises:
        DataError: the suffix names no container, the folder is missing, or (Parquet) a column holds several types.
        OSError: the disk is full or `path` may not be written; what was there is untouched.
    """
    suffix = data_suffix(path)
    if suffix not in ROW_SUFFIXES:
        hint = f"Write {', '.join(ROW_SUFFIXES)}, also with .gz, .zst, .bz2 or .xz"
        raise DataError(f"the suffix '{suffix}' names no kind of file", where=str(path), hint=hint)
    if not path.parent.is_dir():
        raise DataError("there is no such folder", where=str(path.parent), hint="Make it first")
    with atomic_file(path) as raw, _compressed(raw, path) as file:
        if suffix in (".csv", ".tsv", ".parquet"):
            with _Spool(path.parent) as spool:
                yield spool.put
                write = _write_parquet if suffix == ".parquet" else _write_csv
                write(spool, file, path)
        elif suffix == ".json":
            yield from _json_list(file)
        else:
            yield from _json_lines(file)


def encode(row: Mapping[str, Any], suffix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row as a container of this suffix holds it, and what would be read back.

    Raises:
        CannotHoldError: there is no way to write one of its values.
    """
    if suffix in (".csv", ".tsv"):
        cells = {name: _cell(name, value) for name, value in row.items()}
        return cells, {name: decode_cell(name, cell) for name, cell in cells.items()}
    if suffix == ".parquet":
        values = {name: _parquet_value(name, value) for name, value in row.items()}
        return values, values
    return dict(row), dict(row)


def _json_lines(file: IO[bytes]) -> Iterator[Put]:
    def put(row: Mapping[str, Any]) -> None:
        file.write(orjson.dumps(row) + b"\n")

    yield put


def _json_list(file: IO[bytes]) -> Iterator[Put]:
    before = b"[\n"

    def put(row: Mapping[str, Any]) -> None:
        nonlocal before
        file.write(before + orjson.dumps(row))
        before = b",\n"

    yield put
    file.write(b"[]\n" if before == b"[\n" else b"\n]\n")


@contextmanager
def _compressed(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    name = path.name.lower()
    with ExitStack() as stack:
        if name.endswith(".gz"):
            # No name and no time in the header: the same rows give the same bytes.
            packed: Any = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
        elif name.endswith(".zst"):
            try:
                import zstandard
            except ImportError as error:
                raise MissingExtraError("zstandard", "data") from error
            packed = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
        elif name.endswith(".bz2"):
            packed = bz2.BZ2File(file, "wb")
        elif name.endswith(".xz"):
            packed = lzma.LZMAFile(file, "wb")  # noqa: SIM115 - closed by the stack
        else:
            yield file
            return
        yield stack.enter_context(packed)


class _Spool:
    """Rows waiting on the disk, with what is known of their columns."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self.columns: dict[str, Any] = {}

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            self.columns[name] = _merged(self.columns.get(name), _kind(value))
        self._file.write(orjson.dumps(row) + b"\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for line in self._file:
            yield orjson.loads(line)


def _write_csv(spool: _Spool, file: IO[bytes], path: Path) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    delimiter = "\t" if data_suffix(path) == ".tsv" else ","
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(spool.columns)
    for row in spool.rows():
        writer.writerow([row.get(name, "") for name in spool.columns])
    text.detach()


def _cell(name: str, value: Any) -> str:
    if name != name.strip() or not name:
        raise CannotHoldError(f"the field {name!r} cannot be a column's name")
    if name in JSON_FIELDS:
        cell = "" if value is None else orjson.dumps(value).decode()
    elif isinstance(value, str):
        cell = value
    elif isinstance(value, bool):
        cell = "true" if value else "false"
    else:
        cell = "" if value is None else orjson.dumps(value).decode()
    if "\0" in name + cell:
        raise CannotHoldError("CSV has no place for a NUL character")
    if len(cell) > MAX_CELL_CHARS:
        raise CannotHoldError(f"a text of more than {MAX_CELL_CHARS:,} characters does not fit a CSV cell")
    return cell


def _parquet_value(name: str, value: Any) -> Any:
    """Lists of messages keep their structure; calls and tools, whose fields differ from row to row, become JSON."""
    if name == "tools" and value is not None:
        return orjson.dumps(value).decode()
    if name == "history":
        return value
    if name in MESSAGE_FIELDS | {"messages", "conversations"} and isinstance(value, list):
        return [_parquet_turn(turn) for turn in value]
    return _plain(name, value)


def _parquet_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if calls is not None:
        turn = {**turn, "tool_calls": orjson.dumps(calls).decode()}
    return {name: _plain(name, value) for name, value in turn.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, (list, dict)):
        raise CannotHoldError(f"the field '{name}' holds a list or an object, which only JSON keeps as it is")
    if isinstance(value, int) and value not in _INT64:
        raise CannotHoldError(f"the field '{name}' holds a number of more than 64 bits")
    return value


def _kind(value: Any) -> Any:
    """The type of a value: a name, ["list", element] or {field: type}; None where it says nothing."""
    if value is None:
        return None
    if isinstance(value, list):
        element = None
        for item in value:
            element = _merged(element, _kind(item))
        return ["list", element]
    if isinstance(value, dict):
        return {name: _kind(item) for name, item in value.items()}
    return "bool" if isinstance(value, bool) else type(value).__name__


def _merged(one: Any, other: Any) -> Any:
    """The type that holds both, or "mixed"."""
    if one is None or one == other:
        return other
    if other is None:
        return one
    if isinstance(one, list) and isinstance(other, list):
        return ["list", _merged(one[1], other[1])]
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _merged(one.get(name), other.get(name)) for name in [*one, *other]}
    return "float" if one in ("int", "float") and other in ("int", "float") else "mixed"


def _write_parquet(spool: _Spool, file: IO[bytes], path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    fields = [(name, _arrow_type(pyarrow, kind, name, path)) for name, kind in spool.columns.items()]
    schema = pyarrow.schema(fields)
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        batch: list[dict[str, Any]] = []
        for row in spool.rows():
            batch.append(row)
            if len(batch) == PARQUET_BATCH_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _arrow_type(pyarrow: Any, kind: Any, name: str, path: Path) -> Any:
    if isinstance(kind, list):
        return pyarrow.list_(_arrow_type(pyarrow, kind[1], name, path))
    if isinstance(kind, dict):
        parts: Sequence[Any] = [(key, _arrow_type(pyarrow, part, f"{name}.{key}", path)) for key, part in kind.items()]
        return pyarrow.struct(parts)
    types = {"str": "string", "bool": "bool_", "int": "int64", "float": "float64", None: "string"}
    if kind not in types:
        hint = "Write .jsonl, where each row may have its own types"
        raise DataError(f"the column '{name}' holds values of several types", where=str(path), hint=hint)
    return getattr(pyarrow, types[kind])()
