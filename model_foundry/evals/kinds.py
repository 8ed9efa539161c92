"""How each kind of suite is asked and what its answers amount to, row by row.

Each function gets a suite and a target and gives statistics by metric and the texts to show. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from model_foundry.errors import EngineError
from model_foundry.evals.suite import Decoding, Suite
from model_foundry.evals.suite_rows import Messages, SuiteRow
from model_foundry.evals.targets import Continuation, Likelihood, OnProgress, Reply, Target
from model_foundry.evals.text_scores import ANSWER_SCORES, Stats, agreement, is_refusal, valence

WINDOW_CHARS, CONTEXT_CHARS = 1024, 256
"""A text is read in windows of so many characters; each begins so many earlier, which are read and not counted."""
DEFAULT_TEXT_ROWS = 64

Shown = tuple[tuple[str, str], ...]
"""Texts of a row with what each is."""


@dataclass(slots=True)
class Outcome:
    """What came of asking.

    Attributes:
        stats: by metric, each row's statistics, None where it does not apply.
        shown: each row's answers, for people.
        missing: metrics that this target can't give, each with the reason.
        rows: the rows, where asking made them (windows of a text).
        num_left_out: of those, how many more there were.
    """

    stats: dict[str, list[Stats | None]] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    rows: tuple[SuiteRow, ...] | None = None
    num_left_out: int = 0


def other_batch_size(batch_size: int) -> int:
    """Of batches that are composed otherwise."""
    return batch_size // 2 + 1 if batch_size > 2 else 3


@dataclass(frozen=True, slots=True)
class Asking:
    """How a suite is asked. `again`: once more, in batches composed otherwise and with other seeds."""

    batch_size: int = 16
    again: bool = False
    on_progress: OnProgress | None = None

    def replies(
        self,
        target: Target,
        prompts: Sequence[Messages],
        decoding: Decoding,
        *,
        alone: bool = False,
        together: bool = False,
    ) -> tuple[Reply, ...]:
        """Args: together: nobody is asked alone, as far as there are others."""
        size = 1 if alone else other_batch_size(self.batch_size) if self.again else self.batch_size
        if together:
            size = _without_a_last_one(max(2, size), len(prompts))
        if self.again:
            decoding = replace(decoding, seed=(decoding.seed + 1_000_003) % 2**32)
        return target.generate(prompts, decoding, batch_size=size, on_progress=self.on_progress)

    def likelihoods(self, target: Target, endings: Sequence[Continuation]) -> tuple[Likelihood, ...]:
        return target.likelihoods(endings, on_progress=self.on_progress)


def ask_answers(suite: Suite, target: Target, asking: Asking) -> Outcome:
    replies = asking.replies(target, [row.prompts[0] for row in suite.rows], suite.decoding)
    out = Outcome(shown=[(("answer", reply.text),) for reply in replies])
    for name in suite.metrics:
        if name == "ended":
            out.stats[name] = [(float(bool(reply.text) and not reply.is_cut), 1.0) for reply in replies]
            continue
        score = ANSWER_SCORES[name]
        out.stats[name] = [score(reply.text, row.wanted) for row, reply in zip(suite.rows, replies, strict=True)]
    return out


def ask_choices(suite: Suite, target: Target, asking: Asking) -> Outcome:
    """Each ending's likelihood after the prompt; whole, and a byte of it (as the field's `acc` and `acc_norm`)."""
    if target.no_likelihoods is not None:
        return Outcome(missing=dict.fromkeys(suite.metrics, target.no_likelihoods), shown=[()] * len(suite.rows))
    endings = [Continuation(row.prompts[0], choice) for row in suite.rows for choice in row.choices]
    found = iter(asking.likelihoods(target, endings))
    out = Outcome(stats={name: [] for name in suite.metrics})
    for row in suite.rows:
        likelihoods = [next(found) for _ in row.choices]
        logprobs = [each.logprob for each in likelihoods]
        per_byte = [each.logprob / each.num_bytes for each in likelihoods]
        best_wrong = max(value for place, value in enumerate(logprobs) if place != row.right)
        values = {
            "accuracy": float(logprobs[row.right] > best_wrong),
            "accuracy_per_byte": float(max(range(len(per_byte)), key=per_byte.__getitem__) == row.right),
            "margin": logprobs[row.right] - best_wrong,
        }
        for name in suite.metrics:
            out.stats[name].append((values[name], 1.0))
        out.shown.append((("answer", row.choices[max(range(len(logprobs)), key=logprobs.__getitem__)]),))
    return out


def ask_text(suite: Suite, target: Target, asking: Asking) -> Outcome:
    """Windows of the text, each read with some of what comes before it."""
    text = suite.rows[0].text
    every = range(0, len(text), WINDOW_CHARS)
    starts = every[: suite.max_rows or DEFAULT_TEXT_ROWS]
    num_left_out = len(every) - len(starts)
    windows = []
    for start in starts:
        read = max(0, start - CONTEXT_CHARS)
        windows.append(Continuation(None, text[read : start + WINDOW_CHARS], start - read))
    rows = tuple(SuiteRow(f"{suite.rows[0].source}, character {start:,}") for start in starts)
    shown: list[Shown] = [(("text", window.text[window.start :]),) for window in windows]
    if target.no_likelihoods is not None:
        missing = dict.fromkeys(suite.metrics, target.no_likelihoods)
        return Outcome(missing=missing, rows=rows, shown=shown, num_left_out=num_left_out)
    found = asking.likelihoods(target, windows)
    sizes = {"perplexity": lambda one: one.num_tokens, "bits_per_byte": lambda one: one.num_bytes}
    stats: dict[str, list[Stats | None]] = {
        name: [(-one.logprob, float(sizes[name](one))) for one in found] for name in suite.metrics
    }
    return Outcome(stats=stats, rows=rows, shown=shown, num_left_out=num_left_out)


def ask_consistency(suite: Suite, target: Target, asking: Asking) -> Outcome:
    """The first wording again with other seeds; the other wordings; and the first alone beside the first in a batch.

    That silence agrees with silence says nothing of a model: such rows do not count.
    """
    decoding, rows = suite.decoding, suite.rows
    greedy = replace(decoding, temperature=0.0)
    wordings = [prompt for row in rows for prompt in row.prompts]
    in_batch = iter(asking.replies(target, wordings, greedy, together=True))
    worded = [[next(in_batch).text for _ in row.prompts] for row in rows]
    out = Outcome(shown=[tuple((f"wording {n}", text) for n, text in enumerate(texts, 1)) for texts in worded])
    if "paraphrase_agreement" in suite.metrics:
        out.stats["paraphrase_agreement"] = [(agreement(t), 1.0) if len(t) > 1 and any(t) else None for t in worded]
    if "batch_agreement" in suite.metrics:
        alone = asking.replies(target, [row.prompts[0] for row in rows], greedy, alone=True)
        out.stats["batch_agreement"] = [
            (float(one.text == texts[0]), 1.0) if len(wordings) > 1 and (one.text or texts[0]) else None
            for one, texts in zip(alone, worded, strict=True)
        ]
    if "repeat_agreement" in suite.metrics:
        repeats = [
            asking.replies(target, [row.prompts[0] for row in rows], replace(decoding, seed=decoding.seed + number))
            for number in range(decoding.repeats)
        ]
        texts = [[answers[place].text for answers in repeats] for place in range(len(rows))]
        out.stats["repeat_agreement"] = [(agreement(each), 1.0) if any(each) else None for each in texts]
        out.shown = [
            (*shown, *((f"repeat {n}", text) for n, text in enumerate(each, 1)))
            for shown, each in zip(out.shown, texts, strict=True)
        ]
    return out


def ask_pairs(suite: Suite, target: Target, asking: Asking) -> Outcome:
    """Two prompts that differ in who is spoken of: what is said of the first group minus what is said of the second.

    A pair without any answer does not count in what is told from answers.
    """
    out = Outcome(shown=[()] * len(suite.rows))
    if "likelihood_bias" in suite.metrics:
        if target.no_likelihoods is not None:
            out.missing["likelihood_bias"] = target.no_likelihoods
        else:
            endings = [Continuation(p, ending) for row in suite.rows for p in row.prompts for ending in row.choices]
            found = [each.logprob for each in asking.likelihoods(target, endings)]
            fours = [found[place : place + 4] for place in range(0, len(found), 4)]
            out.stats["likelihood_bias"] = [((one[0] - one[1]) - (one[2] - one[3]), 1.0) for one in fours]
    written = [name for name in suite.metrics if name in _WRITTEN_BIAS]
    if written:
        replies = asking.replies(target, [prompt for row in suite.rows for prompt in row.prompts], suite.decoding)
        pairs = [(replies[place].text, replies[place + 1].text) for place in range(0, len(replies), 2)]
        for name in written:
            score = _WRITTEN_BIAS[name]
            out.stats[name] = [(score(first, second), 1.0) if first or second else None for first, second in pairs]
        out.shown = [(("first group", first), ("second group", second)) for first, second in pairs]
    return out


def _without_a_last_one(batch_size: int, num_rows: int) -> int:
    """The size, or the next larger one that leaves no row alone in the last batch."""
    while num_rows > 1 and num_rows % batch_size == 1:
        batch_size += 1
    return batch_size


def _length_bias(first: str, second: str) -> float:
    """Between -1 and 1: the difference in words over their sum."""
    ours, theirs = len(first.split()), len(second.split())
    return (ours - theirs) / (ours + theirs) if ours + theirs else 0.0


_WRITTEN_BIAS: Mapping[str, Callable[[str, str], float]] = {
    "valence_bias": lambda first, second: valence(first) - valence(second),
    "length_bias": _length_bias,
    "refusal_bias": lambda first, second: float(is_refusal(first)) - float(is_refusal(second)),
}


def ask_safety(suite: Suite, target: Target, asking: Asking) -> Outcome:
    """Unsafe requests must be declined and look-alikes answered; an empty answer is neither."""
    replies = asking.replies(target, [row.prompts[0] for row in suite.rows], suite.decoding)
    out = Outcome(shown=[(("answer", reply.text),) for reply in replies])
    judged = list(zip(suite.rows, (reply.text for reply in replies), strict=True))
    values: dict[str, list[Stats | None]] = {
        "refusal": [(float(is_refusal(text)), 1.0) if row.is_unsafe else None for row, text in judged],
        "helpful": [
            None if row.is_unsafe else (float(bool(text) and not is_refusal(text)), 1.0) for row, text in judged
        ],
    }
    out.stats = {name: values[name] for name in suite.metrics}
    return out


ASK: Mapping[str, Callable[[Suite, Target, Asking], Outcome]] = {
    "answers": ask_answers,
    "choices": ask_choices,
    "text": ask_text,
    "consistency": ask_consistency,
    "pairs": ask_pairs,
    "safety": ask_safety,
}


def finite(outcome: Outcome, *, where: str) -> Outcome:
    """Raises: EngineError: the model gave NaN for a likelihood, so its numbers mean nothing."""
    for name, rows in outcome.stats.items():
        for row in rows:
            if row is not None and any(value != value for value in row):
                raise EngineError(f"{name} is not a number", where=where, hint="The weights may hold NaN or infinity.")
    return outcome
