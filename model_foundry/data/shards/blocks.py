"""The input as blocks: a few hundred records each, the same blocks whoever reads them and wherever reading starts.

Documents of text too long for one encoding are cut into sections where no token can reach across. Memory is bounded by
a block and a section. Knows files and a place to cut; knows no tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from model_foundry.data.byte_streams import UnreadableError, text_chunks
from model_foundry.data.fields import describe
from model_foundry.data.files import TEXT_SUFFIXES, Record, data_suffix, iter_records
from model_foundry.data.shards.split import Split

MAX_BLOCK_RECORDS = 512
MAX_BLOCK_CHARS = 1 << 20
MAX_SECTION_CHARS = 1 << 17
MAX_UNCUT_CHARS = 1 << 23
"""A longer stretch of text in which no place to cut is found cannot be used."""

ALL = Split()
CutPlace = Callable[[str], int]
"""The last place in a text where it may be cut without changing a token, 0 where none is known."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading stands: whole files read, records of the next one, records in all, sections of the next record."""

    num_files: int = 0
    num_in_file: int = 0
    num_records: int = 0
    num_sections: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """A document of text, or a part of one. `problem` instead of text where it cannot be used."""

    row: int
    source: str
    text: str
    is_first: bool = True
    is_last: bool = True
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records or sections.

    Attributes:
        items: what is to be encoded.
        first_row: number of the first record, over all files.
        after: where reading stands behind this block.
        num_chars: roughly how much text it holds.
    """

    items: tuple[Record, ...] | tuple[Section, ...]
    first_row: int
    after: Place
    num_chars: int


def row_blocks(files: Sequence[Path], start: Place) -> Iterator[Block]:
    """Records of every format, in blocks.

    Raises:
        DataError: a file cannot be opened. MissingExtraError: the package for its format is not installed.
    """
    items: list[Record] = []
    num_chars, place = 0, start
    for record, after in _records(files, start, iter_records):
        items.append(record)
        num_chars += rough_chars(record.value)
        if len(items) >= MAX_BLOCK_RECORDS or num_chars >= MAX_BLOCK_CHARS:
            yield Block(tuple(items), place.num_records, after, num_chars)
            items, num_chars, place = [], 0, after
    if items:
        yield Block(tuple(items), place.num_records, after, num_chars)


def text_blocks(
    files: Sequence[Path], start: Place, *, text_field: str, cut_place: CutPlace, split: Split = ALL
) -> Iterator[Block]:
    """Documents of text, in blocks: a text file is one document, a row of another file is one in `text_field`.

    Args:
        split: the side of the corpus to read; a record that is no document is on the side of training.

    Raises:
        DataError: a file cannot be opened. MissingExtraError: the package for its format is not installed.
    """

    def read(file: Path) -> Iterator[Record]:
        if data_suffix(file) in TEXT_SUFFIXES:
            yield Record(str(file), _file_pieces(file))
        else:
            yield from iter_records(file)

    items: list[Section] = []
    num_chars, skip, first, place = 0, start.num_sections, start.num_records, start
    for record, after in _records(files, start, read):
        if not _is_on(split, record, files[after.num_files], text_field):
            continue
        row = after.num_records - 1
        within = replace(after, num_in_file=after.num_in_file - 1, num_records=row)
        for number, section in enumerate(_sections(record, row, text_field, cut_place), start=1):
            if number <= skip:
                continue
            items.append(section)
            num_chars += len(section.text)
            place = after if section.is_last else replace(within, num_sections=number)
            if len(items) >= MAX_BLOCK_RECORDS or num_chars >= MAX_BLOCK_CHARS:
                yield Block(tuple(items), first, place, num_chars)
                items, num_chars, first = [], 0, place.num_records
        skip = 0
    if items:
        yield Block(tuple(items), first, place, num_chars)


def _is_on(split: Split, record: Record, file: Path, text_field: str) -> bool:
    if split.part == "all":
        return True
    value = record.value
    if isinstance(value, Iterator):  # it can be read once, and is still to be encoded
        pieces: Iterable[str] = _file_pieces(file)
    elif isinstance(value, dict) and isinstance(value.get(text_field), str):
        pieces = (value[text_field],)
    else:
        return split.part == "train"
    try:
        return split.holds(pieces)
    except UnreadableError:
        return split.part == "train"


def rough_chars(value: Any) -> int:
    """About how many characters a decoded row holds."""
    try:
        return len(orjson.dumps(value))
    except TypeError:  # bytes, dates: what Parquet may hold beside text
        return len(str(value))


def _records(
    files: Sequence[Path], start: Place, read: Callable[[Path], Iterator[Record]]
) -> Iterator[tuple[Record, Place]]:
    """Every record from `start` on, with the place behind it."""
    num_records = start.num_records
    for index in range(start.num_files, len(files)):
        skip = start.num_in_file if index == start.num_files else 0
        for number, record in enumerate(read(files[index]), start=1):
            if number <= skip:
                continue
            num_records += 1
            yield record, Place(index, number, num_records)


def _file_pieces(path: Path) -> Iterator[str]:
    """A text file, decoded as it is read."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for chunk in text_chunks(path):
        if b"\0" in chunk:
            raise UnreadableError("not text: a NUL byte, so the file is binary or damaged")
        try:
            text = decode(chunk)
        except UnicodeDecodeError as error:
            raise UnreadableError(f"not UTF-8: byte 0x{error.object[error.start]:02x}") from error
        yield text
    try:
        decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UnreadableError("not UTF-8: it ends within a character") from error


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), MAX_SECTION_CHARS):
        yield text[start : start + MAX_SECTION_CHARS]


def _sections(record: Record, row: int, text_field: str, cut_place: CutPlace) -> Iterator[Section]:
    value, problem = record.value, record.problem
    if problem is None and not isinstance(value, (dict, Iterator)):
        problem = f"{describe(value)} where an object was expected"
    elif problem is None and isinstance(value, dict) and not isinstance(value.get(text_field), str):
        found = describe(value[text_field]) if text_field in value else "nothing"
        problem = f"{text_field}: {found} where text was expected"
    if problem is not None:
        yield Section(row, record.source, "", problem=problem)
        return
    pieces = _slices(value[text_field]) if isinstance(value, dict) else value
    text, is_first = "", True
    try:
        for piece in pieces:
            text += piece
            while len(text) > MAX_SECTION_CHARS:
                if (end := cut_place(text[:MAX_SECTION_CHARS]) or cut_place(text)) == 0:
                    break
                yield Section(row, record.source, text[:end], is_first, False)
                text, is_first = text[end:], False
            if len(text) > MAX_UNCUT_CHARS:
                raise UnreadableError(f"{MAX_UNCUT_CHARS:,} characters without a place where text may be cut")
    except UnreadableError as error:
        yield Section(row, record.source, "", is_first, True, error.problem)
        return
    yield Section(row, record.source, text, is_first, True)
