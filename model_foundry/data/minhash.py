"""MinHash with banding: which of many sets are worth comparing.

A signature holds, for each of 64 slots, the smallest hash of the set's members that fall into the slot (one-permutation
hashing: Li, Owen and Zhang 2012); an empty slot borrows from another by a fixed random order (optimal densification:
Shrivastava 2017). Two signatures then agree in a slot with a probability equal to the Jaccard similarity (Broder 1997),
for sets of three members as for sets of thousands. Slots are cut into bands; sets that agree in a whole band are
candidates (locality-sensitive hashing: Indyk and Motwani 1998). Knows nothing of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NUM_SLOTS = 64
MIN_RECALL = 0.998
_SLOT_BITS = 6
_HASH_BITS = 32
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True, slots=True)
class Bands:
    """How the slots are cut: `num_bands` bands of `num_rows` slots each."""

    num_bands: int
    num_rows: int

    def recall(self, similarity: float) -> float:
        """The probability that a pair of this Jaccard similarity is a candidate: the S-curve 1 - (1 - s^r)^b."""
        return 1.0 - (1.0 - similarity**self.num_rows) ** self.num_bands


def choose_bands(threshold: float) -> Bands:
    """The longest bands (fewest candidates) that still find MIN_RECALL of the pairs that just reach `threshold`.

    0.8 gives 16 bands of 4: a pair at 0.8 is found with probability 0.9998, at 0.5 with 0.64, at 0.2 with 0.03.
    """
    for num_rows in range(NUM_SLOTS, 1, -1):
        bands = Bands(NUM_SLOTS // num_rows, num_rows)
        if bands.recall(threshold) >= MIN_RECALL:
            return bands
    return Bands(NUM_SLOTS, 1)


def signatures(keys: np.ndarray, num_sets: int, *, seed: int) -> np.ndarray:
    """MinHash signatures, uint32 [num_sets, NUM_SLOTS]; rows of empty sets are zero.

    Args:
        keys: uint64, ascending: the set's number in the upper 32 bits, a member's hash in the lower.
    """
    slots = (keys >> np.uint64(_HASH_BITS - _SLOT_BITS)).view(np.int64)
    first = np.ones(len(keys), bool)
    np.not_equal(slots[1:], slots[:-1], out=first[1:])
    chosen = np.flatnonzero(first)
    places = slots[chosen]
    smallest = np.zeros(num_sets * NUM_SLOTS, np.uint32)
    smallest[places] = keys.astype(np.uint32)[chosen]
    filled = np.zeros(num_sets * NUM_SLOTS, bool)
    filled[places] = True
    _densify(smallest, filled, np.bincount(places >> _SLOT_BITS, minlength=num_sets) == 0, seed=seed)
    return smallest.reshape(num_sets, NUM_SLOTS)


def _densify(smallest: np.ndarray, filled: np.ndarray, is_empty: np.ndarray, *, seed: int) -> None:
    """Each empty slot tries the other slots in a random order of its own, the same for every set."""
    empty = np.flatnonzero(~filled)
    if is_empty.any():
        empty = empty[~is_empty[empty >> _SLOT_BITS]]
    slots = empty & (NUM_SLOTS - 1)
    bases = empty - slots
    for order in _lending_orders(seed):
        if not len(empty):
            break
        sources = bases + order[slots]
        found = filled[sources]
        smallest[empty[found]] = smallest[sources[found]]
        rest = np.flatnonzero(~found)
        empty, slots, bases = empty[rest], slots[rest], bases[rest]


@lru_cache(maxsize=4)
def _lending_orders(seed: int) -> np.ndarray:
    """int64 [NUM_SLOTS - 1, NUM_SLOTS]: column j lists the other slots in the order in which slot j asks them."""
    generator = np.random.default_rng((seed, 0x10AD))
    others = [generator.permutation(np.delete(np.arange(NUM_SLOTS), slot)) for slot in range(NUM_SLOTS)]
    return np.stack(others, axis=1)


def band_keys(signature: np.ndarray, bands: Bands, *, seed: int) -> np.ndarray:
    """uint64 [num_bands, num_sets]: equal where two sets agree in the whole band."""
    # Neighbouring slots may borrow from each other: bands take them in random order.
    order = np.random.default_rng((seed, 0xBA2D)).permutation(NUM_SLOTS)[: bands.num_bands * bands.num_rows]
    columns = signature.T.astype(np.uint64)[order].reshape(bands.num_bands, bands.num_rows, -1)
    keys = np.zeros((bands.num_bands, signature.shape[0]), np.uint64)
    for row in range(bands.num_rows):
        keys *= _MULTIPLIER
        keys += columns[:, row]
        keys ^= keys >> np.uint64(29)
    keys *= _MULTIPLIER
    return keys
