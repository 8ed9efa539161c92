"""The order of a generation: plan, estimate, try one, send and collect, make rows. Every step can be the last.

Whatever ends a run (Ctrl-C, a kill, the network, a full disk), the same command goes on from the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.data.code.units import CodeUnit
from model_foundry.errors import ConfigError, DataError, InterruptedRunError
from model_foundry.generate.batches import BatchDriver, BatchLimits
from model_foundry.generate.client import Client
from model_foundry.generate.dataset import RowRules, write_dataset
from model_foundry.generate.estimate import Estimate, estimate
from model_foundry.generate.interruption import leave_on_signals, shielded
from model_foundry.generate.ledger import CeilingReachedError, Ledger
from model_foundry.generate.messages import MessageDriver
from model_foundry.generate.pacing import Pacing
from model_foundry.generate.pricing import dollars
from model_foundry.generate.report import Report, progress_line, seconds_until, state_of
from model_foundry.generate.requests import Recipe, unit_to_json

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """What to generate, from plain values.

    Attributes:
        settings: beside the recipe's, what a ledger must agree with: mode, language, the API's address.
        ceiling: nano-dollars that nothing may pass; None can only be estimated.
        tries: how often a request may be sent in one run when it expires or fails for no fault of its own.
        count_sample: requests that the API's counter is asked about.
    """

    recipe: Recipe
    rules: RowRules
    output: Path
    ledger: Path
    settings: dict[str, Any]
    batch: bool = True
    ceiling: int | None = None
    tries: int = 3
    count_sample: int = 20
    limits: BatchLimits = field(default_factory=BatchLimits)

    @property
    def all_settings(self) -> dict[str, Any]:
        mode = "batch" if self.batch else "messages"
        return {**self.recipe.settings(), "generation.mode": mode, **self.settings}

    @property
    def report_path(self) -> Path:
        return self.output.with_name(f"{self.output.name}.report.json")


@dataclass(frozen=True)
class Asker:
    """How a person is told and asked. `ask` None: nobody is there, so nothing is canceled."""

    say: Callable[[str], None] = lambda line: None
    ask: Callable[[str], bool] | None = None


def dry_run(job: Job, units: Sequence[CodeUnit], *, client: Client | None) -> Estimate:
    """What a run would send and cost. Sends nothing that is paid for, and writes nothing."""
    _check_place(job)
    if not job.ledger.exists():
        return _estimate(job, _distinct(job, units), client, ledger=None)
    with Ledger.open(job.ledger, settings=job.all_settings, read_only=True) as ledger:
        return _estimate(job, _distinct(job, units), client, ledger=ledger)


def status(job: Job) -> Report:
    """How things stand, from the ledger alone; another process may be writing it."""
    with Ledger.open(job.ledger, settings=job.all_settings, read_only=True) as ledger:
        return state_of(ledger, ceiling=job.ceiling)


def generate(
    job: Job,
    units: Sequence[CodeUnit],
    *,
    client: Client,
    pacing: Pacing,
    asker: Asker | None = None,
    resend_uncertain: bool = False,
) -> Report:
    """Send what has no answer yet, collect, and write the rows.

    Raises:
        ConfigError: there is no ceiling, it is too low for one request, or the API refuses key, model or parameters.
        DataError: there are no units, or the ledger is damaged, in use or of another configuration.
        FoundryError: the API or a disk failed for too long. InterruptedRunError: Ctrl-C or SIGTERM.
    """
    asker = asker or Asker()
    _check_place(job)
    distinct = _distinct(job, units)
    if not distinct and not job.ledger.exists():
        raise DataError("the corpus holds no code that could be asked about", hint="Check corpus.roots and its rules")
    if job.ceiling is None:
        raise _no_ceiling(dry_run(job, units, client=client))
    with leave_on_signals(), Ledger.open(job.ledger, settings=job.all_settings) as ledger:
        ledger.add_requests(((key, unit_to_json(unit)) for key, unit in distinct.items()), tries=job.tries)
        orphans = ledger.begin_run(tries=job.tries, resend_uncertain=resend_uncertain)
        if orphans:
            asker.say(f"{orphans} answers were lost when the last run ended; their requests count at the worst case")
        driver = _batch_driver(job, ledger, client, pacing, give_up_missing=resend_uncertain)
        try:
            blocked_at = _send(job, ledger, driver, client, pacing, asker, distinct)
        except KeyboardInterrupt:
            raise _interrupted(ledger, driver, asker) from None
        return _finish(job, ledger, driver, blocked_at)


def cancel(job: Job, *, client: Client, pacing: Pacing, asker: Asker | None = None) -> Report:
    """Cancel what is in flight, wait for its end, and keep what was done before."""
    asker = asker or Asker()
    _check_place(job)
    if not job.ledger.exists():
        raise DataError("there is no ledger, so nothing is in flight", where=str(job.ledger))
    with leave_on_signals(), Ledger.open(job.ledger, settings=job.all_settings) as ledger:
        driver = _batch_driver(job, ledger, client, pacing)
        asker.say(f"{driver.cancel()} batches were asked to stop; waiting for their end")
        while driver.poll() and driver.in_flight():
            pacing.clock.sleep(min(job.limits.poll_seconds, 15.0))
        return _finish(job, ledger, driver, None)


def _send(
    job: Job,
    ledger: Ledger,
    driver: BatchDriver,
    client: Client,
    pacing: Pacing,
    asker: Asker,
    distinct: dict[str, CodeUnit],
) -> int | None:
    """Everything that costs money. Returns the ceiling that would be needed, where the ceiling stopped it."""
    driver.settle()
    messages = MessageDriver(
        ledger, client, job.recipe, ceiling=job.ceiling or 0, pacing=pacing, shield=shielded
    )  # fmt: skip
    if ledger.num_sendable():
        for line in _estimate(job, distinct, client, ledger=ledger).lines():
            asker.say(line)
        if not driver.in_flight() and next(ledger.answered(), None) is None:
            asker.say("trying one request first")
            try:
                messages.probe()
            except CeilingReachedError as error:
                raise ConfigError(
                    f"max_cost {dollars(job.ceiling or 0)} does not allow even one request, which needs "
                    f"{dollars(error.needed)} in the worst case",
                    where="max_cost",
                    hint="Raise max_cost, or lower generation.max_tokens",
                ) from error
    progress = _Progress(job, ledger, pacing, asker)
    if not job.batch:
        messages.send_all(progress.answered)
        return messages.blocked_at
    while True:
        driver.submit()
        if not driver.in_flight() and ledger.unsettled() is None:
            return driver.blocked_at
        progress.waiting(driver)
        if ledger.unsettled() is None:
            pacing.clock.sleep(job.limits.poll_seconds)
            driver.poll()
        driver.settle()


class _Progress:
    """A line now and then: counts, cost so far, the ceiling, time left."""

    def __init__(self, job: Job, ledger: Ledger, pacing: Pacing, asker: Asker) -> None:
        self._job, self._ledger, self._clock, self._asker = job, ledger, pacing.clock, asker
        self._started = self._last = self._clock.monotonic()
        self._num_answered = 0

    def waiting(self, driver: BatchDriver) -> None:
        """Before each look at the batches: they say how far they are only when they have ended."""
        left = [seconds_until(batch.expires_at, now=self._clock.now()) for batch in driver.in_flight()]
        self._say(max((seconds for seconds in left if seconds is not None), default=None), batches=len(left))

    def answered(self) -> None:
        """After each answer of those that are sent one by one."""
        self._num_answered += 1
        now = self._clock.monotonic()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        self._say(self._ledger.num_sendable() * (now - self._started) / self._num_answered)

    def _say(self, seconds_left: float | None, *, batches: int = 0) -> None:
        report = state_of(self._ledger, ceiling=self._job.ceiling)
        self._asker.say(progress_line(report, seconds_left=seconds_left, batches=batches))


def _finish(job: Job, ledger: Ledger, driver: BatchDriver, blocked_at: int | None) -> Report:
    tally = write_dataset(ledger, job.output, job.rules)
    report = state_of(
        ledger,
        ceiling=job.ceiling,
        blocked_at=blocked_at,
        output=job.output,
        tally=tally,
        oddities=driver.oddities,
        incomplete=len(driver.incomplete),
    )
    atomic_write(job.report_path, json.dumps(report.as_dict(), indent=2) + "\n")
    return report


def _interrupted(ledger: Ledger, driver: BatchDriver, asker: Asker) -> InterruptedRunError:
    """Offer to cancel what would be billed on, and say how to go on."""
    open_batches, unsettled = ledger.open_batches(), ledger.unsettled()
    what = "stopped; nothing is under way"
    if open_batches or unsettled is not None:
        num_batches = len(open_batches) + (unsettled is not None)
        what = (
            f"stopped with {ledger.counts()['submitted']:,} requests under way in {num_batches} batches, which go on "
            f"and cost at most {dollars(ledger.money().reserved)}"
        )
        if asker.ask is not None and asker.ask(f"{what[0].upper()}{what[1:]}. Cancel them?"):
            driver.cancel()
            what = "stopped, and what was under way is canceled; what was done before that is kept"
    hint = "Run the same command again to go on" + (
        "; foundry generate CONFIG --cancel cancels what is under way" if ledger.open_batches() else ""
    )
    return InterruptedRunError(what, where=str(ledger.path), hint=hint)


def _batch_driver(
    job: Job, ledger: Ledger, client: Client, pacing: Pacing, *, give_up_missing: bool = False
) -> BatchDriver:
    return BatchDriver(
        ledger,
        client,
        job.recipe,
        ceiling=job.ceiling or 0,
        pacing=pacing,
        limits=job.limits,
        shield=shielded,
        give_up_missing=give_up_missing,
    )


def _distinct(job: Job, units: Iterable[CodeUnit]) -> dict[str, CodeUnit]:
    """Content hash -> the first unit that has it."""
    found: dict[str, CodeUnit] = {}
    for unit in units:
        found.setdefault(job.recipe.key(unit), unit)
    return found


def _estimate(job: Job, distinct: dict[str, CodeUnit], client: Client | None, *, ledger: Ledger | None) -> Estimate:
    waiting, num_done, mean = list(distinct.values()), 0, None
    if ledger is not None:
        sendable = {planned.key for planned in ledger.sendable()}
        known = ledger.keys()
        waiting = [unit for key, unit in distinct.items() if key in sendable or key not in known]
        counts = ledger.counts()
        num_done = sum(counts.values()) - len(sendable)
        num_replies = counts["succeeded"] + counts["rejected"]
        mean = ledger.usage()["output_tokens"] / num_replies if num_replies else None
    return estimate(
        waiting,
        job.recipe,
        batch=job.batch,
        client=client,
        sample=job.count_sample,
        num_done=num_done,
        mean_output_tokens=mean,
    )


def _check_place(job: Job) -> None:
    """A data set without its ledger: what was paid for it is forgotten, and would be paid again."""
    if job.output.exists() and not job.ledger.exists():
        raise DataError(
            f"it is there, and its ledger {job.ledger} is not",
            where=str(job.output),
            hint="Put the ledger back; or, to pay for everything again, move this file away or choose another "
            "output.file",
        )


def _no_ceiling(estimate: Estimate) -> ConfigError:
    return ConfigError(
        f"there is no ceiling: {estimate.num_requests:,} requests cost about {dollars(estimate.expected)}, at the very "
        f"most {dollars(estimate.worst_case)}",
        where="max_cost",
        hint="Give --max-cost USD (or max_cost in the configuration); nothing is sent without one",
    )
