"""Synthetic rows into files, by the name of their kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_foundry.data.containers import encode, open_container
from model_foundry.data.files import data_suffix
from model_foundry.data.synth.dice import Dice
from model_foundry.data.synth.facts import OBJECTIVE_SETS
from model_foundry.data.synth.tasks import chat_row, instruction_row, kto_row, preference_row, text_row
from model_foundry.errors import DataError

ENDLESS_SETS: dict[str, Callable[[Dice], dict[str, Any]]] = {
    "chat": chat_row,
    "instruction": instruction_row,
    "preference": preference_row,
    "kto": kto_row,
    "text": text_row,
}
KINDS = (*ENDLESS_SETS, *OBJECTIVE_SETS)


@dataclass(frozen=True, slots=True)
class Synthesised:
    """What was written where."""

    kind: str
    seed: int
    out: Path
    num_rows: int
    heldout: Path | None = None
    num_heldout: int = 0


def synthetic_rows(kind: str, *, num_rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a kind that has no end; row n is the same however many are made.

    Raises:
        DataError: there is no such kind.
    """
    if kind not in ENDLESS_SETS:
        raise DataError(f"there is no kind '{kind}' of synthetic rows", hint=f"Choose one of {', '.join(ENDLESS_SETS)}")
    return (ENDLESS_SETS[kind](Dice(seed, kind, index)) for index in range(num_rows))


def write_synthetic(
    kind: str, out: Path, *, num_rows: int, seed: int = 0, heldout: Path | None = None, num_heldout: int = 40
) -> Synthesised:
    """Write rows of a kind, and for the sets with known answers the questions to hold out.

    Args:
        out: the file; its suffix chooses the container.
        heldout: where questions {"prompt", "answer"} go, as `evaluation.file` wants them (.jsonl).

    Raises:
        DataError: there is no such kind, or it has fewer different rows, or no questions.
    """
    if kind not in OBJECTIVE_SETS:
        if heldout is not None:
            hint = f"Only {', '.join(OBJECTIVE_SETS)} have questions with known answers"
            raise DataError(f"{kind} rows have no held-out questions", where=str(heldout), hint=hint)
        _write(synthetic_rows(kind, num_rows=num_rows, seed=seed), out)
        return Synthesised(kind, seed, out, num_rows)
    if heldout is not None and heldout.resolve() == out.resolve():
        raise DataError("rows and questions would be one file", where=str(out), hint="Give --heldout another name")
    if heldout is not None and data_suffix(heldout) != ".jsonl":
        raise DataError("questions are read from JSON Lines", where=str(heldout), hint="Give it the suffix .jsonl")
    # Always held out, so that the training rows do not depend on whether the questions are written.
    rows, questions = OBJECTIVE_SETS[kind](num_rows, min(num_heldout, num_rows), seed)
    _write(rows, out)
    if heldout is not None:
        _write(questions, heldout)
    return Synthesised(kind, seed, out, num_rows, heldout, len(questions) if heldout is not None else 0)


def _write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    suffix = data_suffix(path)
    with open_container(path) as put:
        for row in rows:
            put(encode(row, suffix)[0])
