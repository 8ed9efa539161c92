"""A command line that torchrun started several times: rank 0 runs it, the others do what its engine asks of them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from model_foundry.errors import FoundryError, UsageError

if TYPE_CHECKING:
    from model_foundry.engine.ranks import Ranks

SHARED_VERBS = ("train", "resume")


def run_as_rank(run: Callable[[], int], arguments: Sequence[str]) -> int:
    """`run` on rank 0; its exit code. The others are quiet: what goes wrong there, rank 0 says.

    Raises:
        UsageError: a verb that is for one process. Whatever `run` raises.
    """
    from model_foundry.engine.ranks import joined

    with joined() as ranks:
        if not ranks.is_first:
            return _follow(ranks)
        if arguments[0] not in SHARED_VERBS:
            what = f"foundry {arguments[0]} runs in one process, and torchrun started {ranks.size}"
            raise UsageError(what, hint=f"Without torchrun; with it: {', '.join(SHARED_VERBS)}.")
        return run()


def _follow(ranks: Ranks) -> int:
    from model_foundry.engine.sharded_engine import follow

    # Rank 0 decides what a signal means; when it leaves, so do we.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("model_foundry").setLevel(logging.CRITICAL)
    try:
        follow(ranks)
    except FoundryError as error:
        return error.exit_code
    return 0
