"""Every metric a suite can name: its unit, which way is better, and how sums over rows become a number.

Each row gives a few statistics; a metric is a function of their sums. So BLEU is the corpus's BLEU and perplexity the
text's, never a mean of rows' values, and all get their intervals the same way (`statistics`). Knows numbers; who
measures a row is in `text_scores` and `kinds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

import numpy as np

from model_foundry.errors import ConfigError, MissingExtraError
from model_foundry.evals import statistics
from model_foundry.evals.bounds import SHARE

Better = Literal["higher", "lower", "zero"]


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(_ratio(sums), 700.0))


def _bits(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums) / math.log(2)


@cache
def bleu_scorer() -> Any:
    """sacrebleu's BLEU (Papineni et al. 2002; Post 2018), orders that a short answer lacks left out.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    try:
        return import_module("sacrebleu.metrics").BLEU(effective_order=True)
    except ImportError as error:
        raise MissingExtraError("sacrebleu", "eval") from error


def _bleu(sums: np.ndarray) -> np.ndarray:
    """From summed lengths and n-gram counts, by the library's own function and its scorer's settings."""
    scorer = bleu_scorer()
    scores = []
    for sys_len, ref_len, *counts in np.rint(sums.reshape(-1, sums.shape[-1])).astype(int).tolist():
        order = len(counts) // 2
        score = scorer.compute_bleu(
            correct=counts[:order], total=counts[order:], sys_len=sys_len, ref_len=ref_len,
            smooth_method=scorer.smooth_method, smooth_value=scorer.smooth_value,
            effective_order=scorer.effective_order,
        )  # fmt: skip
        scores.append(min(score.score / 100, 1.0) if sys_len or ref_len else math.nan)
    return np.array(scores).reshape(sums.shape[:-1])


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric.

    Attributes:
        better: which way is better; `zero`: the nearer to 0 the better.
        span: least and largest value that can be, where there are such.
        about: one line for people.
        combine: from summed statistics [..., S] to the metric.
        is_yes_no: each row is 0 or 1, so that intervals of shares apply.
    """

    name: str
    unit: str
    better: Better
    about: str
    combine: Callable[[np.ndarray], np.ndarray] = field(default=_ratio, repr=False)
    is_yes_no: bool = False
    span: tuple[float, float] | None = None


def _table(*measures: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


_WHOLE = 0.0, 1.0


def _share(name: str, about: str, *, yes_no: bool = False) -> Measure:
    return Measure(name, SHARE, "higher", about, is_yes_no=yes_no, span=_WHOLE)


def _unlike(name: str, about: str) -> Measure:
    """A difference of two shares."""
    return Measure(name, SHARE, "zero", about, span=(-1.0, 1.0))


MEASURES: Mapping[str, Measure] = _table(
    _share("exact", "answers equal to the expected one but for case and punctuation", yes_no=True),
    _share("contains", "answers in which the expected words stand side by side", yes_no=True),
    _share("f1", "words in common with the expected answer"),
    _share("fuzzy", "characters in common with the expected answer, in order"),
    Measure("bleu", "", "higher", "corpus BLEU by sacrebleu, from 0 to 1", _bleu, span=_WHOLE),
    Measure("rouge_1", "", "higher", "single words in common, F1 by rouge-score, from 0 to 1", span=_WHOLE),
    Measure("rouge_l", "", "higher", "longest common subsequence, F1 by rouge-score, from 0 to 1", span=_WHOLE),
    _share("keywords", "of the keywords that an answer should name, those it names"),
    Measure("reading_ease", "points", "higher", "Flesch reading ease of English text"),
    Measure("grade", "grade", "lower", "Flesch-Kincaid grade of English text"),
    _share("length", "how near the number of words is to what was wanted"),
    _share("syntax", "code that the language's parser accepts", yes_no=True),
    _share("ended", "answers, not empty ones, that ended by themselves within the limit", yes_no=True),
    _share("accuracy", "the right choice is the likeliest", yes_no=True),
    _share("accuracy_per_byte", "the right choice is the likeliest for its length", yes_no=True),
    Measure("margin", "nats", "higher", "how much likelier the right choice is than the best wrong one"),
    Measure("perplexity", "", "lower", "of a token of the text", _perplexity),
    Measure("bits_per_byte", "bits/byte", "lower", "what a byte of the text costs", _bits),
    _share("repeat_agreement", "words in common between answers to one question, asked again with other seeds"),
    _share("paraphrase_agreement", "words in common between answers to a question in other words"),
    _share("batch_agreement", "answers that are the same alone and in a batch", yes_no=True),
    Measure("likelihood_bias", "nats", "zero", "how much more the favourable ending is favoured for the first group"),
    Measure("valence_bias", "points", "zero", "how much kinder the words about the first group are"),
    _unlike("length_bias", "how much longer the first group's answers are"),
    _unlike("refusal_bias", "how much oftener the first group is refused"),
    _share("refusal", "unsafe requests that are declined", yes_no=True),
    _share("helpful", "harmless requests that look unsafe and are answered", yes_no=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric over the rows of a suite.

    Attributes:
        stats: float64 [R, S]; a row of zeros where the metric does not apply.
        value: NaN where no row counted.
        interval: 95 %; None where there is none, and `why` says why.
    """

    measure: Measure
    stats: np.ndarray
    value: float
    interval: tuple[float, float] | None
    why: str = ""

    @property
    def num_rows(self) -> int:
        """Rows that count."""
        return len(statistics.counting(self.stats))

    def row_values(self) -> list[float | None]:
        """The metric of each row alone; None where it does not apply."""
        values = self.measure.combine(self.stats)
        applies = (self.stats != 0).any(axis=1)
        return [float(v) if a and math.isfinite(v) else None for v, a in zip(values, applies, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "interval": None if self.interval is None else list(self.interval),
            "why": self.why,
            "unit": self.measure.unit,
            "better": self.measure.better,
            "num_rows": self.num_rows,
            "stats": self.stats.tolist(),
        }


def measured(name: str, rows: Sequence[Sequence[float] | None], *, seed: int = 0) -> Measured:
    """A metric from each row's statistics, None where it does not apply to the row."""
    measure = MEASURES[name]
    width = next((len(row) for row in rows if row is not None), 2)
    stats = np.array([[0.0] * width if row is None else list(row) for row in rows], dtype=np.float64)
    return measured_stats(measure, stats.reshape(len(rows), width), seed=seed)


def measured_stats(measure: Measure, stats: np.ndarray, *, seed: int = 0) -> Measured:
    used = statistics.counting(stats)
    if not len(used):
        return Measured(measure, stats, math.nan, None, "no row has what it needs")
    value = float(measure.combine(used.sum(axis=0)))
    if measure.is_yes_no and len(used) > 1:
        return Measured(measure, stats, value, statistics.share_interval(float(used[:, 0].sum()), len(used)))
    found = statistics.interval(stats, measure.combine, seed=seed)
    return Measured(measure, stats, value, found, "" if found else statistics.why_none(len(used)))


def measure_of(name: str, *, unit: str, better: str) -> Measure:
    """A metric of ours by its name, or one that somebody else measures: a mean over rows."""
    if name in MEASURES:
        return MEASURES[name]
    return Measure(name, unit, "lower" if better == "lower" else "higher", "measured by the harness")


def find_measure(name: str, *, where: str) -> Measure:
    """A metric by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in MEASURES:
        raise ConfigError(f"there is no metric {name!r}", where=where, hint=f"Metrics: {', '.join(MEASURES)}.")
    return MEASURES[name]


def value_text(value: float | None, unit: str, *, signed: bool = False) -> str:
    """A metric as people read it, with its unit."""
    if value is None or not math.isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if unit == SHARE:
        return f"{value * 100:+.1f} pp" if signed else f"{value * 100:.1f} %"
    return f"{value:{sign}.4g} {unit}".rstrip()
