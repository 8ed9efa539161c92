"""Train or validation, decided by a document's own content.

The same document falls on the same side wherever it stands, in whatever order and beside whatever else; a document that
comes twice cannot fall on both. Knows no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Part = Literal["all", "train", "validation"]


@dataclass(frozen=True, slots=True)
class Split:
    """One side of a corpus: `validation` is the share of all documents, by number, whose hash is lowest."""

    part: Part = "all"
    validation_share: float = 0.0

    def holds(self, pieces: Iterable[str]) -> bool:
        """Whether a document, given in pieces, is on this side."""
        if self.part == "all":
            return True
        return (place_of(pieces) < self.validation_share) == (self.part == "validation")


def place_of(pieces: Iterable[str]) -> float:
    """Where a document's SHA-256 lies among all that are possible, from 0 up to 1."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:7], "big") / (1 << 56)
