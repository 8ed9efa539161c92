"""Rows out of a JSON document of any size: the elements of a list, one at a time, as bytes.

A document is one list of rows, or one object that holds one list of rows ({"version": 1, "data": [...]}). Only the
brackets are read here; each element is decoded by the caller, so that a faulty one is named and the next is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from model_foundry.data.byte_streams import MAX_ROW_BYTES, UnreadableError

ROW_FIELDS = frozenset({"messages", "conversations", "prompt", "chosen", "rejected", "instruction", "text"})
"""An object with one of these is itself a row, whatever lists it holds."""

# A whole string, or the quote of one whose end is not in the buffer yet, or a bracket, comma or colon. Possessive, so
# that a string of 50 MB leaves no backtracking state behind.
_TOKEN = re.compile(rb'"(?:[^"\\]*+(?:\\.[^"\\]*+)*+")?+|[\[\]{},:]', re.DOTALL)
# All that stands before the next bracket: inside an element nothing else matters.
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{}])', re.DOTALL)
_MAX_STEP_BYTES = 32 << 20
_OPENING, _CLOSING = (b"[", b"{"), (b"]", b"}")


class _Scanner:
    """Tokens of a chunked document. What stands before `kept` is forgotten when more is read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self.buffer = b""
        self.position = 0
        self.kept = 0

    def next(self) -> bytes | None:
        """The next bracket, comma, colon or whole string; None at the end of the document."""
        while True:
            match = _TOKEN.search(self.buffer, self.position)
            if match is not None and match[0] != b'"':
                self.position = match.end()
                return match[0]
            self.position = len(self.buffer) if match is None else match.start()
            if not self._read_more():
                return None

    def next_bracket(self) -> bytes | None:
        """The next bracket that is not inside a string; None at the end of the document."""
        while (match := _TO_BRACKET.match(self.buffer, self.position)) is None:
            if not self._read_more():
                return None
        self.position = match.end()
        return match[1]

    def forget(self) -> None:
        self.kept = self.position

    def rest_is_blank(self) -> bool:
        """Whether nothing but white space follows."""
        self.forget()
        while not self.buffer[self.position :].strip():
            self.position = self.kept = len(self.buffer)
            if not self._read_more():
                return True
        return False

    def _read_more(self) -> bool:
        # As much again as is kept, so that a long string is searched for its end a few times and not for every chunk.
        wanted = min(max(1, len(self.buffer) - self.kept), _MAX_STEP_BYTES)
        pieces = [self.buffer[self.kept :]]
        num_new = 0
        for chunk in self._chunks:
            pieces.append(chunk)
            num_new += len(chunk)
            if num_new >= wanted:
                break
        self.buffer = b"".join(pieces)
        self.position -= self.kept
        self.kept = 0
        if len(self.buffer) - num_new > MAX_ROW_BYTES:
            raise UnreadableError(f"a JSON value of more than {MAX_ROW_BYTES:,} bytes, which is not read")
        return num_new > 0


def list_elements(chunks: Iterable[bytes], *, field: bytes | None = None) -> Iterator[bytes]:
    """The elements of a document that is a list, or of the list under `field` of one that is an object.

    Args:
        field: the quoted key, as `row_list` gives it.

    Raises:
        UnreadableError: the document ends inside the list, or goes on after it.
    """
    scanner = _Scanner(chunks)
    scanner.next()
    if field is not None:
        _enter(scanner, field)
    yield from _elements(scanner)
    if field is None and not scanner.rest_is_blank():
        raise UnreadableError("the file is not JSONL, and not a JSON array: something follows the end of the list")


def row_list(chunks: Iterable[bytes]) -> tuple[bool, bytes | None]:
    """How rows stand in a document that begins with an object.

    Returns:
        Whether that object is the whole document, and the quoted key of its only list of objects if it has one and is
        not a row itself.
    """
    scanner = _Scanner(chunks)
    scanner.next()
    keys: set[bytes] = set()
    lists: list[bytes] = []
    key = previous = b""
    depth = 0
    while (token := scanner.next()) is not None:
        scanner.forget()
        if token in _CLOSING:
            if depth == 0:
                break
            depth -= 1
        elif depth == 0 and token == b":":
            key = previous
            keys.add(key)
        elif depth == 1 and token == b"{" and previous == b"[" and key not in lists:
            lists.append(key)
        depth += token in _OPENING
        previous = token
    else:
        return False, None
    is_row = any(name.strip(b'"').decode("utf-8", "replace") in ROW_FIELDS for name in keys)
    whole = scanner.rest_is_blank()
    return whole, lists[0] if whole and len(lists) == 1 and not is_row else None


def _enter(scanner: _Scanner, field: bytes) -> None:
    """Go behind the opening bracket of the list under `field`."""
    depth = 0
    before = previous = b""
    while (token := scanner.next()) is not None:
        scanner.forget()
        if depth == 0 and token == b"[" and previous == b":" and before == field:
            return
        depth += (token in _OPENING) - (token in _CLOSING)
        before, previous = previous, token
    raise UnreadableError("the file has changed while it was read")


def _elements(scanner: _Scanner) -> Iterator[bytes]:
    scanner.forget()
    depth = num_elements = 0
    while (token := scanner.next_bracket() if depth else scanner.next()) is not None:
        if depth == 0 and (token == b"," or token in _CLOSING):
            element = scanner.buffer[scanner.kept : scanner.position - 1].strip()
            scanner.forget()
            if element or token == b"," or num_elements:
                num_elements += 1
                yield element
            if token != b",":
                return
        depth += (token in _OPENING) - (token in _CLOSING)
    raise UnreadableError("the file is not JSONL, and not a JSON array: it ends inside the list")
