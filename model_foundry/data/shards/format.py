"""How packed shards lie on the disk: plain little-endian arrays, and an index that is written last.

    index.json             what the shards hold, from what they were made, and size and sha256 of every file below
    shard-00000.tokens     uint16 or uint32: token ids
    shard-00000.weights    rows only: a bit a token, lowest bit first, 1 where the token is trained
    shard-00000.starts     uint64: where in this shard each row or document begins, in tokens
    shard-00000.rows       uint64: which record of the input each of them was, counted from 0; in the upper 16 bits
                           which piece of it, where a row was split
    shard-00000.bins       rows only: uint64: the first of the starts that belongs to each bin

Shards of rows hold bins, each at most `max_length` tokens and never over a shard's end. Shards of text hold one stream
of documents; what is cut into chunks of `max_length` is the stream, when it is read. Knows no renderer and no policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.errors import DataError

FORMAT = 1
INDEX_NAME = "index.json"
ROW_ARRAYS = ("tokens", "weights", "starts", "rows", "bins")
TEXT_ARRAYS = ("tokens", "starts", "rows")
PIECE_SHIFT = 48
_AGAIN = "Pack the data again into another folder"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and hex sha256 of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: its counts and its files by name. `num_bins` is 0 in shards of text."""

    num_tokens: int
    num_trained_tokens: int
    num_starts: int
    num_bins: int
    files: Mapping[str, FileEntry]


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the input, record by record.

    Attributes:
        num_records: records read.
        num_rows: rows or documents in the shards.
        num_truncated: rows cut to `max_length`.
        num_split: rows cut into pieces of `max_length`.
        num_escaped: rows whose text held control tokens, encoded as plain text.
        lost: records that are not in the shards, by reason.
        first_lost: the first few of them, by source and reason.
    """

    num_records: int = 0
    num_rows: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_escaped: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    first_lost: tuple[str, ...] = ()

    def plus(self, other: Counts, *, max_named: int = 10) -> Counts:
        reasons = {*self.lost, *other.lost}
        return Counts(
            self.num_records + other.num_records,
            self.num_rows + other.num_rows,
            self.num_truncated + other.num_truncated,
            self.num_split + other.num_split,
            self.num_escaped + other.num_escaped,
            {reason: self.lost.get(reason, 0) + other.lost.get(reason, 0) for reason in sorted(reasons)},
            (*self.first_lost, *other.first_lost)[:max_named],
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "records": self.num_records,
            "rows": self.num_rows,
            "truncated": self.num_truncated,
            "split": self.num_split,
            "escaped": self.num_escaped,
            "lost": dict(self.lost),
            "first_lost": list(self.first_lost),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Counts:
        numbers = (int(values[key]) for key in ("records", "rows", "truncated", "split", "escaped"))
        return Counts(*numbers, lost=dict(values["lost"]), first_lost=tuple(values["first_lost"]))


@dataclass(frozen=True, slots=True)
class Index:
    """What index.json says. `parameters` and `inputs` are the plan that the shards were made by."""

    kind: str
    max_length: int
    token_bytes: int
    parameters: Mapping[str, Any]
    inputs: Mapping[str, FileEntry]
    counts: Counts
    shards: tuple[ShardEntry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_trained_tokens(self) -> int:
        return sum(shard.num_trained_tokens for shard in self.shards)

    def num_bins(self, max_length: int | None = None) -> int:
        """Bins of rows, or chunks of the stream of at most `max_length` tokens (default the index's own)."""
        if self.kind == "rows":
            return sum(shard.num_bins for shard in self.shards)
        return -(-self.num_tokens // (max_length or self.max_length))

    @property
    def fill(self) -> float:
        """Share of the bins' room that tokens take."""
        room = self.num_bins() * self.max_length
        return self.num_tokens / room if room else 0.0


def token_type(token_bytes: int) -> np.dtype[Any]:
    return np.dtype(f"<u{token_bytes}")


def array_type(name: str, token_bytes: int) -> np.dtype[Any]:
    """The element type of one of a shard's arrays."""
    if name == "tokens":
        return token_type(token_bytes)
    return np.dtype("u1") if name == "weights" else np.dtype("<u8")


def array_names(kind: str) -> tuple[str, ...]:
    return ROW_ARRAYS if kind == "rows" else TEXT_ARRAYS


def shard_name(number: int, array: str) -> str:
    return f"shard-{number:05d}.{array}"


def shard_as_json(shard: ShardEntry) -> dict[str, Any]:
    return {
        "tokens": shard.num_tokens,
        "trained_tokens": shard.num_trained_tokens,
        "starts": shard.num_starts,
        "bins": shard.num_bins,
        "files": files_as_json(shard.files),
    }


def shard_from_json(values: Mapping[str, Any]) -> ShardEntry:
    numbers = (int(values[key]) for key in ("tokens", "trained_tokens", "starts", "bins"))
    return ShardEntry(*numbers, files=files_from_json(values["files"]))


def files_as_json(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {name: {"bytes": entry.num_bytes, "sha256": entry.sha256} for name, entry in files.items()}


def files_from_json(values: Mapping[str, Any]) -> dict[str, FileEntry]:
    return {name: FileEntry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in values.items()}


def encode_index(index: Index) -> bytes:
    """The bytes of index.json: the same for the same shards, whenever and wherever they were made."""
    body = {
        "format": FORMAT,
        "kind": index.kind,
        "max_length": index.max_length,
        "token_bytes": index.token_bytes,
        "tokens": index.num_tokens,
        "trained_tokens": index.num_trained_tokens,
        "bins": index.num_bins(),
        "fill": round(index.fill, 6),
        "parameters": dict(index.parameters),
        "inputs": files_as_json(index.inputs),
        "counts": index.counts.as_json(),
        "shards": [shard_as_json(shard) for shard in index.shards],
    }
    return encode_json({**body, "sha256": hashlib.sha256(encode_json(body)).hexdigest()})


def encode_json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"


def read_index(folder: Path) -> Index:
    """Read and check index.json itself, not the shards.

    Raises:
        DataError: there is none, it is damaged, or a version that is not known here wrote it.
    """
    path = folder / INDEX_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        hint = "Make them with: foundry data pack FILE --out FOLDER"
        raise DataError(f"these are no packed shards: there is no {INDEX_NAME}", where=str(folder), hint=hint) from None
    except OSError as error:
        raise DataError(f"the index cannot be read: {error.strerror}", where=str(path)) from error
    try:
        values = json.loads(data)
        if values["format"] != FORMAT:
            raise DataError(f"shards of format {values['format']!r} are not known here", where=str(path), hint=_AGAIN)
        digest = values.pop("sha256")
        if hashlib.sha256(encode_json(values)).hexdigest() != digest:
            raise DataError("the index is damaged: its sha256 does not match", where=str(path), hint=_AGAIN)
        return Index(
            kind=values["kind"],
            max_length=values["max_length"],
            token_bytes=values["token_bytes"],
            parameters=values["parameters"],
            inputs=files_from_json(values["inputs"]),
            counts=Counts.from_json(values["counts"]),
            shards=tuple(shard_from_json(shard) for shard in values["shards"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("the index is damaged: not what was written", where=str(path), hint=_AGAIN) from error


def check_files(folder: Path, shards: tuple[ShardEntry, ...], *, hashes: bool = False) -> None:
    """Hold every file of the shards against the index: its size, and with `hashes` every byte.

    Raises:
        DataError: naming the first file that is missing, has another size, or has other bytes.
    """
    for shard in shards:
        for name, entry in shard.files.items():
            path = folder / name
            try:
                num_bytes = path.stat().st_size
            except FileNotFoundError:
                raise DataError(f"the shard file {name} is missing", where=str(folder), hint=_AGAIN) from None
            if num_bytes != entry.num_bytes:
                what = f"the shard file {name} has {num_bytes:,} bytes, not {entry.num_bytes:,}"
                raise DataError(what, where=str(folder), hint=_AGAIN)
            if hashes and hash_of(path) != entry.sha256:
                what = f"the shard file {name} is damaged: its sha256 is not {entry.sha256}"
                raise DataError(what, where=str(folder), hint=_AGAIN)


def hash_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_array(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """A file as a read-only array of one dimension, nothing of it read yet."""
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
