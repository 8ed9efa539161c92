"""What a run did and what it cost, as lines for people and as JSON: every request and every dollar is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model_foundry.generate.batches import Oddities
from model_foundry.generate.dataset import Tally
from model_foundry.generate.ledger import Ledger, Money
from model_foundry.generate.pricing import dollars


@dataclass(frozen=True)
class Report:
    """The state of a ledger, and of the data set made from it.

    Attributes:
        ceiling: nano-dollars, None where none was given.
        blocked_at: the ceiling that the next request would need, where the ceiling stopped the run.
        tally: None where no data set was written.
        incomplete: batches whose results could not all be had.
    """

    ledger: Path
    counts: Mapping[str, int]
    money: Money
    usage: Mapping[str, int]
    reasons: Mapping[str, int]
    batches: Mapping[str, int]
    ceiling: int | None = None
    blocked_at: int | None = None
    output: Path | None = None
    tally: Tally | None = None
    oddities: Oddities = field(default_factory=Oddities)
    incomplete: int = 0

    @property
    def num_requests(self) -> int:
        return sum(self.counts.values())

    @property
    def is_done(self) -> bool:
        """Whether another run of the same command would have nothing to do, and there are rows."""
        waiting = sum(self.counts[state] for state in ("planned", "submitted", "uncertain", "canceled"))
        return not waiting and not self.incomplete and (self.tally is None or self.tally.rows > 0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ledger": str(self.ledger),
            "requests": {"total": self.num_requests, **self.counts},
            "batches": dict(self.batches),
            "spent_usd": self.money.spent / 1e9,
            "reserved_usd": self.money.reserved / 1e9,
            "lost_at_most_usd": self.money.lost / 1e9,
            "ceiling_usd": None if self.ceiling is None else self.ceiling / 1e9,
            "ceiling_needed_usd": None if self.blocked_at is None else self.blocked_at / 1e9,
            "usage": dict(self.usage),
            "reasons": dict(self.reasons),
            "output": None if self.tally is None else str(self.output),
            "dataset": None if self.tally is None else self.tally.as_dict(),
            "results_repeated": self.oddities.repeated,
            "results_unknown": self.oddities.unknown,
            "results_unreadable": self.oddities.unreadable,
            "batches_incomplete": self.incomplete,
            "done": self.is_done,
        }

    def lines(self) -> list[str]:
        shown = ", ".join(f"{count:,} {state}" for state, count in self.counts.items() if count)
        lines = [f"requests    {self.num_requests:,}: {shown or 'none'}", f"cost        {money_line(self)}"]
        lines += [f"            {count:,} × {reason}" for reason, count in self.reasons.items()]
        if self.tally is not None:
            lines += _tally_lines(self.tally)
            lines.append(f"rows        {self.tally.rows:,} in {self.output}")
        if self.blocked_at is not None:
            lines.append(f"ceiling     reached: the next request needs --max-cost {self.blocked_at / 1e9:.6f} or more")
        if self.incomplete:
            lines.append(
                f"results     of {self.incomplete} batches are not all readable: run again to read them again, or give "
                "them up with --resend-uncertain (the run after that sends them again)"
            )
        odd = self.oddities
        if odd.repeated or odd.unknown or odd.unreadable:
            lines.append(
                f"results     {odd.repeated} repeated, {odd.unknown} of unknown requests, {odd.unreadable} unreadable"
                f"{f' ({odd.example})' if odd.example else ''}"
            )
        if self.counts["uncertain"]:
            lines.append(
                "uncertain   their answers were lost and may have been billed; --resend-uncertain sends them again"
            )
        return lines


def _tally_lines(tally: Tally) -> list[str]:
    lines = [f"replies     {tally.replies:,}, {tally.strict:,} exactly as asked"]
    lines += [f"            {count:,} × reply rejected: {why}" for why, count in tally.rejected_replies.most_common()]
    lines.append(f"questions   {tally.questions:,}")
    lines += [f"            {count:,} × rejected: {why}" for why, count in tally.rejected_questions.most_common()]
    if tally.duplicates_exact or tally.duplicates_near:
        lines.append(f"            {tally.duplicates_exact:,} exact and {tally.duplicates_near:,} near duplicates")
    return lines


def money_line(report: Report) -> str:
    """`$1.23 spent, $0.40 reserved for what is under way, of at most $10.00`."""
    money = report.money
    parts = [f"{dollars(money.spent)} spent"]
    if money.reserved:
        parts.append(f"{dollars(money.reserved)} reserved for what has no answer yet")
    if money.lost:
        parts.append(f"at most {dollars(money.lost)} for answers that were lost")
    ceiling = "" if report.ceiling is None else f", of at most {dollars(report.ceiling)}"
    return ", ".join(parts) + ceiling


def state_of(ledger: Ledger, **extra: Any) -> Report:
    """The report of a ledger as it is."""
    batches: dict[str, int] = {}
    for batch in ledger.batches():
        batches[batch.state] = batches.get(batch.state, 0) + 1
    return Report(
        ledger=ledger.path,
        counts=ledger.counts(),
        money=ledger.money(),
        usage=ledger.usage(),
        reasons=ledger.reasons(),
        batches=batches,
        **extra,
    )


def progress_line(report: Report, *, seconds_left: float | None, batches: int = 0) -> str:
    """One line: how many have an outcome, the cost so far, the ceiling, and the longest it can still take."""
    waiting = report.counts["planned"] + report.counts["submitted"]
    parts = [f"{report.num_requests - waiting:,}/{report.num_requests:,} requests answered"]
    if batches:
        parts.append(f"{batches} batch{'es' if batches != 1 else ''} under way")
    parts.append(money_line(report))
    if seconds_left is not None:
        parts.append(f"{'at most ' if batches else ''}{duration(seconds_left)} left")
    return " · ".join(parts)


def seconds_until(text: str | None, *, now: float) -> float | None:
    """Seconds until an RFC 3339 time of the API; None when there is none."""
    try:
        when = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    if when is None:
        return None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, when.timestamp() - now)


def duration(seconds: float) -> str:
    """`3 h 20 min`, `5 min`, `40 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
