"""Read a file of rows, or say what is wrong with it: by file, line and field, several rows at once.

Knows files and formats; does not know tokens, templates or policies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from model_foundry.data.formats import PARSERS, FieldError, describe, detect_format
from model_foundry.errors import DataError
from model_foundry.types import Message

MAX_REPORTED_ROWS = 10
_UNREADABLE = object()


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `messages`, or `text` where the format is plain text.

    Attributes:
        messages: the conversation; empty for a text row.
        text: the plain text, or None.
        source: "file:line" (or "file row N" for a JSON array), for errors.
        tools: function descriptions the template may show, or None.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one file in one format. `ignored_fields` counts the fields that nothing read."""

    rows: tuple[Row, ...]
    format: str
    path: Path | None = None
    ignored_fields: Mapping[str, int] = field(default_factory=dict)


class BadRows:
    """Collects what is wrong with rows, to say it all at once."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, source: str, problem: str) -> None:
        self.count += 1
        if len(self._shown) < MAX_REPORTED_ROWS:
            self._shown.append(f"{source}: {problem}")

    def raise_if_any(self, *, num_rows: int, path: Path | None, hint: str | None = None) -> None:
        """Raises: DataError listing the first rows and counting the rest."""
        if not self.count:
            return
        lines = list(self._shown)
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines):,} more")
        what = f"{self.count:,} of {num_rows:,} rows cannot be used:\n  " + "\n  ".join(lines)
        raise DataError(what, where=None if path is None else str(path), hint=hint)


def read_rows(path: Path, *, format: str = "auto") -> RowSet:
    """Read JSONL (or a JSON array) of rows.

    Args:
        path: the file, UTF-8, with or without a byte order mark; blank lines are passed over.
        format: a name in `formats.PARSERS`, or `auto` to detect it from the first row.

    Raises:
        DataError: the file is missing, empty, not text, or rows are wrong; up to ten rows are named.
    """
    path = Path(path)
    if format != "auto" and format not in PARSERS:
        raise DataError(f"there is no row format '{format}'", hint=f"Choose auto or one of {', '.join(PARSERS)}")
    bad = BadRows()
    rows: list[Row] = []
    ignored: Counter[str] = Counter()
    num_rows = 0
    for source, value in _values(path, bad):
        num_rows += 1
        if value is _UNREADABLE:
            continue
        if not isinstance(value, dict):
            bad.add(source, f"{describe(value)} where an object was expected")
            continue
        if format == "auto":
            format = _detected(value, source)
        try:
            parsed = PARSERS[format](value)
        except FieldError as error:
            bad.add(source, f"{error} (format {format})")
            continue
        ignored.update(key for key in value if key not in parsed.read)
        rows.append(Row(parsed.messages, parsed.text, source, parsed.tools))
    bad.raise_if_any(num_rows=num_rows, path=path)
    if not rows:
        raise DataError("the file holds no rows", where=str(path), hint="Put one JSON object on each line")
    return RowSet(tuple(rows), format, path, dict(ignored))


def _detected(row: Mapping[str, Any], source: str) -> str:
    name = detect_format(row)
    if name is None:
        fields = ", ".join(map(repr, list(row)[:10])) or "none"
        raise DataError(
            f"the format cannot be told from the fields {fields}",
            where=source,
            hint=f"Set data.format to one of {', '.join(PARSERS)} or rename the fields",
        )
    return name


def _values(path: Path, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """Each row's source and decoded JSON, or _UNREADABLE where `bad` now says why."""
    data = _read_bytes(path)
    if data.lstrip()[:1] == b"[":
        yield from _array_values(path, data)
        return
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            yield source, orjson.loads(line)
        except orjson.JSONDecodeError as error:
            bad.add(source, _decoding_problem(line, error, is_cut=number == len(lines)))
            yield source, _UNREADABLE


def _array_values(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DataError(f"the file is not JSONL, and not a JSON array: {error}", where=str(path)) from error
    for number, value in enumerate(values, start=1):
        yield f"{path} row {number}", value


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=str(path), hint="Check data.train_file") from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("the file is UTF-16", where=str(path), hint="Save it as UTF-8")
    if data.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")):
        raise DataError("the file is compressed or binary", where=str(path), hint="Give JSON Lines, one object a line")
    return data.removeprefix(b"\xef\xbb\xbf")


def _decoding_problem(line: bytes, error: orjson.JSONDecodeError, *, is_cut: bool) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as problem:
        return f"not UTF-8: byte 0x{line[problem.start]:02x} at offset {problem.start} of the line"
    if is_cut:
        return f"the last line is cut off or not JSON ({error})"
    return f"not JSON ({error})"
