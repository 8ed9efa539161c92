"""Write the demo's data from `facts.txt`: the same bytes for the same seed, every time.

    python examples/demo/make_data.py [--out FOLDER]

Each fact is asked in several wordings. Training sees some of them, bare and behind a few openings; validation and the
held-out questions use wordings that training never sees, so a right answer shows a learned fact, not a learned string.
Needs nothing but Python's standard library; a test holds the files in the repository equal to what this writes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

SEED = 1871
NUM_OPENED_PER_FACT = 3
OPENINGS = (
    "Please tell me:",
    "Quick question:",
    "A visitor asks:",
    "For a quiz:",
    "Do you know this?",
    "I am curious.",
)
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Fact:
    """One answer and the wordings that ask for it, by where they are used."""

    answer: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    heldout: tuple[str, ...]


def read_facts(path: Path) -> list[Fact]:
    """Read blocks of `= answer`, `- training`, `v validation` and `? held-out` lines."""
    facts: list[Fact] = []
    blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip())
    for block in blocks:
        wordings: dict[str, list[str]] = {"=": [], "-": [], "v": [], "?": []}
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            marker, _, text = line.partition(" ")
            if marker not in wordings:
                raise SystemExit(f"{path}: a line must start with =, -, v or ?: {line!r}")
            wordings[marker].append(text.strip())
        if wordings["="]:
            (answer,) = wordings["="]
            facts.append(Fact(answer, tuple(wordings["-"]), tuple(wordings["v"]), tuple(wordings["?"])))
    return facts


def normalised(text: str) -> str:
    """Lower case, letters and digits only: two wordings that agree here count as the same question."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def conversation(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def build(facts: list[Fact]) -> dict[str, list[dict[str, object]]]:
    """Rows of every file, by file name."""
    random_source = random.Random(SEED)
    train: list[dict[str, object]] = []
    for fact in facts:
        opened = [
            f"{random_source.choice(OPENINGS)} {wording}"
            for wording in random_source.sample(fact.train, NUM_OPENED_PER_FACT)
        ]
        train += [conversation(question, fact.answer) for question in (*fact.train, *opened)]
    random_source.shuffle(train)
    return {
        "train.jsonl": train,
        "validation.jsonl": [conversation(text, fact.answer) for fact in facts for text in fact.validation],
        "heldout.jsonl": [{"prompt": text, "answer": fact.answer} for fact in facts for text in fact.heldout],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's data.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in build(read_facts(HERE / "facts.txt")).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / name).write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
