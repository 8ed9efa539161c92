"""Rows of CSV, TSV and Parquet as dicts, one at a time.

A CSV cell is text, with three exceptions that a header's name decides: `messages`, `conversations`, `tools` and
`history` hold JSON; `prompt`, `completion`, `chosen` and `rejected` hold JSON where the cell is a JSON list of objects,
as a list of messages is; `label` and `kto_tag` are true or false. Knows nothing of row formats beyond those names.
"""

from __future__ import annotations

import base64
import csv
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from model_foundry.data.byte_streams import UnreadableError, is_compressed, open_binary, read_chunks, utf8_problem
from model_foundry.errors import MissingExtraError

JSON_FIELDS = frozenset({"messages", "conversations", "tools", "history"})
MESSAGE_FIELDS = frozenset({"prompt", "completion", "chosen", "rejected"})
TRUTH_FIELDS = frozenset({"label", "kto_tag"})
MAX_CELL_CHARS = 64 << 20
"""The longest cell; the csv module needs four bytes and more for each of its characters."""
MAX_SPOOLED_BYTES = 16 << 30
"""Parquet is read out of order, so a compressed file is first laid out on the disk, up to this size."""
PARQUET_BATCH_ROWS = 256
_PARQUET_BUFFER_BYTES = 1 << 20  # columns are read piece by piece, not a row group at once

_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def read_csv(lines: Iterable[bytes], *, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | None, str | None]]:
    """Rows of a table with a header line.

    Args:
        lines: with their ends, as `split_lines` gives them; a quoted cell may hold line ends.

    Yields:
        The line a row ends on, the row, and None; or the line, None and why the row could not be read.

    Raises:
        UnreadableError: there is no usable header, or a cell that never ends.
    """
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.reader(_decoded(lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UnreadableError(f"not CSV: {error}", line=reader.line_num) from error
        if not cells:
            continue
        if header is None:
            header = _header(cells, reader.line_num)
        elif len(cells) != len(header):
            yield reader.line_num, None, f"{len(cells)} cells where the header has {len(header)}"
        else:
            yield reader.line_num, *_row(header, cells)


def decode_cell(name: str, cell: str) -> Any:
    """What a CSV cell under this header holds; see the module's first lines.

    Raises:
        ValueError: the cell should hold JSON and doesn't.
    """
    if name in JSON_FIELDS:
        return orjson.loads(cell) if cell.strip() else None
    if name in MESSAGE_FIELDS and cell.lstrip().startswith("["):
        try:
            value = orjson.loads(cell)
        except orjson.JSONDecodeError:
            return cell
        return value if value and all(isinstance(item, dict) for item in value) else cell
    if name in TRUTH_FIELDS:
        return _TRUTHS.get(cell.strip().lower(), cell)
    return cell


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file; at most PARQUET_BATCH_ROWS of one row group are decoded at a time.

    All structs of a column have the same fields, null in the rows that have no such field: inside a row's values, a
    field that is null is left out. What JSON has no type for is text: times in ISO 8601, decimals, bytes in base64.

    Raises:
        UnreadableError: the file is damaged, or holds more than MAX_SPOOLED_BYTES once decompressed.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    with _seekable(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(
                file, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES, page_checksum_verification=True
            )
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield {name: _as_json(value) for name, value in row.items()}
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UnreadableError(f"not whole Parquet data: {error}") from error


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items() if item is not None}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    if not is_compressed(path):
        with open_binary(path) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        num_bytes = 0
        for chunk in read_chunks(path):
            num_bytes += len(chunk)
            if num_bytes > MAX_SPOOLED_BYTES:
                raise UnreadableError(f"more than {MAX_SPOOLED_BYTES:,} bytes of Parquet once decompressed")
            file.write(chunk)
        file.seek(0)
        yield file


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(utf8_problem(line) or "not UTF-8", line=number) from error


def _header(cells: list[str], line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UnreadableError(f"the header names {', '.join(map(repr, repeated))} more than once", line=line)
    if "" in names:
        raise UnreadableError("a column of the header has no name", line=line)
    return names


def _row(header: list[str], cells: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    row = {}
    for name, cell in zip(header, cells, strict=True):
        try:
            row[name] = decode_cell(name, cell)
        except ValueError as error:
            return None, f"{name}: not JSON ({error})"
    return row, None
