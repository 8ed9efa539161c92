"""Rows to datums: tokens, loss weights, and what became of every row that did not make it.

Knows rows and a renderer; does not know batches, models or files beyond their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from model_foundry.data.rows import BadRows, Row, RowSet
from model_foundry.errors import DataError, UnsafeTemplateError
from model_foundry.rendering import Rendered, Renderer
from model_foundry.types import Datum

Overlength = Literal["drop", "truncate", "error"]
TrainOn = Literal["assistant", "last_assistant", "all"]
MAX_DROPPED_NAMED = 10
GIANT_ROW_CHARS = 1_000_000


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
    """Render every row.

    Args:
        rows: what to render.
        renderer: template and tokenizer.
        max_length: longest row in tokens; a datum has one input token fewer.
        overlength: what happens to a longer row. Truncation keeps the beginning.
        train_on: whose tokens carry the loss. Plain-text rows are trained on throughout.

    Raises:
        DataError: rows without an assistant turn, rows the template refuses, over-long rows under `error`, or
            nothing left to train on.
    """
    if any(row.text is None for row in rows.rows):
        renderer.require_template()
    collector = _Collector(max_length, overlength)
    hint = None
    for row in rows.rows:
        if row.text is None and train_on != "all" and not any(m.role == "assistant" for m in row.messages):
            collector.bad.add(row.source, "no message has the role assistant, so there is nothing to train on")
            continue
        try:
            at_least = 0 if overlength == "truncate" else _min_tokens(renderer, row)
            if at_least > max_length:
                collector.add_overlong(row.source, f"at least {at_least:,} tokens")
            else:
                collector.add(row.source, _render(renderer, row, train_on))
        except UnsafeTemplateError:
            raise  # each row would take seconds to fail
        except DataError as error:
            collector.bad.add(row.source, error.what if error.where is None else f"{error.where}: {error.what}")
            hint = hint or error.hint
    collector.bad.raise_if_any(num_rows=len(rows.rows), path=rows.path, hint=hint)
    return collector.finish(rows)


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
        self.bad = BadRows()
        self._max_length = max_length
        self._overlength = overlength
        self._datums: list[Datum] = []
        self._sources: list[str] = []
        self._reasons: Counter[str] = Counter()
        self._first_dropped: list[str] = []
        self._num_truncated = self._num_escaped = self._num_trained = 0

    def add(self, source: str, row: Rendered) -> None:
        tokens, weights = row.tokens, row.weights
        num_tokens, limit = len(tokens), self._max_length
        is_long = num_tokens > limit
        if is_long and self._overlength != "truncate":
            self.add_overlong(source, f"{num_tokens:,} tokens")
            return
        if is_long:
            tokens, weights = tokens[:limit], weights[:limit]
        num_trained = int(np.count_nonzero(weights[1:]))
        if num_trained == 0:
            after = " once truncated" if is_long else ""
            self._drop(source, f"nothing to train on{after}", f"{num_tokens:,} tokens")
            return
        self._num_truncated += is_long
        self._num_escaped += row.escaped
        self._num_trained += num_trained
        self._datums.append(Datum.from_row(tokens, weights))
        self._sources.append(source)

    def add_overlong(self, source: str, how_long: str) -> None:
        if self._overlength == "error":
            self.bad.add(source, f"{how_long}, over data.max_length {self._max_length:,}")
        else:
            self._drop(source, f"longer than {self._max_length:,} tokens", how_long)

    def _drop(self, source: str, reason: str, detail: str) -> None:
        self._reasons[reason] += 1
        if len(self._first_dropped) < MAX_DROPPED_NAMED:
            self._first_dropped.append(f"{source}: {reason} ({detail})")

    def finish(self, rows: RowSet) -> TokenisedSet:
        if not self._datums:
            why = "; ".join(f"{count:,} {reason}" for reason, count in self._reasons.items())
            raise DataError(
                f"no row is left to train on: {why}",
                where=None if rows.path is None else str(rows.path),
                hint="Raise data.max_length or set data.overlength=truncate; see also data.train_on",
            )
        return TokenisedSet(
            datums=tuple(self._datums),
            sources=tuple(self._sources),
            num_rows=len(rows.rows),
            num_dropped=sum(self._reasons.values()),
            num_truncated=self._num_truncated,
            num_escaped=self._num_escaped,
            num_tokens=sum(datum.num_tokens for datum in self._datums),
            num_trained_tokens=self._num_trained,
            reasons=dict(self._reasons),
            first_dropped=tuple(self._first_dropped),
        )
