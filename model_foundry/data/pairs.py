"""Preference rows to pairs: each answer rendered after the prompt as any other row is, then the two joined.

Knows rows and a renderer; does not know losses, batches or models.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from model_foundry.data.gate.subject import with_answers
from model_foundry.data.rows import BadRows, RowSet
from model_foundry.data.tokenise import MAX_DROPPED_NAMED, LostRow, Overlength, TokenisedSet, attempt_rows
from model_foundry.errors import DataError
from model_foundry.rendering import Renderer
from model_foundry.types import Datum, Pair

SEVERAL_TURNS = "an answer of several turns"
ALIKE = "two answers of the same tokens"


@dataclass(frozen=True, slots=True)
class PairedSet:
    """Pairs that can be trained on.

    Attributes:
        pairs: their datums are pairs (`Pair.joined`), their rows those of the file.
        answers: the rows that the pairs were made of, one with each answer, as `with_answers` orders them.
        num_shared: inputs that are read once for both answers, over all pairs.
    """

    pairs: TokenisedSet
    answers: TokenisedSet
    num_shared: int


def tokenise_pairs(rows: RowSet, renderer: Renderer, *, max_length: int, overlength: Overlength = "drop") -> PairedSet:
    """Render both answers of every row, and join those that can be told apart.

    A row with an answer of several turns is left out and counted: which of its turns is preferred, it does not say.

    Args:
        max_length: longest prompt with one answer in tokens.
        overlength: what happens to a longer one; a pair is dropped with either of its answers.

    Raises:
        DataError: rows that are no pairs, rows that the template refuses, over-long ones under `error`, or none left.
    """
    _require_pairs(rows)
    answers, problems = attempt_rows(
        with_answers(rows), renderer, max_length=max_length, overlength=overlength, train_on="last_assistant"
    )
    bad = BadRows()
    for problem in problems:
        bad.add(problem.source, problem.what)
    hint = next((problem.hint for problem in problems if problem.hint), None)
    bad.raise_if_any(num_rows=len(rows.rows), path=rows.path, hint=hint)
    paired = _join(rows, answers)
    if not paired.pairs.datums:
        why = "; ".join(f"{reason} ({count:,})" for reason, count in paired.pairs.reasons.items())
        first = next(iter(paired.pairs.first_dropped), "not known")
        raise DataError(
            f"no pair is left to train on: {why}",
            where=None if rows.path is None else str(rows.path),
            hint=f"Mend such rows or raise data.max_length; the first is {first}",
        )
    return paired


def _require_pairs(rows: RowSet) -> None:
    for row in rows.rows:
        if not (row.chosen and row.rejected):
            kind = "answers labelled good or bad" if row.label is not None else f"of format {rows.format}"
            raise DataError(
                f"the rows are {kind}, and method dpo learns from pairs",
                where=row.source if rows.path is None else str(rows.path),
                hint='Give {"prompt", "chosen", "rejected"}, or train on answers to imitate with method=sft',
            )


def _join(rows: RowSet, answers: TokenisedSet) -> PairedSet:
    place = {index: datum for datum, index in enumerate(answers.indices.tolist())}
    reasons = {row.index: row for row in answers.lost}
    kept: list[tuple[int, Datum]] = []
    lost: list[LostRow] = []
    num_shared = 0
    for index, row in enumerate(rows.rows):
        halves = (2 * index, 2 * index + 1)
        missing = next((reasons[half] for half in halves if half in reasons), None)
        if max(len(row.chosen), len(row.rejected)) > 1:
            lost.append(LostRow(index, row.source, SEVERAL_TURNS, 0, is_overlong=False))
            continue
        if missing is not None:
            lost.append(replace(missing, index=index, source=row.source))
            continue
        pair = Pair(*(answers.datums[place[half]] for half in halves))
        if np.array_equal(_ids(pair.chosen), _ids(pair.rejected)):
            lost.append(LostRow(index, row.source, ALIKE, pair.chosen.num_tokens + 1, is_overlong=False))
            continue
        kept.append((index, pair.joined()))
        num_shared += pair.num_shared
    several = tuple(row for row in lost if row.reason == SEVERAL_TURNS)
    # The gate judges the answers, and has to see what is left out of them.
    answers = replace(answers, lost=(*answers.lost, *several))
    return PairedSet(_paired(rows, answers, kept, lost, place), answers, num_shared)


def _paired(
    rows: RowSet, answers: TokenisedSet, kept: list[tuple[int, Datum]], lost: list[LostRow], place: dict[int, int]
) -> TokenisedSet:
    both = np.array([[place[2 * index], place[2 * index + 1]] for index, _ in kept], dtype=np.int64).reshape(-1, 2)
    full, escaped = answers.full_lengths[both], np.any(answers.escaped[both], axis=1)
    cut = full > answers.lengths[both] + 1
    datums = tuple(datum for _, datum in kept)
    named = lost[:MAX_DROPPED_NAMED]
    return TokenisedSet(
        datums=datums,
        sources=tuple(rows.rows[index].source for index, _ in kept),
        num_rows=len(rows.rows),
        num_dropped=len(lost),
        num_truncated=int(cut.any(axis=1).sum()),
        num_escaped=int(np.count_nonzero(escaped)),
        num_tokens=sum(datum.num_tokens for datum in datums),
        num_trained_tokens=sum(int(np.count_nonzero(datum.loss_inputs["weights"])) for datum in datums),
        reasons=dict(Counter(row.reason for row in lost)),
        first_dropped=tuple(f"{row.source}: {row.reason} ({row.num_tokens:,} tokens)" for row in named),
        indices=np.array([index for index, _ in kept], dtype=np.int64),
        full_lengths=full.max(axis=1) if kept else full.reshape(-1),
        escaped=np.asarray(escaped),
        lost=tuple(lost),
    )


def _ids(datum: Datum) -> np.ndarray:
    return np.concatenate([datum.tokens[:1], datum.loss_inputs["target_tokens"]])
