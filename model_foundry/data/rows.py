"""Read rows, or say what is wrong with them: by file, line and field, several rows at once.

Knows formats, and files only through `iter_records`; does not know tokens, templates or policies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.data.fields import FieldError, describe
from model_foundry.data.files import Record, find_inputs, iter_records, local_path
from model_foundry.data.formats import PARSERS, Parsed, detect_format
from model_foundry.errors import DataError
from model_foundry.types import Message

MAX_REPORTED_ROWS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `messages`, or `text` where the format is plain text.

    Attributes:
        messages: the conversation; empty for a text row; the prompt alone for a preference row.
        text: the plain text, or None.
        source: "file:line" (or "file row N" for a JSON list and Parquet), for errors.
        tools: function descriptions the template may show, or None.
        chosen: the better answer of a preference row.
        rejected: the worse one.
        label: whether the answer that `messages` end with is a good one (KTO), or None.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one file or folder in one format.

    Attributes:
        ignored_fields: the fields that nothing read, with how many rows have each.
        skipped_files: of a folder, why files were left out, with how many each.
    """

    rows: tuple[Row, ...]
    format: str
    path: Path | None = None
    ignored_fields: Mapping[str, int] = field(default_factory=dict)
    skipped_files: Mapping[str, int] = field(default_factory=dict)


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


class RowParser:
    """Turns records into rows of one format, which the first row decides under `auto`.

    Attributes:
        format: a name in `formats.PARSERS`, or `auto` before the first row.
        ignored: the fields that nothing read, with how many rows have each.

    Raises:
        DataError: there is no such format.
    """

    def __init__(self, format: str = "auto") -> None:
        if format != "auto" and format not in PARSERS:
            raise DataError(f"there is no row format '{format}'", hint=f"Choose auto or one of {', '.join(PARSERS)}")
        self.format = format
        self.ignored: Counter[str] = Counter()

    def parse(self, record: Record, bad: BadRows) -> Parsed | None:
        """What the record holds, or None where `bad` now says why it holds nothing of use.

        Raises:
            DataError: the format cannot be told from the first row.
        """
        if record.problem is not None:
            bad.add(record.source, record.problem)
            return None
        value = record.value
        if not isinstance(value, dict):
            bad.add(record.source, f"{describe(value)} where an object was expected")
            return None
        if self.format == "auto":
            self.format = _detected(value, record.source)
        try:
            parsed = PARSERS[self.format](value)
        except FieldError as error:
            bad.add(record.source, f"{error} (format {self.format})")
            return None
        if ignored := value.keys() - parsed.read:
            self.ignored.update(ignored - {"path"} if self.format == "text" else ignored)
        return parsed


def read_rows(path: Path | str, *, format: str = "auto") -> RowSet:
    """Read the rows of a file or a folder: whatever `iter_records` reads.

    Args:
        path: the file or folder; text is UTF-8, with or without a byte order mark; blank lines are passed over. A
            name `hf://datasets/…` is fetched first.
        format: a name in `formats.PARSERS`, or `auto` to detect it from the first row.

    Raises:
        DataError: the file is missing, empty, not text, or rows are wrong; up to ten rows are named.
    """
    path = local_path(path)
    parser, bad = RowParser(format), BadRows()
    rows: list[Row] = []
    num_rows = 0
    for record in iter_records(path):
        num_rows += 1
        if record.problem is not None and record.source == str(path):
            raise DataError(record.problem, where=record.source)  # the whole file is something else
        if (parsed := parser.parse(record, bad)) is not None:
            rows.append(row_of(parsed, source=record.source))
    bad.raise_if_any(num_rows=num_rows, path=path)
    if not rows:
        raise DataError("the file holds no rows", where=str(path), hint="Put one JSON object on each line")
    return RowSet(tuple(rows), parser.format, path, dict(parser.ignored), find_inputs(path).skipped)


def row_of(parsed: Parsed, *, source: str = "") -> Row:
    """A parsed row as a value."""
    return Row(parsed.messages, parsed.text, source, parsed.tools, parsed.chosen, parsed.rejected, parsed.label)


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
