"""What the inspector shows, as values: rows token by token, lengths, what is left out and why, repeats, figures.

Everything is taken from the gate's subject, so that what is looked at is what would be trained. Knows no markup and no
terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model_foundry.data.gate.subject import Subject, last_text
from model_foundry.data.gate.verdict import GateReport, excerpt
from model_foundry.data.statistics import PERCENTILES, describe_rows, lengths
from model_foundry.tokenizer import Tokenizer

MAX_ROW_TOKENS = 1500
MAX_NAMED = 12
NUM_BINS = 32


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token: what it adds to the text, whether it is trained, whether it is a control token of the template.

    `text` is empty where the token is only a part of a character; the token that completes it has all of it.
    """

    id: int
    text: str
    is_trained: bool
    is_special: bool


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row as the engine would get it.

    Attributes:
        tokens: its tokens, at most `MAX_ROW_TOKENS`.
        num_tokens: how many it has.
        num_trained: how many of them are trained.
        notes: what there is to say of it: cut off, a repeat, control tokens in its text.
    """

    source: str
    tokens: tuple[ShownToken, ...]
    num_tokens: int
    num_trained: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Histogram:
    """Row lengths in tokens: `kept[i]` and `lost[i]` rows have from `edges[i]` up to under `edges[i + 1]` tokens."""

    edges: tuple[int, ...]
    kept: tuple[int, ...]
    lost: tuple[int, ...]
    limit: int
    percentiles: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that are not trained on, for one reason: how many, and the first of them."""

    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A row that an earlier one says already: exactly, or so much alike."""

    source: str
    first: str
    similarity: float
    excerpt: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """All of it.

    Attributes:
        gate: the gate's verdict on the same rows, its facts included.
        rows: a sample, evenly spread over the file.
        num_rows: rows that are trained on, of which `rows` is the sample.
        num_exact, num_near: rows that repeat an earlier one; `repeats` are the first of them.
        statistics: `statistics.describe_rows`, as JSON values.
    """

    gate: GateReport
    rows: tuple[ShownRow, ...]
    num_rows: int
    histogram: Histogram | None
    left_out: tuple[LeftOut, ...]
    num_exact: int
    num_near: int
    repeats: tuple[Repeat, ...]
    statistics: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        return {**values, "gate": self.gate.as_dict()}


def inspect_rows(subject: Subject, report: GateReport, *, num_shown: int) -> Inspection:
    """Look at what the gate judged.

    Args:
        num_shown: rows to show, spread evenly over those that are trained on.
    """
    repeats = subject.repeats
    return Inspection(
        gate=report,
        rows=tuple(_shown_rows(subject, num_shown)),
        num_rows=len(subject.data.datums),
        histogram=_histogram(subject),
        left_out=tuple(_left_out(subject)),
        num_exact=repeats.num_exact,
        num_near=repeats.num_near,
        repeats=tuple(_repeats(subject)),
        statistics=describe_rows(subject.reading.rows).as_dict(),
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; nothing where it is only a part of a character."""
    texts: list[str] = []
    start, known = 0, ""
    for index in range(len(ids)):
        text = tokenizer.decode(ids[start : index + 1])
        if text.endswith("\ufffd") and not known.endswith("\ufffd") and index - start < 4:
            texts.append("")
            continue
        texts.append(text[len(known) :] if text.startswith(known) else text)
        start, known = index, tokenizer.decode(ids[index : index + 1])
        if known.endswith("\ufffd"):  # the last byte of a character says nothing on its own
            start, known = index + 1, ""
    return texts


def _shown_rows(subject: Subject, num_shown: int) -> Iterator[ShownRow]:
    data, renderer = subject.data, subject.renderer
    num_rows = len(data.datums)
    places = np.linspace(0, num_rows - 1, min(num_shown, num_rows)).astype(int)
    control = set(renderer.stop_token_ids)
    control |= {renderer.tokenizer.special_tokens[t] for t in renderer.tokenizer.control_tokens(renderer.template_text)}
    for place in dict.fromkeys(places.tolist()):
        datum = data.datums[place]
        ids = [int(datum.tokens[0]), *datum.loss_inputs["target_tokens"].tolist()]
        trained = [False, *(datum.loss_inputs["weights"] > 0).tolist()]
        shown = ids[:MAX_ROW_TOKENS]
        tokens = zip(shown, token_texts(renderer.tokenizer, shown), trained, strict=False)
        yield ShownRow(
            source=data.sources[place],
            tokens=tuple(ShownToken(i, text, is_trained, i in control) for i, text, is_trained in tokens),
            num_tokens=len(ids),
            num_trained=sum(trained),
            notes=tuple(_notes(subject, place)),
        )


def _notes(subject: Subject, datum: int) -> Iterator[str]:
    data = subject.data
    full, kept = int(data.full_lengths[datum]), data.datums[datum].num_tokens + 1
    if full > kept:
        yield f"cut off: {full:,} tokens before"
    if data.escaped[datum]:
        yield "control tokens in the text, encoded as plain text"
    if len(subject.rows) == len(subject.rendered.rows):
        row = int(data.indices[datum])
        first = int(subject.repeats.first[row])
        if first != row:
            word = "repeats" if subject.repeats.exact[row] else "is nearly"
            yield f"{word} {subject.rows[first].source}"


def _histogram(subject: Subject) -> Histogram | None:
    kept = subject.data.full_lengths
    lost = np.array([row.num_tokens for row in subject.data.lost], dtype=np.int64)
    every = np.concatenate((kept, lost))
    if not every.size:
        return None
    # A few giants must not squeeze all others into one bar: the last bar holds whatever is longer.
    top = int(max(np.quantile(every, 0.995), min(every.max(), 1.25 * subject.max_length), 1))
    low = int(every.min()) if every.min() > 0.4 * top else 0
    width = _round_up(max(1, -(-(top + 1 - low) // NUM_BINS)))
    edges = np.arange(low - low % width, top + 1 + width, width)
    places = [np.minimum((part - edges[0]) // width, edges.size - 2) for part in (kept, lost)]
    counts = [np.bincount(place, minlength=edges.size - 1) for place in places]
    found = np.percentile(every, list(PERCENTILES.values()))
    return Histogram(
        edges=tuple(edges.tolist()),
        kept=tuple(counts[0].tolist()),
        lost=tuple(counts[1].tolist()),
        limit=subject.max_length,
        percentiles=dict(zip(PERCENTILES, map(float, found), strict=True)) | {"mean": lengths(every.tolist()).mean},
    )


def _round_up(width: int) -> int:
    """The next width that reads well on an axis."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= width:
                return factor * step
        step *= 10


def _left_out(subject: Subject) -> Iterator[LeftOut]:
    """Unreadable rows, rows that cannot be rendered, and rows dropped, by reason."""
    found: dict[str, list[str]] = {}
    for problem in subject.reading.problems:
        reason = "a role that nobody knows" if problem.kind == "role" else "cannot be read"
        found.setdefault(reason, []).append(f"{problem.source}: {problem.what}")
    for problem in subject.problems:
        found.setdefault(_PROBLEMS[problem.kind], []).append(f"{problem.source}: {problem.what}")
    for row in subject.data.lost:
        found.setdefault(row.reason, []).append(f"{row.source}: {row.num_tokens:,} tokens")
    for reason, rows in found.items():
        yield LeftOut(reason, len(rows), tuple(rows[:MAX_NAMED]))


_PROBLEMS = {
    "untrained": "no answer in it",
    "template": "refused by the chat template",
    "border": "the template does not show where its answers are",
    "overlong": "too long, which is an error",
}


def _repeats(subject: Subject) -> Iterator[Repeat]:
    repeats, rows = subject.repeats, subject.rows
    for index in np.flatnonzero(repeats.first != np.arange(repeats.num_texts))[:MAX_NAMED].tolist():
        first = rows[int(repeats.first[index])].source
        yield Repeat(rows[index].source, first, float(repeats.similarity[index]), excerpt(last_text(rows[index])))
