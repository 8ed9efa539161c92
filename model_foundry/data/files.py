"""Any file of rows as a stream of decoded records: JSON Lines, JSON, CSV, TSV, Parquet, text, and folders of these.

Each may also be compressed (.gz, .zst, .bz2, .xz; told by the first bytes). Memory is bounded by one row (Parquet: by
one batch of a row group), whatever the file's size. What cannot be decoded is a record with a problem, named by file
and line; nothing is passed over in silence. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from model_foundry.data.byte_streams import (
    COMPRESSED_SUFFIXES,
    UnreadableError,
    open_binary,
    read_whole,
    split_lines,
    text_chunks,
    utf8_problem,
)
from model_foundry.data.json_stream import list_elements, row_list
from model_foundry.data.tables import read_csv, read_parquet
from model_foundry.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_SKIPPED_NAMED = 5


@dataclass(frozen=True, slots=True)
class Record:
    """One decoded row of any file.

    Attributes:
        source: "file:line", "file row N" for JSON lists and Parquet, or the file where it is a whole text.
        value: the decoded value: a dict for a row, {"text", "path"} for a text file, None where there is a problem.
        problem: why it could not be decoded.
    """

    source: str
    value: Any
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class InputFiles:
    """The files that are read, in order, and those that are not: how many for each reason, and the first few names."""

    files: tuple[Path, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def local_path(name: Path | str) -> Path:
    """Where rows lie on this machine; a data set of the hub (`hf://datasets/org/name`) is fetched first.

    Raises:
        DataError: as `hub.fetch_dataset`.
    """
    if (address := hub_address(name)) is None:
        return Path(name)
    from model_foundry.data.hub import fetch_dataset

    return fetch_dataset(address)


def hub_address(name: Path | str) -> str | None:
    """The address of a data set on the hub, None for a path. A Path has lost one of the two slashes."""
    text = str(name)
    return f"hf://{text[4:].lstrip('/')}" if text.startswith("hf:/") else None


def iter_records(path: Path | str, *, text_suffixes: Collection[str] = TEXT_SUFFIXES) -> Iterator[Record]:
    """Every row of a file, or of all files of a folder.

    The suffix chooses the reader, but a file that begins like Parquet or like a JSON list is read as that. A text file
    is one record. An unknown suffix is read as JSON Lines.

    Args:
        path: a file, a folder, or a data set of the hub.
        text_suffixes: which files are texts; give ".lua" to stream code as it stands.

    Raises:
        DataError: there is no such file, or a folder holds none that can be read. MissingExtraError: the package for
        Parquet or Zstandard is not installed.
    """
    path = local_path(path)
    inputs = find_inputs(path, text_suffixes=text_suffixes)
    if path.is_dir() and not inputs.files:
        skipped = "; ".join(f"{count:,} {reason}" for reason, count in inputs.skipped.items())
        raise DataError(
            f"the folder cannot be read: it holds no file of rows{f' ({skipped})' if skipped else ''}",
            where=str(path),
            hint=f"Rows are {', '.join(ROW_SUFFIXES)}, texts {', '.join(text_suffixes)}; also .gz, .zst, .bz2 and .xz",
        )  # fmt: skip
    for file in inputs.files:
        name = file.relative_to(path).as_posix() if file != path else file.name
        yield from _file_records(file, name, text_suffixes)


def input_files(path: Path | str) -> list[Path]:
    """The files that `iter_records` reads, in its order: [path] for a file."""
    return list(find_inputs(path).files)


def find_inputs(path: Path | str, *, text_suffixes: Collection[str] = TEXT_SUFFIXES) -> InputFiles:
    """Look through a folder and those below it; each file and folder is met once, so links in a circle do no harm.

    Files are sorted by their path. Hidden ones and other suffixes are left out and counted, and so are texts (a
    README.md, say) in a folder that also holds files of rows.
    """
    path = local_path(path)
    if not path.is_dir():
        return InputFiles((path,))
    search = _Search(path)
    search.walk(path)
    rows, texts = [], []
    for file in sorted(search.found, key=lambda file: file.relative_to(path).parts):
        suffix = data_suffix(file)
        if suffix in text_suffixes:
            texts.append(file)
        elif suffix in ROW_SUFFIXES:
            rows.append(file)
        else:
            search.skip(file, f"with the suffix {suffix}" if suffix else "without a suffix")
    if rows:
        for file in texts:
            search.skip(file, "texts beside files of rows")
    examples = {reason: tuple(names[:MAX_SKIPPED_NAMED]) for reason, names in search.skipped.items()}
    counts = {reason: len(names) for reason, names in search.skipped.items()}
    return InputFiles(tuple(rows or texts), counts, examples)


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: `.jsonl` for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class _Search:
    """One walk through folders, remembering what was met and what was left out."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._met: set[tuple[int, int]] = set()
        self.found: list[Path] = []
        self.skipped: dict[str, list[str]] = {}

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(path.relative_to(self._root).as_posix())

    def walk(self, folder: Path) -> None:
        status = folder.stat()
        self._met.add((status.st_dev, status.st_ino))
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            try:
                entries = sorted(folder.iterdir())
            except OSError as error:
                self.skip(folder, f"that cannot be opened ({error.strerror})")
                continue
            waiting += [entry for entry in entries if self._is_folder(entry)]

    def _is_folder(self, path: Path) -> bool:
        """Notes a file; True for a folder still to be read."""
        if path.name.startswith("."):
            self.skip(path, "hidden")
            return False
        try:
            status = path.stat()
        except OSError:
            self.skip(path, "links that lead nowhere")
            return False
        identity = (status.st_dev, status.st_ino)
        if identity in self._met:
            self.skip(path, "links to what is read already")
            return False
        if stat.S_ISDIR(status.st_mode):
            self._met.add(identity)
            return True
        if not stat.S_ISREG(status.st_mode):
            self.skip(path, "that are not plain files")
        else:
            self._met.add(identity)
            self.found.append(path)
        return False


def _file_records(path: Path, name: str, text_suffixes: Collection[str]) -> Iterator[Record]:
    suffix = data_suffix(path)
    if suffix in text_suffixes:
        records = _text_records(path, name)
    elif _is_parquet(path):
        records = _parquet_records(path)
    else:
        records = _READERS.get(suffix, _json_records)(path)
    try:
        yield from records
    except UnreadableError as error:
        yield Record(str(path) if error.line is None else f"{path}:{error.line}", None, error.problem)


def _text_records(path: Path, name: str) -> Iterator[Record]:
    data = read_whole(text_chunks(path))
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(0)) + 1
        raise UnreadableError("not text: a NUL byte, so the file is binary or damaged", line=line)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(f"not UTF-8: byte 0x{data[error.start]:02x}", line=line) from error
    yield Record(str(path), {"text": text, "path": name})


def _line_records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(split_lines(text_chunks(path)), start=1):
        if line.isspace():
            continue
        source = f"{path}:{number}"
        try:
            yield Record(source, orjson.loads(line))
        except orjson.JSONDecodeError as error:
            is_cut = not line.endswith((b"\n", b"\r"))
            yield Record(source, None, _json_problem(line, error, is_cut=is_cut))


def _json_records(path: Path) -> Iterator[Record]:
    """JSON Lines, a JSON list, or (by the suffix .json) an object that holds one list of rows or is the only row."""
    first = _first_character(path)
    if first == b"[":
        yield from _list_records(path, None)
        return
    if first == b"{" and data_suffix(path) == ".json":
        is_whole, field_name = row_list(text_chunks(path))
        if field_name is not None:
            yield from _list_records(path, field_name)
            return
        if is_whole:
            yield _element(path, 1, read_whole(text_chunks(path)))
            return
    yield from _line_records(path)


def _list_records(path: Path, field_name: bytes | None) -> Iterator[Record]:
    for number, element in enumerate(list_elements(text_chunks(path), field=field_name), start=1):
        yield _element(path, number, element)


def _element(path: Path, number: int, data: bytes) -> Record:
    source = f"{path} row {number}"
    try:
        return Record(source, orjson.loads(data))
    except orjson.JSONDecodeError as error:
        return Record(source, None, _json_problem(data, error, is_cut=False))


def _csv_records(path: Path) -> Iterator[Record]:
    delimiter = "\t" if data_suffix(path) == ".tsv" else ","
    for line, row, problem in read_csv(split_lines(text_chunks(path)), delimiter=delimiter):
        yield Record(f"{path}:{line}", row, problem)


def _parquet_records(path: Path) -> Iterator[Record]:
    for number, row in enumerate(read_parquet(path), start=1):
        yield Record(f"{path} row {number}", row)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _parquet_records,
}


def _first_character(path: Path) -> bytes:
    for chunk in text_chunks(path):
        if stripped := chunk.lstrip():
            return stripped[:1]
    return b""


def _is_parquet(path: Path) -> bool:
    with open_binary(path) as file:
        return file.peek(4).startswith(b"PAR1")


def _json_problem(data: bytes, error: orjson.JSONDecodeError, *, is_cut: bool) -> str:
    if (problem := utf8_problem(data)) is not None:
        return problem
    return f"the last line is cut off or not JSON ({error})" if is_cut else f"not JSON ({error})"
