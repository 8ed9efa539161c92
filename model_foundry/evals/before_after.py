"""What training did to the answers: case by case, and beyond what luck alone would show.

A model that merely answers differently also answers some questions better. So every share comes with an interval over
the questions and a noise floor: the share of cases that would count as improved had nothing been learned. What is
gained above the floor is judged question by question (paired bootstrap; Efron and Tibshirani 1993), and not at all for
fewer than six. Knows texts and numbers; nothing of models or files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.errors import FoundryError
from model_foundry.evals import statistics
from model_foundry.evals.metrics import METRICS, Score, mean_scores, score

IMPROVED, SAME, WORSE = "improved", "same", "worse"
MAX_OTHER_ANSWERS, MAX_SHUFFLED_PAIRS = 40, 40_000
"""Each answer is held against so many other questions' expected answers at most, fewer where there are many."""
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Case:
    """One question with both answers, their scores, and which way it went."""

    prompt: str
    expected: str
    before: str
    after: str
    before_score: Score
    after_score: Score
    change: str
    source: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "expected": self.expected,
            "before": self.before,
            "after": self.after,
            "before_scores": self.before_score.as_dict(),
            "after_scores": self.after_score.as_dict(),
            "change": self.change,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """All cases, and what they amount to. Shares are of the cases, in [0, 1].

    Attributes:
        cases: in the order asked.
        metric: the score that decided what counts as improved.
        improved: the share that scored higher afterwards; `same` and `worse` likewise.
        interval: 95 % interval of `improved` (Wilson 1927: unlike a bootstrap, it knows that 5 of 5 is not yet all).
        noise: how large a share counts as improved by luck alone, by how that was estimated (see `compare`).
        margin_interval: 95 % of resampled question sets have an improved minus largest noise within this; None for
            fewer than six questions.
        change_interval: likewise for the mean change in score.
        verdict: improved, worse, or unclear when the intervals reach into the noise, or there are none.
    """

    cases: tuple[Case, ...]
    metric: str
    improved: float
    same: float
    worse: float
    interval: tuple[float, float]
    noise: Mapping[str, float]
    margin_interval: statistics.Interval | None
    change_interval: statistics.Interval | None
    verdict: str

    @property
    def noise_floor(self) -> float:
        return max(self.noise.values())

    @property
    def before(self) -> dict[str, float]:
        return mean_scores([case.before_score for case in self.cases])

    @property
    def after(self) -> dict[str, float]:
        return mean_scores([case.after_score for case in self.cases])

    def count(self, change: str) -> int:
        return sum(case.change == change for case in self.cases)

    def as_dict(self) -> dict[str, Any]:
        """What report.json holds under "evaluation"."""
        return {
            "metric": self.metric,
            "num_cases": len(self.cases),
            "verdict": self.verdict,
            "before": self.before,
            "after": self.after,
            "improved": self.improved,
            "same": self.same,
            "worse": self.worse,
            "interval": list(self.interval),
            "noise": dict(self.noise),
            "noise_floor": self.noise_floor,
            "margin_interval": None if self.margin_interval is None else list(self.margin_interval),
            "change_interval": None if self.change_interval is None else list(self.change_interval),
            "cases": [case.as_dict() for case in self.cases],
        }


def compare(
    prompts: Sequence[str],
    *,
    expected: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    repeats: Sequence[Sequence[str]] = (),
    sources: Sequence[str] = (),
    metric: str = "f1",
    seed: int = 0,
) -> Comparison:
    """Compare the answers before and after training, question by question.

    The noise floor is the largest of up to three estimates of what luck does:
    `worse`: chance makes as many answers better as worse, so as many as got worse got better by chance.
    `shuffled`: the share improved when both answers are held against other questions' expected answers; what is gained
    there is length and manner, not knowledge. Left out when all expected answers are equal.
    `repeated`: the share improved between two decodings of the untrained model; only with `repeats`.

    Args:
        prompts, expected, before, after: one text a question.
        repeats: further answers of the model before training, decoded another way (other batches, other seeds).
        sources: "file:line" of each question, if known.
        metric: a name in `metrics.METRICS`.
        seed: seeds the resampling; the same seed gives the same numbers.

    Raises:
        FoundryError: no questions, sequences of different lengths, or an unknown metric.
    """
    _check_lengths(prompts, (expected, before, after, *repeats, *([sources] if sources else [])))
    if metric not in METRICS:
        raise FoundryError(f"there is no metric '{metric}'", hint=f"Metrics: {', '.join(METRICS)}")
    cases = tuple(
        _case(*texts, metric=metric)
        for texts in zip(prompts, expected, before, after, sources or [""] * len(prompts), strict=True)
    )
    gains = np.array([getattr(case.after_score, metric) - getattr(case.before_score, metric) for case in cases])
    improved = (gains > _TOLERANCE).astype(float)
    worse = (gains < -_TOLERANCE).astype(float)
    luck = {"worse": worse}
    if len(set(expected)) > 1:
        luck["shuffled"] = _shuffled_luck(expected, before, after, metric=metric, seed=seed)
    if repeats:
        luck["repeated"] = _repeated_luck(expected, before, repeats, metric=metric)
    floor = max(luck.values(), key=lambda shares: float(shares.mean()))
    interval = statistics.share_interval(int(improved.sum()), len(cases))
    margin, change = (_interval_of_mean(values, seed=seed) for values in (improved - floor, gains))
    return Comparison(
        cases=cases,
        metric=metric,
        improved=float(improved.mean()),
        same=float(1 - improved.mean() - worse.mean()),
        worse=float(worse.mean()),
        interval=interval,
        noise={name: float(shares.mean()) for name, shares in luck.items()},
        margin_interval=margin,
        change_interval=change,
        verdict=_verdict(interval[0] - float(floor.mean()), margin, change),
    )


def _interval_of_mean(values: np.ndarray, *, seed: int) -> statistics.Interval | None:
    """Bootstrap interval of the mean of float [num_cases]; one seed draws the same questions whatever the values."""
    rows = np.stack([values, np.ones(len(values))], axis=1)
    return statistics.interval(rows, lambda sums: sums[..., 0] / sums[..., 1], seed=seed)


def _case(prompt: str, expected: str, before: str, after: str, source: str, *, metric: str) -> Case:
    before_score, after_score = score(before, expected), score(after, expected)
    gain = getattr(after_score, metric) - getattr(before_score, metric)
    change = SAME if abs(gain) <= _TOLERANCE else IMPROVED if gain > 0 else WORSE
    return Case(prompt, expected, before, after, before_score, after_score, change, source)


def _shuffled_luck(
    expected: Sequence[str], before: Sequence[str], after: Sequence[str], *, metric: str, seed: int
) -> np.ndarray:
    """float [num_cases]: how often an answer counts as improved against other questions' expected answers."""
    measure = METRICS[metric]
    random_source = np.random.Generator(np.random.Philox(key=seed + 1))
    others = sorted(set(expected))
    most = min(MAX_OTHER_ANSWERS, max(2, MAX_SHUFFLED_PAIRS // len(expected)))
    shares = np.zeros(len(expected))
    for index, own in enumerate(expected):
        places = np.arange(len(others) - 1)
        if len(places) > most:
            places = random_source.choice(len(places), most, replace=False, shuffle=False)
        own_place = bisect_left(others, own)
        pool = [others[place + (place >= own_place)] for place in places]
        gains = [measure(after[index], other) - measure(before[index], other) for other in pool]
        shares[index] = float(np.mean([gain > _TOLERANCE for gain in gains]))
    return shares


def _repeated_luck(
    expected: Sequence[str], before: Sequence[str], repeats: Sequence[Sequence[str]], *, metric: str
) -> np.ndarray:
    """float [num_cases]: half of how often a repeat scores differently; it could have gone either way."""
    measure = METRICS[metric]
    first = np.array([measure(text, own) for text, own in zip(before, expected, strict=True)])
    shares = np.zeros(len(expected))
    for answers in repeats:
        scores = np.array([measure(text, own) for text, own in zip(answers, expected, strict=True)])
        shares += (np.abs(scores - first) > _TOLERANCE) / 2
    return shares / len(repeats)


def _verdict(share_margin: float, margin: statistics.Interval | None, change: statistics.Interval | None) -> str:
    if margin is None or change is None:
        return "unclear"
    if share_margin > 0 and margin[0] > 0 and change[0] > 0:
        return IMPROVED
    return WORSE if change[1] < 0 else "unclear"


def _check_lengths(prompts: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    if not prompts:
        raise FoundryError("there are no questions to compare", hint="Give held-out questions in evaluation.file")
    lengths = {len(prompts), *(len(column) for column in columns)}
    if len(lengths) > 1:
        raise FoundryError(f"questions and answers do not match: {sorted(lengths)} of them")
