"""Questions of some 50 tokens that nobody has asked before, for benchmarks of generation and serving."""

from __future__ import annotations

import random

TEXT = (
    "Describe in your own words how the {0} near the {1} was repaired after the {2}, what it cost, who paid for it, "
    "and why people who live beside the {1} still tell the story of the {2} to their children when winter comes."
)
THINGS = ("bridge", "harbour", "mill", "library", "orchard", "railway", "lighthouse", "market", "flood", "fire")


def question(drawn: random.Random) -> str:
    """One of 720."""
    return TEXT.format(*drawn.sample(THINGS, 3))
