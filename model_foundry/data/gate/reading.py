"""Reading with attention: every row that can be read, every one that cannot with its reason, and what was left unread.

Where `rows.read_rows` refuses a file at its first wrong rows, this reads on, so that the gate can name them all. Knows
rows and fields; does not know tokens or templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model_foundry.data.files import Record, find_inputs, iter_records, local_path
from model_foundry.data.gate.unread import UnreadFields
from model_foundry.data.rows import BadRows, Row, RowParser, RowSet, row_of
from model_foundry.errors import DataError

_ROLE_PROBLEM = re.compile(r"[\w\[\].]*\.(role|from): .* where one of ")
_FIRST_BYTES = 1 << 16
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True, slots=True)
class ReadProblem:
    """A row that cannot be read, and whether its role is the reason."""

    source: str
    what: str
    kind: Literal["unreadable", "role"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file or a folder holds.

    Attributes:
        rows: what could be read; may be empty.
        problems: what could not, in the order of the file.
        unread: fields with content that no parser read.
        num_records: rows met, readable or not.
        facts: format, encoding and sizes, for people.
        error: what `read_rows` would raise, or None.
    """

    rows: RowSet
    problems: tuple[ReadProblem, ...]
    unread: UnreadFields
    num_records: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: DataError | None = None

    def require(self) -> RowSet:
        """The rows.

        Raises:
            DataError: some could not be read, or there are none.
        """
        if self.error is not None:
            raise self.error
        return self.rows


class _Problems(BadRows):
    """Keeps every problem, with its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[ReadProblem] = []
        self.hint: str | None = None
        self.whole_file: DataError | None = None

    def add(self, source: str, problem: str) -> None:
        super().add(source, problem)
        kind = "role" if _ROLE_PROBLEM.match(problem) else "unreadable"
        self.found.append(ReadProblem(source, problem, kind))


def read_attentively(path: Path | str, *, format: str = "auto") -> Reading:
    """Read every row of a file or a folder.

    Args:
        path: as for `rows.read_rows`.
        format: a name in `formats.PARSERS`, or `auto`.

    Raises:
        DataError: there is no such file, or no such format. MissingExtraError: a package that the file needs is absent.
    """
    path = local_path(path)
    parser, bad, unread = RowParser(format), _Problems(), UnreadFields()
    rows: list[Row] = []
    num_records = 0
    for record in iter_records(path):
        num_records += 1
        if record.problem is not None and record.source == str(path):
            bad.whole_file = bad.whole_file or DataError(record.problem, where=record.source)
        row = _row(record, parser, bad, unread)
        if row is not None:
            rows.append(row)
    inputs = find_inputs(path)
    row_set = RowSet(tuple(rows), parser.format, path, dict(parser.ignored), inputs.skipped)
    return Reading(
        rows=row_set,
        problems=tuple(bad.found),
        unread=unread,
        num_records=num_records,
        facts=_facts(row_set, inputs.files),
        error=_error(bad, num_records, path),
    )


def _row(record: Record, parser: RowParser, bad: _Problems, unread: UnreadFields) -> Row | None:
    try:
        parsed = parser.parse(record, bad)
    except DataError as error:  # the format cannot be told from this row; another may tell
        bad.add(record.source, error.what)
        bad.hint = bad.hint or error.hint
        return None
    if parsed is None:
        return None
    row = row_of(parsed, source=record.source)
    if len(record.value) > len(parsed.read & record.value.keys()):
        unread.look(record.value, parsed.read, row)
    return row


def _error(bad: _Problems, num_records: int, path: Path) -> DataError | None:
    if bad.whole_file is not None:
        return bad.whole_file
    try:
        bad.raise_if_any(num_rows=num_records, path=path, hint=bad.hint)
    except DataError as error:
        return error
    if num_records == 0:
        return DataError("the file holds no rows", where=str(path), hint="Put one JSON object on each line")
    return None


def _facts(rows: RowSet, files: tuple[Path, ...]) -> dict[str, Any]:
    """Format, sizes and encoding as the first bytes of each file show them."""
    marks: dict[str, int] = {}
    endings: dict[str, int] = {}
    num_bytes = 0
    for file in files:
        num_bytes += file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(_FIRST_BYTES)
        mark = next((name for start, name in _BYTE_ORDER_MARKS.items() if first.startswith(start)), None)
        if mark is not None:
            marks[mark] = marks.get(mark, 0) + 1
        if (ending := _line_ending(first)) is not None:
            endings[ending] = endings.get(ending, 0) + 1
    return {
        "file": str(rows.path),
        "format": rows.format,
        "files": len(files),
        "bytes": num_bytes,
        "byte_order_marks": marks,
        "line_endings": endings,
        "unread_fields": dict(rows.ignored_fields),
        "skipped_files": dict(rows.skipped_files),
    }


def _line_ending(first: bytes) -> str | None:
    """How the lines of a text file end, by its beginning; None for what is compressed or binary."""
    if b"\0" in first or first.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")):
        return None
    num_crlf = first.count(b"\r\n")
    num_lf = first.count(b"\n") - num_crlf
    if num_crlf and num_lf:
        return "mixed"
    return "CRLF" if num_crlf else "LF" if num_lf else None
