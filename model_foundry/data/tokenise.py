"""Rows to datums: tokens, loss weights, and what became of every row that did not make it.

Knows rows and a renderer; does not know batches, models or files beyond their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from model_foundry.data.rows import BadRows, Row, RowSet
from model_foundry.errors import DataError, UnsafeTemplateError
from model_foundry.rendering import Rendered, Renderer
from model_foundry.types import Datum

Overlength = Literal["drop", "truncate", "error"]
TrainOn = Literal["assistant", "last_assistant", "all"]
ProblemKind = Literal["untrained", "template", "border", "overlong"]
MAX_DROPPED_NAMED = 10
GIANT_ROW_CHARS = 1_000_000
PROGRESS_ROWS = 500


def _no_rows() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that cannot be used: no answers in it, refused by the template, answers that it does not show, too long.

    `num_tokens` is its length where that is the problem, else 0.
    """

    source: str
    what: str
    kind: ProblemKind
    hint: str | None = None
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LostRow:
    """A row that is not trained on.

    Attributes:
        index: its place in the row set.
        source: where it came from.
        reason: why, the same words for all rows of a kind.
        num_tokens: its length; at least so many where that was enough to know.
        is_overlong: whether its length is the reason.
    """

    index: int
    source: str
    reason: str
    num_tokens: int
    is_overlong: bool


@dataclass(frozen=True, slots=True)
class TokenisedSet:
    """A data set the engine can train on.

    Attributes:
        datums: the rows that remain, in file order.
        sources: where each datum came from.
        num_rows: rows read.
        num_dropped: rows left out, by `reasons`.
        num_truncated: rows cut to max_length.
        num_escaped: rows whose text held control tokens, encoded as plain text.
        num_tokens: input tokens over all datums.
        num_trained_tokens: targets with a weight.
        reasons: why rows were left out, and how many each.
        first_dropped: the first few rows left out, by source and reason.
        indices: int64 [num_datums], the place of each datum's row in the row set.
        full_lengths: int64 [num_datums], tokens of each row before truncation.
        escaped: bool [num_datums], which rows `num_escaped` counts.
        lost: every row that was left out.
    """

    datums: tuple[Datum, ...]
    sources: tuple[str, ...]
    num_rows: int
    num_dropped: int
    num_truncated: int
    num_escaped: int
    num_tokens: int
    num_trained_tokens: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    first_dropped: tuple[str, ...] = ()
    indices: np.ndarray = field(default_factory=_no_rows)
    full_lengths: np.ndarray = field(default_factory=_no_rows)
    escaped: np.ndarray = field(default_factory=_no_rows)
    lost: tuple[LostRow, ...] = ()

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_datums]: input tokens of each datum."""
        return np.array([datum.num_tokens for datum in self.datums], dtype=np.int64)


def tokenise_rows(
    rows: RowSet,
    renderer: Renderer,
    *,
    max_length: int,
    overlength: Overlength = "drop",
    train_on: TrainOn = "assistant",
) -> TokenisedSet:
    """Render every row, or refuse them all.

    Args:
        rows: what to render.
        renderer: template and tokenizer.
        max_length: longest row in tokens; a datum has one input token fewer.
        overlength: what happens to a longer row. Truncation keeps the beginning.
        train_on: whose tokens carry the loss. Plain-text rows are trained on throughout.

    Raises:
        DataError: rows of another method, rows without an assistant turn, rows the template refuses, over-long rows
            under `error`, or nothing left to train on.
    """
    made, problems = attempt_rows(rows, renderer, max_length=max_length, overlength=overlength, train_on=train_on)
    bad = BadRows()
    for problem in problems:
        bad.add(problem.source, problem.what)
    hint = next((problem.hint for problem in problems if problem.hint), None)
    bad.raise_if_any(num_rows=len(rows.rows), path=rows.path, hint=hint)
    if not made.datums:
        why = "; ".join(f"{reason} ({count:,})" for reason, count in made.reasons.items())
        raise DataError(
            f"no row is left to train on: {why}",
            where=None if rows.path is None else str(rows.path),
            hint="Raise data.max_length or set data.overlength=truncate; see also data.train_on",
        )
    return made


def attempt_rows(
    rows: RowSet,
    renderer: Renderer,
    *,
    max_length: int,
    overlength: Overlength = "drop",
    train_on: TrainOn = "assistant",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TokenisedSet, tuple[RowProblem, ...]]:
    """What `tokenise_rows` does, with every row that it would refuse named and passed over; nothing may be left.

    Args:
        on_progress: gets the rows done and all of them, every so many rows.

    Raises:
        DataError: the rows are of another method. TemplateError: there is no template for conversations, or one that
            does what it must not.
    """
    _require_imitable(rows)
    if any(row.text is None for row in rows.rows):
        renderer.require_template()
    collector = _Collector(max_length, overlength)
    shows_calls = "tool_calls" in renderer.template_text
    for index, row in enumerate(rows.rows):
        if index % PROGRESS_ROWS == 0:
            on_progress(index, len(rows.rows))
        if row.text is None and train_on != "all" and not any(m.role == "assistant" for m in row.messages):
            what = "no message has the role assistant, so there is nothing to train on"
            collector.problems.append(RowProblem(row.source, what, "untrained"))
            continue
        if not shows_calls and any(message.extra.get("tool_calls") for message in row.messages):
            what = "a turn calls a tool, and the chat template does not show tool calls"
            collector.problems.append(RowProblem(row.source, what, "template"))
            continue
        try:
            at_least = 0 if overlength == "truncate" else _min_tokens(renderer, row)
            if at_least > max_length:
                collector.add_overlong(index, row.source, at_least, "at least ")
            else:
                collector.add(index, row.source, _render(renderer, row, train_on))
        except UnsafeTemplateError:
            raise  # each row would take seconds to fail
        except DataError as error:
            what = error.what if error.where is None else f"{error.where}: {error.what}"
            collector.problems.append(RowProblem(row.source, what, _kind(renderer, row), error.hint))
    return collector.finish(num_rows=len(rows.rows)), tuple(collector.problems)


def _require_imitable(rows: RowSet) -> None:
    """Refuse rows that also hold answers to avoid: trained on as they stand, those would be learned as well."""
    for row in rows.rows:
        if row.chosen or row.label is not None:
            kind = "preference pairs, which method=dpo learns from" if row.chosen else "answers labelled good or bad"
            name = rows.path or "FILE"
            raise DataError(
                f"the rows are {kind}, and method sft imitates all that it reads",
                where=row.source if rows.path is None else str(rows.path),
                hint=f"Keep the good answers with: foundry data convert {name} OUT.jsonl --to messages --lossy",
            )


def _kind(renderer: Renderer, row: Row) -> ProblemKind:
    """Whether the template refuses a row as such, or writes it and does not show what of it is an answer."""
    if row.text is not None:
        return "template"
    try:
        renderer.text(row.messages, tools=row.tools)
    except DataError:
        return "template"
    return "border"


def _render(renderer: Renderer, row: Row, train_on: TrainOn) -> Rendered:
    if row.text is not None:
        return renderer.text_row(row.text)
    return renderer.render(row.messages, train_on=train_on, tools=row.tools)


def _min_tokens(renderer: Renderer, row: Row) -> int:
    """A bound that spares encoding a giant row only to drop it; 0 for rows of ordinary size."""
    if row.text is not None:
        return renderer.min_tokens(row.text) if len(row.text) > GIANT_ROW_CHARS else 0
    if sum(len(message.content) for message in row.messages) <= GIANT_ROW_CHARS:
        return 0
    return renderer.min_tokens(renderer.text(row.messages, tools=row.tools))


class _Collector:
    """Applies the length policy row by row and keeps the counts."""

    def __init__(self, max_length: int, overlength: Overlength) -> None:
        self.problems: list[RowProblem] = []
        self._max_length = max_length
        self._overlength = overlength
        self._datums: list[Datum] = []
        self._sources: list[str] = []
        self._indices: list[int] = []
        self._full_lengths: list[int] = []
        self._escaped: list[bool] = []
        self._lost: list[LostRow] = []
        self._first_dropped: list[str] = []
        self._num_truncated = self._num_trained = 0

    def add(self, index: int, source: str, row: Rendered) -> None:
        tokens, weights = row.tokens, row.weights
        num_tokens, limit = len(tokens), self._max_length
        is_long = num_tokens > limit
        if is_long and self._overlength != "truncate":
            self.add_overlong(index, source, num_tokens)
            return
        if is_long:
            tokens, weights = tokens[:limit], weights[:limit]
        num_trained = int(np.count_nonzero(weights[1:]))
        if num_trained == 0:
            after = " once truncated" if is_long else ""
            self._drop(LostRow(index, source, f"nothing to train on{after}", num_tokens, is_long))
            return
        self._num_truncated += is_long
        self._num_trained += num_trained
        self._datums.append(Datum.from_row(tokens, weights))
        self._sources.append(source)
        self._indices.append(index)
        self._full_lengths.append(num_tokens)
        self._escaped.append(row.escaped)

    def add_overlong(self, index: int, source: str, num_tokens: int, bound: str = "") -> None:
        if self._overlength == "error":
            what = f"{bound}{num_tokens:,} tokens, over data.max_length {self._max_length:,}"
            self.problems.append(RowProblem(source, what, "overlong", num_tokens=num_tokens))
        else:
            self._drop(LostRow(index, source, f"longer than {self._max_length:,} tokens", num_tokens, True), bound)

    def _drop(self, row: LostRow, bound: str = "") -> None:
        self._lost.append(row)
        if len(self._first_dropped) < MAX_DROPPED_NAMED:
            self._first_dropped.append(f"{row.source}: {row.reason} ({bound}{row.num_tokens:,} tokens)")

    def finish(self, *, num_rows: int) -> TokenisedSet:
        return TokenisedSet(
            datums=tuple(self._datums),
            sources=tuple(self._sources),
            num_rows=num_rows,
            num_dropped=len(self._lost),
            num_truncated=self._num_truncated,
            num_escaped=sum(self._escaped),
            num_tokens=sum(datum.num_tokens for datum in self._datums),
            num_trained_tokens=self._num_trained,
            reasons=dict(Counter(row.reason for row in self._lost)),
            first_dropped=tuple(self._first_dropped),
            indices=np.array(self._indices, dtype=np.int64),
            full_lengths=np.array(self._full_lengths, dtype=np.int64),
            escaped=np.array(self._escaped, dtype=bool),
            lost=tuple(self._lost),
        )
