"""A file of rows without its duplicates: the first of each group stays, and the rest is written down with its reason.

What counts as a duplicate is what the gate counts (`gate.repeats`): rows are compared by what was asked and answered,
without system messages and without lines that many rows share; rows that are only alike must ask alike questions too.
The file is read several times, so that memory holds a few hundred bytes a row and never the rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from model_foundry.checkpoint.atomic import atomic_file
from model_foundry.data.containers import encode, open_container
from model_foundry.data.dedup import Duplicates, find_duplicates
from model_foundry.data.fields import describe
from model_foundry.data.files import Record, data_suffix, find_inputs, iter_records, local_path
from model_foundry.data.gate.repeats import only_same_questions
from model_foundry.data.gate.subject import (
    MIN_SHARED_ROWS,
    MIN_SHARED_SHARE,
    asked_lines,
    comparable_text,
    last_question,
)
from model_foundry.data.rows import BadRows, Row, RowParser, row_of
from model_foundry.data.writers import CannotHoldError
from model_foundry.errors import DataError

MAX_EXAMPLES = 5
_COUNTERS = 1 << 20
_PROGRESS_ROWS = 1000
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Distinct:
    """What became of the rows.

    Attributes:
        examples: of the near duplicates, the first few: source, source of the row it is like, similarity.
        skipped_files: of a folder, why files were not read, with how many each.
    """

    source: Path
    target: Path
    dropped: Path | None
    format: str
    threshold: float
    num_read: int
    num_exact: int
    num_near: int
    examples: tuple[tuple[str, str, float], ...] = ()
    skipped_files: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_kept(self) -> int:
        return self.num_read - self.num_exact - self.num_near

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "dropped": None if self.dropped is None else str(self.dropped),
            "format": self.format,
            "threshold": self.threshold,
            "rows_read": self.num_read,
            "rows_kept": self.num_kept,
            "exact_duplicates": self.num_exact,
            "near_duplicates": self.num_near,
            "examples": [
                {"row": row, "repeats": first, "similarity": round(similarity, 4)}
                for row, first, similarity in self.examples
            ],
            "skipped_files": dict(self.skipped_files),
        }


def write_distinct_rows(
    source: Path | str,
    target: Path,
    *,
    dropped: Path | None = None,
    threshold: float = 0.8,
    seed: int = 0,
    only_field: str | None = None,
    format: str = "auto",
    on_progress: Progress | None = None,
) -> Distinct:
    """Write the rows of `source` that repeat no earlier one to `target`, in their order and as they stand.

    Args:
        dropped: a JSON Lines file for the rest: source, reason, similarity, the row that it repeats, and the row.
        threshold: the Jaccard similarity from which rows are alike, 0.1 to 1.
        only_field: compare this field alone, text or any other value, and nothing else of the row.
        format: a name in `formats.PARSERS`, or `auto`; not read with `only_field`.
        on_progress: told what is being done, the number of rows so far and of all rows where it is known.

    Raises:
        DataError: rows cannot be read (up to ten are named), or cannot be held by the kind of file that `target` is.
            Nothing is written then.
        OSError: a file cannot be written; what was there is untouched.
    """
    source = local_path(source)
    _require_apart(source, target, dropped)
    rows = _Rows(source, format, only_field, on_progress)
    rows.count_lines()
    found = find_duplicates(rows.texts(), threshold=threshold, seed=seed)
    if not found.num_texts:
        raise DataError("there are no rows", where=str(source), hint="Give a file with at least one row")
    if only_field is None:
        found = only_same_questions(found, rows.questions(found))
    examples = _write(rows, found, target, dropped)
    return Distinct(
        source, target, dropped, rows.format, threshold, found.num_texts, found.num_exact, found.num_near, examples,
        find_inputs(source).skipped,
    )  # fmt: skip


class _Rows:
    """The rows of a source, as often as they are asked for; each time they must be the same ones."""

    def __init__(self, source: Path, format: str, only_field: str | None, on_progress: Progress | None) -> None:
        self.source, self._only_field, self._on_progress = source, only_field, on_progress
        self._parser = RowParser(format)
        self._shared: frozenset[str] = frozenset()
        self._num_rows: int | None = None

    @property
    def format(self) -> str:
        return self._parser.format if self._only_field is None else f"the field {self._only_field}"

    def records(self, doing: str) -> Iterator[Record]:
        """Raises: DataError if there are not as many as the time before."""
        count = 0
        for record in iter_records(self.source):
            yield record
            count += 1
            if self._on_progress is not None and count % _PROGRESS_ROWS == 0:
                self._on_progress(doing, count, self._num_rows)
        if self._num_rows not in (None, count):
            raise DataError(
                f"there were {self._num_rows:,} rows, and now there are {count:,}",
                where=str(self.source), hint="Start again when nobody writes to it",
            )  # fmt: skip
        self._num_rows = count

    def count_lines(self) -> None:
        """The first pass: every row must be readable; finds the lines that many questions share.

        Lines are counted by their hash, and by themselves once they may be common: memory does not grow with the rows.
        """
        bad = BadRows()
        by_hash = np.zeros(_COUNTERS, np.int64)
        counts: dict[str, int] = {}
        num_rows = 0
        for record in self.records("checked"):
            num_rows += 1
            for line in self._lines(record, bad):
                if line in counts:
                    counts[line] += 1
                    continue
                place = zlib.crc32(line.encode("utf-8", "surrogatepass")) % _COUNTERS
                by_hash[place] += 1
                if by_hash[place] >= MIN_SHARED_ROWS:
                    counts[line] = int(by_hash[place])
        bad.raise_if_any(num_rows=num_rows, path=self.source)
        least = max(MIN_SHARED_ROWS, MIN_SHARED_SHARE * num_rows)
        self._shared = frozenset(line for line, count in counts.items() if count >= least)

    def texts(self) -> Iterator[str]:
        """What each row is compared by."""
        bad = BadRows()
        for record in self.records("compared"):
            if self._only_field is not None:
                yield self._field_text(record, bad) or ""
            else:
                row = self._row(record, bad)
                yield "" if row is None else comparable_text(row, self._shared)
        bad.raise_if_any(num_rows=self._num_rows or 0, path=self.source)

    def questions(self, found: Duplicates) -> dict[int, str]:
        """What the rows ask that are in a group of several."""
        in_group = np.bincount(found.first, minlength=found.num_texts)[found.first] > 1
        bad = BadRows()
        asked = {}
        for index, record in enumerate(self.records("looked at again")):
            if in_group[index] and (row := self._row(record, bad)) is not None:
                asked[index] = last_question(row, self._shared)
        bad.raise_if_any(num_rows=self._num_rows or 0, path=self.source)
        return asked

    def _row(self, record: Record, bad: BadRows) -> Row | None:
        parsed = self._parser.parse(record, bad)
        return None if parsed is None else row_of(parsed, source=record.source)

    def _lines(self, record: Record, bad: BadRows) -> set[str]:
        if self._only_field is not None:
            self._field_text(record, bad)
            return set()
        row = self._row(record, bad)
        return set() if row is None else asked_lines(row)

    def _field_text(self, record: Record, bad: BadRows) -> str | None:
        name, value = self._only_field, record.value
        if record.problem is not None:
            bad.add(record.source, record.problem)
        elif not isinstance(value, dict):
            bad.add(record.source, f"{describe(value)} where an object was expected")
        elif name not in value:
            fields = ", ".join(map(repr, list(value)[:10])) or "none"
            bad.add(record.source, f"there is no field '{name}', only {fields}")
        elif isinstance(value[name], str):
            return value[name]
        else:
            return orjson.dumps(value[name], option=orjson.OPT_SORT_KEYS).decode()
        return None


def _write(rows: _Rows, found: Duplicates, target: Path, dropped: Path | None) -> tuple[tuple[str, str, float], ...]:
    """The files; the first near duplicates, as `Distinct.examples`."""
    suffix, bad = data_suffix(target), BadRows()
    heads = set(found.first[found.first != np.arange(found.num_texts)].tolist())
    names: dict[int, str] = {}
    examples: list[tuple[str, str, float]] = []
    with ExitStack() as stack:
        put = stack.enter_context(open_container(target))
        put_dropped = None if dropped is None else stack.enter_context(atomic_file(dropped)).write
        for index, record in enumerate(rows.records("written")):
            if index >= found.num_texts:
                continue  # the count of rows is about to be refused
            first, is_exact = int(found.first[index]), bool(found.exact[index])
            if index in heads:
                names[index] = record.source
            if first == index:
                try:
                    put(encode(record.value, suffix)[0])
                except CannotHoldError as error:
                    bad.add(record.source, f"{suffix} cannot hold it: {error.reason}")
                continue
            similarity = float(found.similarity[index])
            if not is_exact and len(examples) < MAX_EXAMPLES:
                examples.append((record.source, names[first], similarity))
            if put_dropped is not None:
                reason = "exact" if is_exact else "near"
                said = {"source": record.source, "reason": reason, "similarity": round(similarity, 4)}
                put_dropped(orjson.dumps({**said, "repeats": names[first], "row": record.value}) + b"\n")
        bad.raise_if_any(num_rows=found.num_texts, path=rows.source, hint="Write .jsonl, which can hold every row")
    return tuple(examples)


def _require_apart(source: Path, target: Path, dropped: Path | None) -> None:
    """Raises: DataError when a file to be written is the source, a part of it, or the other one."""
    if source.exists() and not source.is_file() and not source.is_dir():
        raise DataError("it is read several times, which a pipe cannot be", where=str(source), hint="Save it first")
    if dropped is not None:
        if dropped.resolve() == target.resolve():
            raise DataError("what is kept and what is dropped would go to one file", where=str(target))
        if not dropped.parent.is_dir():
            raise DataError("there is no such folder", where=str(dropped.parent), hint="Make it first")
    for path in (target, dropped):
        if path is None:
            continue
        if path.exists() and source.exists() and path.samefile(source):
            raise DataError("the rows would be written over themselves", where=str(path), hint="Choose another name")
        if source.is_dir() and source.resolve() in path.resolve().parents:
            hint = "Write it beside the folder, or it is read as a part of it the next time"
            raise DataError("the target lies in the folder that is read", where=str(path), hint=hint)
