"""Bytes of a file as chunks and lines, decompressed by what they are rather than by what they are called.

Memory stays bounded whatever the file holds: a chunk at a time, and no line longer than MAX_ROW_BYTES. Knows gzip,
Zstandard, bzip2, xz, byte order marks and line ends; knows nothing of JSON, tables or rows.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from model_foundry.errors import DataError, MissingExtraError

CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 256 << 20
"""The longest line, JSON value or text file that is read; more is a problem, never a full memory."""
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")

# A Zstandard block of 4 bytes may stand for 128 KB, so this many bytes at once come to 16 MB at the very worst.
_ZSTD_INPUT_BYTES = 512
_XZ_MEMORY_BYTES = 256 << 20  # `xz -9` needs 65 MB, and a file may ask for 4 GB
_BINARY_MAGICS = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x7fELF": "a program",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
    b"GGUF": "a GGUF model",
    b"SQLite format 3": "a database",
    b"ARROW1": "an Arrow file (write it as Parquet)",
    b"PAR1": "a Parquet file",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class UnreadableError(Exception):
    """What stops a file from being read any further, in words; `line` where it is known."""

    def __init__(self, problem: str, *, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


def open_binary(path: Path) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        DataError: it is missing, a folder, or may not be read.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=str(path), hint="Check the path") from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from error


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed where they begin like gzip, Zstandard, bzip2 or xz.

    Raises:
        DataError: as `open_binary`. UnreadableError: the compressed data are damaged or cut off.
        MissingExtraError: Zstandard without the package that reads it.
    """
    with open_binary(path) as file:
        unpack = _unpacking(file.peek(_MAGIC_BYTES))
        try:
            yield from unpack(file)
        except OSError as error:
            raise UnreadableError(f"the file cannot be read: {error.strerror or error}") from error


def is_compressed(path: Path) -> bool:
    """Whether the file begins like gzip, Zstandard, bzip2 or xz."""
    with open_binary(path) as file:
        return _unpacking(file.peek(_MAGIC_BYTES)) is not _plain


def text_chunks(path: Path) -> Iterator[bytes]:
    """`read_chunks` of a file that must hold UTF-8, without its byte order mark.

    Raises:
        UnreadableError: UTF-16, or a known kind of binary file.
    """
    chunks = read_chunks(path)
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= 16:
            break
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableError("the file is UTF-16. Save it as UTF-8")
    for magic, kind in _BINARY_MAGICS.items():
        if first.startswith(magic):
            raise UnreadableError(f"the file is compressed or binary: {kind}")
    if _unpacking(first) is not _plain:
        raise UnreadableError("the file is compressed or binary: it is compressed twice")
    if first := first.removeprefix(_BYTE_ORDER_MARK):
        yield first
    yield from chunks


def split_lines(chunks: Iterable[bytes], *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[bytes]:
    r"""Lines with their ends; \n, \r\n and a lone \r all end one, mixed as they may be.

    Raises:
        UnreadableError: a line longer than `max_bytes`, or one with a NUL byte, by its number.
    """
    number = 1
    for line in _joined_lines(chunks, max_bytes):
        if b"\0" in line:
            raise UnreadableError(
                f"not text: a NUL byte at offset {line.index(0)} of the line, so the file is binary or damaged",
                line=number,
            )
        yield line
        number += 1


def _joined_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    pieces: list[bytes] = []
    num_bytes = num_lines = 0
    for chunk in chunks:
        if pieces and pieces[-1].endswith(b"\r") and not chunk.startswith(b"\n"):
            yield b"".join(pieces)
            num_lines += 1
            pieces, num_bytes = [], 0
        lines = chunk.splitlines(keepends=True)
        last = len(lines) - 1
        for index, line in enumerate(lines):
            pieces.append(line)
            num_bytes += len(line)
            if num_bytes > max_bytes:
                raise UnreadableError(f"a line of more than {max_bytes:,} bytes, which is not read", line=num_lines + 1)
            if line.endswith(b"\n") or (line.endswith(b"\r") and index < last):
                yield line if len(pieces) == 1 else b"".join(pieces)
                num_lines += 1
                pieces, num_bytes = [], 0
    if pieces:
        yield b"".join(pieces)


def read_whole(chunks: Iterable[bytes], *, max_bytes: int = MAX_ROW_BYTES) -> bytes:
    """All bytes at once.

    Raises:
        UnreadableError: there are more than `max_bytes`.
    """
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > max_bytes:
            raise UnreadableError(f"more than {max_bytes:,} bytes in one row, which is not read")
    return bytes(data)


def utf8_problem(data: bytes) -> str | None:
    """Where bytes stop being UTF-8, None where they are."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as problem:
        return f"not UTF-8: byte 0x{data[problem.start]:02x} at offset {problem.start} of the line"
    return None


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from _plain(gzip.GzipFile(fileobj=file))  # pyright: ignore[reportArgumentType]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(f"the file is compressed or binary, and not whole gzip data: {error}") from error


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data") from error
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    try:
        while data := file.read(_ZSTD_INPUT_BYTES):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                chunk = frame.decompress(data)
                for start in range(0, len(chunk), CHUNK_BYTES):
                    yield chunk[start : start + CHUNK_BYTES]
                data = frame.unused_data
    except zstandard.ZstdError as error:
        raise UnreadableError(f"the Zstandard data are damaged: {error}") from error
    if not frame.eof:
        raise UnreadableError("the Zstandard data are cut off")


def _unbzip2(file: IO[bytes]) -> Iterator[bytes]:
    return _streams(file, bz2.BZ2Decompressor, "bzip2")


def _unxz(file: IO[bytes]) -> Iterator[bytes]:
    return _streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES), "xz")


def _streams(
    file: IO[bytes], start: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], kind: str
) -> Iterator[bytes]:
    """One stream or several end to end, with zeros in between, as both tools write and read them."""
    stream = start()
    while data := file.read(CHUNK_BYTES):
        while data:
            if stream.eof:
                if not (data := data.lstrip(b"\0")):
                    break
                stream = start()
            try:
                chunk = stream.decompress(data, CHUNK_BYTES)
                while chunk:
                    yield chunk
                    chunk = b"" if stream.eof or stream.needs_input else stream.decompress(b"", CHUNK_BYTES)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise UnreadableError(f"the {kind} data are damaged: {error}") from error
            data = stream.unused_data
    if not stream.eof:
        raise UnreadableError(f"the {kind} data are cut off")


_UNPACKERS: dict[re.Pattern[bytes], Callable[[IO[bytes]], Iterator[bytes]]] = {
    re.compile(rb"\x1f\x8b"): _gunzip,
    re.compile(rb"\x28\xb5\x2f\xfd"): _unzstd,
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): _unbzip2,
    re.compile(rb"\xfd7zXZ\0"): _unxz,
}
_MAGIC_BYTES = 16


def _unpacking(head: bytes) -> Callable[[IO[bytes]], Iterator[bytes]]:
    return next((unpack for magic, unpack in _UNPACKERS.items() if magic.match(head)), _plain)
