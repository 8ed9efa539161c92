"""Chat rows of which three in ten are copies of earlier ones, changed at known rates, and which of them are duplicates.

Words are drawn by Zipf's law from a made-up vocabulary in which common words are short, lengths are log-normal around
90 words, as chat logs are. A copy changes a share of its words (0 to 20 %), or only case and white space.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COPIED_SHARE = 0.3
CHANGE_RATES = (0.0, 0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.2)
MEDIAN_WORDS, SIGMA, SHORTEST, LONGEST = 90, 0.75, 8, 800
VOCABULARY = 30_000
TOKEN = re.compile(r"\w+|[^\w\s]")
_ONSETS, _NUCLEI, _CODAS = (
    ("", "b", "d", "f", "l", "m", "n", "r", "s", "st", "t", "v"),
    "aeiou",
    ("", "", "n", "r", "s"),
)


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """Texts, and for each the row that it was copied from in the end (itself where it is no copy)."""

    texts: list[str]
    family: list[int]


def make_rows(*, num_rows: int, seed: int) -> CopiedRows:
    chance, generator = random.Random(seed), np.random.default_rng(seed)
    words = _vocabulary(chance)
    weights = 1.0 / np.arange(3, VOCABULARY + 3)
    lengths = np.exp(generator.normal(math.log(MEDIAN_WORDS), SIGMA, num_rows)).clip(SHORTEST, LONGEST).astype(int)
    drawn = iter(generator.choice(VOCABULARY, size=int(lengths.sum()), p=weights / weights.sum()).tolist())
    rows: list[list[str]] = []
    family: list[int] = []
    for index, length in enumerate(lengths.tolist()):
        if rows and chance.random() < COPIED_SHARE:
            source = chance.randrange(index)
            rate = chance.choice(CHANGE_RATES)
            rows.append([chance.choice(words) if chance.random() < rate else word for word in rows[source]])
            family.append(family[source])
        else:
            rows.append([_punctuated(words[next(drawn)], chance) for _ in range(length)])
            family.append(index)
    return CopiedRows([_written(row, chance) for row in rows], family)


def true_duplicates(rows: CopiedRows, *, threshold: float) -> list[int]:
    """The rows that are like an earlier kept one, by comparing all pairs within a family with Python's sets.

    Rows of different families share no more than chance gives them; a tool that joins two is counted as wrong.
    """
    sets: dict[int, list[set[tuple[str, ...]]]] = {}
    duplicates = []
    for index, (text, head) in enumerate(zip(rows.texts, rows.family, strict=True)):
        words = TOKEN.findall(text.lower())
        own = set(zip(words, words[1:], words[2:], strict=False))
        kept = sets.setdefault(head, [])
        if any(len(own & other) >= threshold * len(own | other) for other in kept):
            duplicates.append(index)
        else:
            kept.append(own)
    return duplicates


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")


def read_texts(path: str) -> list[str]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _vocabulary(chance: random.Random) -> list[str]:
    """Distinct words, the short ones first."""

    def syllable() -> str:
        return chance.choice(_ONSETS) + chance.choice(_NUCLEI) + chance.choice(_CODAS)

    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        words["".join(syllable() for _ in range(chance.choice((1, 2, 2, 3, 3, 3, 4))))] = None
    return sorted(words, key=len)


def _punctuated(word: str, chance: random.Random) -> str:
    return word + chance.choice(",.,.?:") if chance.random() < 0.12 else word


def _written(words: list[str], chance: random.Random) -> str:
    text = " ".join(words)
    if chance.random() < 0.2:
        text = text.replace(". ", ".\n\n")
    return text.capitalize() if chance.random() < 0.5 else text
