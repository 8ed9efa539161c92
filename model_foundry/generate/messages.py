"""Sends requests one by one. An answer that is lost leaves its request uncertain: it may have been billed.

There is no list of past messages to look in, so an uncertain request counts at its worst case and is sent again only
when somebody asks for it. Also sends the probe, the one request that finds bad parameters before thousands are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from model_foundry.errors import FoundryError
from model_foundry.generate.batches import custom_id
from model_foundry.generate.client import AnswerLostError, Client, NotSentError, RefusedError
from model_foundry.generate.ledger import CeilingReachedError, Failure, Intent, Ledger, Planned
from model_foundry.generate.pacing import Pacing, refusal
from model_foundry.generate.requests import Recipe, unit_from_json
from model_foundry.generate.results import read_message

MAX_LOST_IN_A_ROW = 3
_OF_THIS_REQUEST = frozenset({400, 413, 422})


class MessageDriver:
    """Sends what a ledger holds, a request at a time.

    Args:
        ceiling: nano-dollars.
        shield: a block during which Ctrl-C waits for the answer that is on its way.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: Client,
        recipe: Recipe,
        *,
        ceiling: int,
        pacing: Pacing,
        shield: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._recipe = recipe
        self._ceiling = ceiling
        self._pacing = pacing
        self._shield = shield
        self._failures = 0
        self.blocked_at: int | None = None

    def probe(self) -> None:
        """Send the first request by itself, at the price of a single one. Its answer is kept like any other.

        Raises:
            CeilingReachedError: not even this one is allowed.
            FoundryError: the API refuses it, or its answer was lost.
        """
        for planned in self._ledger.sendable():
            if not self._send(planned, is_probe=True):
                raise FoundryError(
                    "the answer to the request that is tried first was lost",
                    hint="Run the command again: it tries another one. This one counts at its worst case",
                )
            return

    def send_all(self, on_answer: Callable[[], None] = lambda: None) -> None:
        """Send everything that may be sent. `blocked_at` then is the ceiling that the next one needs, or None.

        Raises:
            FoundryError: the API refuses, or several answers in a row were lost.
        """
        self.blocked_at = None
        num_lost = 0
        for planned in self._ledger.sendable():
            try:
                num_lost = 0 if self._send(planned) else num_lost + 1
            except CeilingReachedError as error:
                self.blocked_at = error.needed
                return
            if num_lost >= MAX_LOST_IN_A_ROW:
                raise FoundryError(
                    f"{num_lost} answers in a row were lost; nothing more is sent into this",
                    hint="Run the command again when the network is back; --resend-uncertain sends those again",
                )
            on_answer()

    def _send(self, planned: Planned, *, is_probe: bool = False) -> bool:
        """Send one request until it has an outcome; whether its answer came."""
        params = self._recipe.params(unit_from_json(planned.unit))
        worst_case = self._recipe.worst_case(params, batch=False)
        while True:
            intent = Intent(planned.key, custom_id(self._ledger, planned), worst_case)
            with self._shield():
                self._ledger.intend_message(intent, ceiling=self._ceiling)
                try:
                    message = self._client.send_message(params)
                except AnswerLostError as error:
                    self._ledger.message_uncertain(intent.custom_id, str(error))
                    self._pacing.say(f"an answer was lost ({error}); its request counts at its worst case")
                    return False
                except (NotSentError, RefusedError) as error:
                    failure = error
                else:
                    reply = read_message(message, price=self._recipe.price, batch=False)
                    self._ledger.record([(intent.custom_id, reply)])
                    self._failures = 0
                    return True
                if isinstance(failure, RefusedError) and failure.status in _OF_THIS_REQUEST and not is_probe:
                    self._ledger.record([(intent.custom_id, Failure("errored", str(failure)[:500], final=True))])
                    return True
                self._ledger.message_not_sent(intent.custom_id)
            if isinstance(failure, RefusedError) and not failure.passes:
                raise refusal(failure, "the request that is tried first" if is_probe else "a request") from failure
            self._failures += 1
            self._pacing.wait(self._failures, failure, "sending a request")
            planned = Planned(planned.key, planned.unit, planned.attempts + 1)
