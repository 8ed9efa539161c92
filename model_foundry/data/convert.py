"""Rows of one format and file into another, each checked by reading back what was written.

What a row would lose is named with its reason and refused, unless losses are asked for; then they are counted. Fields
that no format reads (ids, scores) go along. Memory is bounded by a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.data.containers import JSON_SUFFIXES, encode, open_container
from model_foundry.data.fields import FieldError
from model_foundry.data.files import data_suffix, find_inputs, iter_records, local_path
from model_foundry.data.formats import PARSERS, Parsed, detect_format
from model_foundry.data.rows import BadRows, Row, RowParser, row_of
from model_foundry.data.writers import WRITERS, CannotHoldError, differences, unpaired
from model_foundry.errors import DataError

MAX_EXAMPLES = 3
PROGRESS_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of the rows.

    Attributes:
        lost: what rows lost, with how many rows lost it; only with `lossy`.
        left_out: why rows were not written at all, with how many each; only with `lossy`.
        examples: for each of these reasons the first rows, by source.
        skipped_files: of a folder, why files were not read, with how many each.
    """

    source: Path
    target: Path
    from_format: str
    to_format: str
    num_read: int
    num_written: int
    lost: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped_files: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "from": self.from_format,
            "to": self.to_format,
            "rows_read": self.num_read,
            "rows_written": self.num_written,
            "lost": dict(self.lost),
            "left_out": dict(self.left_out),
            "examples": {reason: list(sources) for reason, sources in self.examples.items()},
            "skipped_files": dict(self.skipped_files),
        }


def convert_rows(
    source: Path | str,
    target: Path,
    *,
    to_format: str | None = None,
    from_format: str = "auto",
    lossy: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Converted:
    """Read every row of `source` and write it to `target`, whose suffix chooses the kind of file.

    Args:
        to_format: a name in `formats.PARSERS`; None keeps the format and only changes the file.
        lossy: write rows that lose something, and leave out those that cannot be written, both counted.
        on_progress: told the number of rows read, now and then.

    Raises:
        DataError: rows cannot be read, or (without `lossy`) cannot be held; up to ten are named. Nothing is written.
        OSError: the target cannot be written.
    """
    source = local_path(source)
    _require_apart(source, target)
    if to_format is not None and to_format not in WRITERS:
        raise DataError(f"there is no row format '{to_format}'", hint=f"Choose one of {', '.join(WRITERS)}")
    parser, bad, notes = RowParser(from_format), BadRows(), _Notes(lossy=lossy)
    suffix = data_suffix(target)
    num_read = num_written = 0
    with open_container(target) as put:
        for record in iter_records(source):
            num_read += 1
            parsed = parser.parse(record, bad)
            if parsed is not None:
                name = to_format or parser.format
                if name == parser.format and suffix in JSON_SUFFIXES:
                    rows = iter([record.value])  # only the file changes: a row stays as it stands
                else:
                    rows = _written(record.value, parsed, record.source, name, suffix, notes)
                for row in rows:
                    put(row)
                    num_written += 1
            if on_progress is not None and num_read % PROGRESS_ROWS == 0:
                on_progress(num_read)
        bad.raise_if_any(num_rows=num_read, path=source)
        notes.raise_if_refused(num_rows=num_read, path=source)
        if not num_written:
            why = "; ".join(f"{count:,} × {reason}" for reason, count in notes.left_out.items())
            raise DataError(f"no row can be written{f': {why}' if why else ', there is none'}", where=str(source))
    return Converted(
        source, target, parser.format, to_format or parser.format, num_read, num_written, dict(notes.lost),
        dict(notes.left_out), {reason: tuple(rows) for reason, rows in notes.examples.items()},
        find_inputs(source).skipped,
    )  # fmt: skip


class _Notes:
    """What rows lose, collected or (without `lossy`) refused."""

    def __init__(self, *, lossy: bool) -> None:
        self._lossy = lossy
        self._refused = BadRows()
        self.lost: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def accepts(self, source: str, lost: list[str]) -> bool:
        """Note what a row loses; whether it is to be written."""
        if lost and not self._lossy:
            self._refused.add(source, f"{' and '.join(lost)} would be lost")
            return False
        for reason in lost:
            self._count(self.lost, reason, source)
        return True

    def leave_out(self, source: str, reason: str) -> None:
        """Note a row that cannot be written."""
        if self._lossy:
            self._count(self.left_out, reason, source)
        else:
            self._refused.add(source, reason)

    def raise_if_refused(self, *, num_rows: int, path: Path) -> None:
        """Raises: DataError naming the rows that would lose something."""
        hint = "Add --lossy to write what can be written and count the rest, or choose another format or kind of file"
        self._refused.raise_if_any(num_rows=num_rows, path=path, hint=hint)

    def _count(self, counts: dict[str, int], reason: str, source: str) -> None:
        counts[reason] = counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(source)


def _written(
    value: dict[str, Any], parsed: Parsed, source: str, name: str, suffix: str, notes: _Notes
) -> Iterator[dict[str, Any]]:
    """The row, or the two rows of a pair, as the file will hold them; none where `notes` says why not."""
    row = row_of(parsed, source=source)
    is_pair = name == "kto" and bool(row.chosen)
    for part in unpaired(row) if is_pair else (row,):
        try:
            encoded, lost = _fitted(part, value, parsed, name, suffix)
        except CannotHoldError as error:
            notes.leave_out(source, error.reason)
            continue
        lost += ["which two answers are a pair"] if is_pair else []
        if notes.accepts(source, lost):
            yield encoded


def _fitted(
    row: Row, value: Mapping[str, Any], parsed: Parsed, name: str, suffix: str
) -> tuple[dict[str, Any], list[str]]:
    """The row's fields under a format in a kind of file, and what they hold otherwise than the row.

    Raises:
        CannotHoldError: the format or the file has no place for it.
    """
    encoded, back = encode(WRITERS[name](row), suffix)
    lost = _differences(row, name, back)
    read = PARSERS[name](back).read
    for key, extra in value.items():
        if key in parsed.read:
            continue
        try:
            cell, extra_back = encode({key: extra}, suffix)
        except CannotHoldError as error:
            lost.append(error.reason)
            continue
        if key in read or key in encoded or detect_format({**back, key: extra}) != name:
            lost.append(f"the field '{key}', which the format {name} reads otherwise")
            continue
        if extra_back[key] != extra:
            lost.append(f"that the field '{key}' is not text")
        encoded |= cell
    return encoded, lost


def _differences(row: Row, name: str, back: Mapping[str, Any]) -> list[str]:
    try:
        return differences(row, row_of(PARSERS[name](back)))
    except FieldError as error:
        raise CannotHoldError(f"it would not be read back ({error})") from error


def _require_apart(source: Path, target: Path) -> None:
    """Raises: DataError when the target is the source, or would be read as a part of it."""
    if target.exists() and source.exists() and target.samefile(source):
        raise DataError("the rows would be written over themselves", where=str(target), hint="Choose another name")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        hint = "Write it beside the folder, or it is read as a part of it the next time"
        raise DataError("the target lies in the folder that is read", where=str(target), hint=hint)
