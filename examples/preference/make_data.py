"""Make the pairs and questions of the preference example: a short answer is preferred to a whole sentence.

    .venv/bin/python examples/preference/make_data.py [--out FOLDER]

Both answers of a pair are right, so nothing but the manner can be learnt. Validation pairs and held-out questions are
about countries that no training pair names. The same bytes every time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from model_foundry.data.synth.dice import Dice
from model_foundry.data.synth.facts import capitals

SEED = 5
NUM_VALIDATION, NUM_HELD_OUT = 12, 25
FOLDER = Path(__file__).parent
QUESTIONS = (
    "What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
    "Tell me the capital city of {}.",
)  # fmt: skip
SENTENCES = (
    "The capital of {country} is {capital}.", "The capital city of {country} is {capital}.",
    "{capital} is the capital of {country}.",
)  # fmt: skip


def pair(country: str, capital: str, question: str) -> dict[str, str]:
    """Two right answers to one question, the shorter one preferred."""
    sentence = Dice(SEED, country, question).pick(SENTENCES)
    return {
        "prompt": question.format(country),
        "chosen": capital,
        "rejected": sentence.format(country=country, capital=capital),
    }


def rows() -> dict[str, list[dict[str, str]]]:
    """The rows of each file."""
    facts = Dice(SEED, "facts").shuffled(capitals())
    held_out, rest = facts[:NUM_HELD_OUT], facts[NUM_HELD_OUT:]
    validation, train = rest[:NUM_VALIDATION], rest[NUM_VALIDATION:]
    return {
        "train": [pair(*fact, question) for question in QUESTIONS for fact in train],
        "validation": [pair(*fact, QUESTIONS[0]) for fact in validation],
        "heldout": [{"prompt": QUESTIONS[0].format(country), "answer": capital} for country, capital in held_out],
    }


def write(path: Path, lines: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    for name, made in rows().items():
        write(out / f"{name}.jsonl", made)


if __name__ == "__main__":
    main()
