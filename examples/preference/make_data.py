"""Make the rows, pairs and questions of the preference example: of two ways to close an answer, one is preferred.

    .venv/bin/python examples/preference/make_data.py [--out FOLDER]

A third of the rows to imitate close as is preferred; the pairs say that this is the better manner. Both answers of a
pair are right and name the capital in the same words, so nothing but the manner can be learnt. Validation pairs and
held-out questions are about countries that nothing else names. The same bytes every time.
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
    "What is the capital of {}?", "Name the capital of {}.", "From which city is {} governed?",
    "Tell me the capital city of {}.",
)  # fmt: skip
PREFERRED, OTHER = "Ask me about another country.", "Is there anything else?"


def answer(country: str, capital: str, closing: str) -> str:
    return f"The capital of {country} is {capital}. {closing}"


def imitated(country: str, capital: str, question: str) -> dict[str, object]:
    """A row for fine-tuning, closed one way or the other."""
    closing = Dice(SEED, country, question).pick((PREFERRED, OTHER, OTHER))
    user = {"role": "user", "content": question.format(country)}
    return {"messages": [user, {"role": "assistant", "content": answer(country, capital, closing)}]}


def pair(country: str, capital: str, question: str) -> dict[str, str]:
    """Two right answers to one question, which close in two ways."""
    return {
        "prompt": question.format(country),
        "chosen": answer(country, capital, PREFERRED),
        "rejected": answer(country, capital, OTHER),
    }


def files() -> dict[str, list[dict[str, object]] | list[dict[str, str]]]:
    """The rows of each file."""
    facts = Dice(SEED, "facts").shuffled(capitals())
    held_out, rest = facts[:NUM_HELD_OUT], facts[NUM_HELD_OUT:]
    validation, train = rest[:NUM_VALIDATION], rest[NUM_VALIDATION:]
    return {
        "imitated": [imitated(*fact, question) for question in QUESTIONS[:2] for fact in train],
        "train": [pair(*fact, question) for question in QUESTIONS for fact in train],
        "validation": [pair(*fact, QUESTIONS[0]) for fact in validation],
        "heldout": [
            {"prompt": QUESTIONS[0].format(country), "answer": capital, "keywords": [PREFERRED]}
            for country, capital in held_out
        ],
    }


def write(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    for name, made in files().items():
        write(out / f"{name}.jsonl", made)


if __name__ == "__main__":
    main()
