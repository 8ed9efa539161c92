"""SentencePiece's compiled normalisation rules: a double-array trie of strings, each with what it becomes.

The layout is that of google/sentencepiece (`normalizer.cc`) and s-yata/darts-clone. Knows rules; knows nothing of white
space, pieces or ids. The `Precompiled` normaliser of `tokenizers` reads the same bytes but applies them to grapheme
clusters, takes the shortest rule and drops what follows it, so it is not SentencePiece's normalisation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from model_foundry.errors import ModelError

_MAX_NODES = 1_000_000
_LEAD_BYTES = ((0xF0, 4), (0xE0, 3), (0xC0, 2), (0, 1))


class Trie:
    """The rules, walked from a place in a text. There are hundreds of thousands, so they are never listed.

    Attributes:
        lone: characters that are replaced by themselves.
        first: characters that begin a rule of several characters.
        second: characters that follow the first in one.

    Raises:
        ValueError: the bytes are no such trie.
    """

    def __init__(self, blob: bytes) -> None:
        num_bytes = int.from_bytes(blob[:4], "little")
        if num_bytes % 4 or not 4 <= num_bytes <= len(blob) - 4:
            raise ValueError("its normalisation rules are damaged")
        units = np.frombuffer(blob, dtype="<u4", count=num_bytes // 4, offset=4).astype(np.int64)
        self._units: list[int] = units.tolist()
        self._targets = blob[4 + num_bytes :]
        self._root = _base(0, self._units[0])
        level = _following([self._root], units)
        beyond = _following([node.base for node in level], units)
        self.lone = frozenset(node.character for node in level if node.is_rule)
        self.first = frozenset(level[node.parent].character for node in beyond)
        self.second = frozenset(node.character for node in beyond)

    def longest(self, text: str, place: int) -> tuple[int, str] | None:
        """Where the longest rule that begins at `place` ends, and what it gives; None where none begins.

        Raises:
            ModelError: the rule is damaged.
        """
        units, node, leaf, end = self._units, self._root, -1, place
        for index in range(place, len(text)):
            for byte in text[index].encode("utf-8", "surrogatepass"):
                place_of_byte = node ^ byte
                if place_of_byte >= len(units) or units[place_of_byte] & 0x800000FF != byte:
                    return self._found(end, leaf)
                value = units[place_of_byte]
                node = _base(place_of_byte, value)
            if value >> 8 & 1:
                leaf, end = node, index + 1
        return self._found(end, leaf)

    def _found(self, end: int, leaf: int) -> tuple[int, str] | None:
        if leaf < 0:
            return None
        start = self._units[leaf] & 0x7FFFFFFF if leaf < len(self._units) else len(self._targets)
        stop = self._targets.find(b"\0", start)
        if stop < 0:
            raise ModelError("the normalisation rules of the SentencePiece model are damaged")
        return end, self._targets[start:stop].decode()


@lru_cache(maxsize=4)
def read_charsmap(blob: bytes) -> Trie:
    """The rules in the bytes of a model. Most models carry the same ones, so they are kept.

    Raises:
        ValueError: the bytes are no such trie.
    """
    return Trie(blob)


class CharsMap:
    """Where rules apply to a text: leftmost first, and the longest at each place.

    Args:
        blob: the compiled rules; empty for none.
        kept: strings that no rule touches (user-defined symbols), wherever they begin.
    """

    def __init__(self, blob: bytes, kept: frozenset[str] = frozenset()) -> None:
        self._trie = read_charsmap(blob) if blob else None
        by_length = sorted(kept, key=len, reverse=True)
        self._kept = re.compile("|".join(map(re.escape, by_length))) if kept else None
        # What begins a rule of several characters, as any vowel that an accent may follow does, is not searched for:
        # its second character tells.
        signs = {text[0] for text in kept}
        if self._trie is not None:
            signs |= self._trie.lone | self._trie.second
        self._signs = _class_of(signs) if signs else None

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and replacement of each match, in order."""
        found: list[tuple[int, int, str]] = []
        place = 0
        while self._signs is not None and (sign := self._signs.search(text, place)) is not None:
            at = sign.start()
            match = self._match_before(text, at, place) or self._match_at(text, at)
            place = at + 1
            if match is not None:
                found.append(match)
                place = match[1]
        return found

    def _match_before(self, text: str, at: int, place: int) -> tuple[int, int, str] | None:
        """The rule whose second character is at `at`, if the first is free."""
        trie = self._trie
        if trie is None or at == place or text[at] not in trie.second or text[at - 1] not in trie.first:
            return None
        rule = trie.longest(text, at - 1)
        return None if rule is None else (at - 1, *rule)

    def _match_at(self, text: str, at: int) -> tuple[int, int, str] | None:
        if self._kept is not None and (kept := self._kept.match(text, at)) is not None:
            return at, kept.end(), kept.group()
        rule = None if self._trie is None else self._trie.longest(text, at)
        return None if rule is None else (at, *rule)


def _class_of(characters: set[str]) -> re.Pattern[str]:
    """Finds these characters, and perhaps others above U+FFFF: Python looks those up one by one, 700 times slower."""
    plain = "".join(re.escape(character) for character in sorted(characters) if character <= "\uffff")
    above = "\U00010000-\U0010ffff" if max(characters) > "\uffff" else ""
    return re.compile(f"[{plain}{above}]")


def _num_bytes(lead: int) -> int:
    """UTF-8 bytes of the character that begins with this one."""
    return next(length for least, length in _LEAD_BYTES if lead >= least)


@dataclass(frozen=True, slots=True)
class _Node:
    """A whole character after another node, which is named by its place in a list."""

    parent: int
    character: str
    base: int
    is_rule: bool


def _following(bases: list[int], units: np.ndarray) -> list[_Node]:
    """Every character that follows one of the nodes with these bases.

    Raises:
        ValueError: there are too many, so this is no trie of rules.
    """
    found: list[_Node] = []
    unfinished = [(parent, b"", base) for parent, base in enumerate(bases)]
    num_nodes = 0
    while unfinished:
        rows, labels, places = _children(np.array([base for _, _, base in unfinished]), units)
        num_nodes += len(rows)
        if num_nodes > _MAX_NODES:
            raise ValueError("its normalisation rules do not come to an end")
        deeper: list[tuple[int, bytes, int]] = []
        ends_here = ((units[places] >> 8) & 1).tolist()
        for row, label, base, is_rule in zip(rows, labels, _bases(places, units).tolist(), ends_here, strict=True):
            parent, prefix, _ = unfinished[row]
            text = prefix + bytes((label,))
            if len(text) >= _num_bytes(text[0]):
                found.append(_Node(parent, text.decode(), base, bool(is_rule)))
            else:
                deeper.append((parent, text, base))
        unfinished = deeper
    return found


def _base(place: int, unit: int) -> int:
    """What the children of the node at `place` are counted from."""
    return place ^ ((unit >> 10) << ((unit & 0x200) >> 6))


def _bases(places: np.ndarray, units: np.ndarray) -> np.ndarray:
    """int64 [N]: `_base` of many nodes."""
    values = units[places]
    return places ^ ((values >> 10) << ((values & 0x200) >> 6))


def _children(nodes: np.ndarray, units: np.ndarray) -> tuple[list[int], list[int], np.ndarray]:
    """All children of the nodes with these bases: index of the parent, byte, place."""
    labels = np.arange(1, 256)
    places = nodes[:, None] ^ labels
    inside = places < len(units)
    found = inside & ((units[np.where(inside, places, 0)] & 0x800000FF) == labels)
    parents, columns = np.nonzero(found)
    return parents.tolist(), labels[columns].tolist(), places[parents, columns]
