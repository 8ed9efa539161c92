"""A SentencePiece `.model` file, read without SentencePiece: a protocol buffer of pieces and two short specifications.

The layout is that of `sentencepiece_model.proto` (google/sentencepiece). What would give other ids than SentencePiece
is refused by name, not guessed. Knows the file; does not know how text is encoded with it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from model_foundry.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_HINT = "Give a .model file that SentencePiece wrote, whole"


class PieceType(IntEnum):
    """What a piece is for. Only normal and user-defined ones stand for text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its place is its id. White space in `text` is written `▁`."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `.model` file says.

    Attributes:
        kind: unigram or bpe.
        pieces: the vocabulary, in the order of the ids.
        byte_fallback: a character outside the vocabulary becomes its bytes instead of the unknown piece.
        charsmap: the compiled normalisation rules; empty for none.
        add_dummy_prefix: text begins with a space that it does not have.
        remove_extra_whitespaces: spaces at both ends and repeated ones are removed.
        named: the roles bos_token, eos_token, unk_token and pad_token, where the model has them.
        data: the file's bytes.
    """

    kind: Literal["unigram", "bpe"]
    pieces: tuple[Piece, ...]
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    named: dict[str, str]
    data: bytes = field(repr=False)

    @cached_property
    def unknown_id(self) -> int:
        return next(index for index, piece in enumerate(self.pieces) if piece.type == PieceType.UNKNOWN)

    @cached_property
    def byte_ids(self) -> tuple[int, ...]:
        """The ids of the 256 byte pieces, in the order of the bytes; empty without byte fallback."""
        if not self.byte_fallback:
            return ()
        found = {piece.text: index for index, piece in enumerate(self.pieces) if piece.type == PieceType.BYTE}
        return tuple(found[f"<0x{byte:02X}>"] for byte in range(256))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def of_type(self, type: PieceType) -> dict[str, int]:
        """Text -> id of the pieces of one type."""
        return {piece.text: index for index, piece in enumerate(self.pieces) if piece.type == type}


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `.model` file.

    Raises:
        ModelError: it cannot be read, is damaged, or holds what cannot be encoded as SentencePiece does.
    """
    try:
        return parse_sentencepiece(Path(path).read_bytes())
    except OSError as error:
        what = f"the SentencePiece model cannot be read: {error.strerror}"
        raise ModelError(what, where=str(path), hint=_HINT) from error
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(
            f"this is no SentencePiece model that can be used: {error}", where=str(path), hint=_HINT
        ) from error


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """The model that the bytes of a file hold.

    Raises:
        ValueError (struct.error and UnicodeDecodeError among them): as `read_sentencepiece`, in words.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    back: dict[int, Any] = {}
    for number, value in _fields(memoryview(data)):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number in (2, 3, 5):
            {2: trainer, 3: rules, 5: back}[number].update(_fields(_message(value)))
    kind = _KINDS.get(trainer.get(3, 1), "unknown")
    if kind not in ("unigram", "bpe"):
        raise ValueError(f"its kind is '{kind}', and only unigram and bpe can be encoded")
    if trainer.get(24, 0) or not rules.get(5, 1):
        raise ValueError("it keeps spaces as they are or puts them behind the words, which is not supported")
    if back.get(2):
        raise ValueError("it has rules that rewrite decoded text, which are not supported")
    model = SentencePieceModel(
        kind=kind,
        pieces=tuple(pieces),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=bytes(_message(rules.get(2, memoryview(b"")))),
        add_dummy_prefix=bool(rules.get(3, 1)),
        remove_extra_whitespaces=bool(rules.get(4, 1)),
        named=_named(pieces, trainer),
        data=data,
    )
    _check_pieces(model)
    return model


def _check_pieces(model: SentencePieceModel) -> None:
    counts = Counter(piece.type for piece in model.pieces)
    if counts[PieceType.UNKNOWN] != 1:
        raise ValueError(f"it has {counts[PieceType.UNKNOWN]} unknown pieces among {len(model.pieces):,}, not one")
    if counts[PieceType.UNUSED]:
        raise ValueError(f"{counts[PieceType.UNUSED]:,} of its pieces are switched off, which is not supported")
    texts = Counter(piece.text for piece in model.pieces)
    text, count = texts.most_common(1)[0]
    if count > 1 or "" in texts:
        raise ValueError(f"the piece {text!r} is there {count} times" if count > 1 else "a piece is empty")
    num_bytes = sum(piece.type == PieceType.BYTE and bool(_BYTE_PIECE.fullmatch(piece.text)) for piece in model.pieces)
    if num_bytes != (256 if model.byte_fallback else 0) or num_bytes != counts[PieceType.BYTE]:
        raise ValueError(f"it has {num_bytes} byte pieces, where byte fallback is {model.byte_fallback}")


def _piece(data: memoryview) -> Piece:
    fields = dict(_fields(data))
    text = str(_message(fields.get(1, memoryview(b""))), "utf-8")
    score = fields.get(2, 0.0)
    if not isinstance(score, float):
        raise ValueError(f"the piece {text!r} has no score")
    return Piece(text, score, PieceType(fields.get(3, 1)))


def _named(pieces: list[Piece], trainer: dict[int, Any]) -> dict[str, str]:
    """The control pieces by role. A model may lack any of them, or have another piece under the name."""
    defaults = {"bos_token": (46, "<s>"), "eos_token": (47, "</s>"), "pad_token": (48, "<pad>")}
    control = {piece.text for piece in pieces if piece.type == PieceType.CONTROL}
    unknown = [piece.text for piece in pieces if piece.type == PieceType.UNKNOWN]
    named = {"unk_token": unknown[0]} if unknown else {}
    for role, (number, default) in defaults.items():
        text = str(_message(trainer[number]), "utf-8") if number in trainer else default
        if text in control:
            named[role] = text
    return named


# -- the protocol buffer wire format -----------------------------------------------------------------------------------


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: int, float (fixed32) or memoryview.

    Raises:
        ValueError, struct.error: the bytes are no message, or end within one.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"byte {place} names field 0")
        if wire == _VARINT:
            value, place = _varint(data, place)
        elif wire == _FIXED32:
            (value,) = struct.unpack_from("<f", data, place)
            place += 4
        elif wire == _FIXED64:
            (value,) = struct.unpack_from("<d", data, place)
            place += 8
        elif wire == _BYTES:
            length, place = _varint(data, place)
            value = data[place : place + length]
            place += length
            if len(value) != length:
                raise ValueError("it is cut off")
        else:
            raise ValueError(f"byte {place} is of no known kind")
        yield number, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("it is cut off" if place >= len(data) else f"byte {place} ends no number")


def _message(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number stands where text was expected")
    return value
