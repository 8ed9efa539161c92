"""From "these may be alike" to "this one is a copy of that one": every candidate is compared exactly.

Sets come in order. A set is *caught* by the first earlier set that is itself kept and at least `threshold` similar to
it (Jaccard), if the two were candidates. So no two kept sets that were candidates are similar, and every caught one is
similar to a kept one; nothing is lost through a chain of small steps. In the other use, the first `num_base` sets are
kept whatever they are, and the rest are only looked up among them.

Crowds: where many sets agree in a band (a long prompt that all rows share), comparing all pairs would be quadratic. Two
steps that change no result keep it from that. A set that no earlier one can catch is compared with its whole crowd at
once, and what it catches leaves. Crowds that remain are split by rare members: of two sets of similarity t, |x| <= |y|,
one of the |x| - ⌈2t/(1+t)|x|⌉ + 1 rarest members of x is among the |y| - ⌈t|y|⌉ + 1 rarest of y (prefix filtering:
Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007; Xiao et al. 2008), so only such pairs are compared.
What stays quadratic are sets that are alike in their rarest members too, and yet under the threshold. Then a
bound that costs a hundredth of a comparison (`SetStore.parities`) decides most pairs: 100,000 rows under one opening of
500 words take 10 seconds on one core, 100,000 rows made of 26 phrases, any two of them 0.2 to 0.6 alike, 65.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from model_foundry.data.set_store import PARITY_WORDS, SLAB_MEMBERS, SetStore, run_starts, slabs

CROWD = 32
_SLAB_PAIRS = 1 << 20
_MANY_PAIRS = 1 << 14
_COUNT_BITS = 20
_COUNT_SHIFT = np.uint64(32 - _COUNT_BITS)
_BELOW_COUNT = np.uint64((1 << (32 - _COUNT_BITS)) - 1)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_WORTHWHILE = 0.25


@dataclass(frozen=True, slots=True)
class Caught:
    """By whom each set was caught: `by` int64, -1 for nobody; `similarity` float32, 0 for nobody."""

    by: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups of candidates, an entry for each membership, ascending by group.

    Attributes:
        group, member: int64 [entries].
        probing: bool [entries], whether a pair is to be compared where this is the smaller of the two sets.
    """

    group: np.ndarray
    member: np.ndarray
    probing: np.ndarray

    def only(self, keep: np.ndarray) -> _Groups:
        return _Groups(self.group[keep], self.member[keep], self.probing[keep])

    @property
    def sizes(self) -> np.ndarray:
        """For each entry, how many entries its group has."""
        return np.bincount(self.group)[self.group] if len(self.group) else self.group

    @staticmethod
    def joined(parts: list[_Groups]) -> _Groups:
        groups, offset = [np.empty(0, np.int64)], 0
        for part in parts:
            groups.append(part.group + offset)
            offset += int(part.group[-1]) + 1 if len(part.group) else 0
        members = [np.empty(0, np.int64), *(part.member for part in parts)]
        probing = [np.empty(0, bool), *(part.probing for part in parts)]
        return _Groups(np.concatenate(groups), np.concatenate(members), np.concatenate(probing))


def catch(store: SetStore, band_keys: Iterable[np.ndarray], *, threshold: float, num_base: int | None = None) -> Caught:
    """Find who is caught by whom.

    Args:
        store: the sets; empty ones catch nothing and are not caught.
        band_keys: for each band uint64 [sets]; sets with an equal key in a band are candidates.
        num_base: None to compare all with all earlier ones; else how many sets are there only to catch the rest.
    """
    hunt = _Hunt(store, threshold, num_base)
    groups = _Groups.joined([_equal_keys(keys, store.sizes > 0) for keys in band_keys])
    groups = hunt.leaders_first(hunt.useful(groups))
    crowded = groups.sizes > CROWD
    if crowded.any():
        crowd = np.flatnonzero(np.bincount(groups.member[crowded]))
        split = _shared_rare_members(store, crowd, threshold)
        groups = hunt.leaders_first(hunt.useful(_Groups.joined([groups.only(~crowded), split])))
    hunt.all_pairs(groups)
    return Caught(np.where(hunt.by < len(store), hunt.by, -1), hunt.similarity)


class _Hunt:
    """What is known so far: `by` is the first catcher found for each set, the number of sets where there is none."""

    def __init__(self, store: SetStore, threshold: float, num_base: int | None) -> None:
        self.store, self.threshold, self.num_base = store, threshold, num_base
        self.by = np.full(len(store), len(store), np.int64)
        self.similarity = np.zeros(len(store), np.float32)
        # Taken from the system only where it is written to.
        self._parity = np.zeros((len(store), PARITY_WORDS), np.uint64)
        self._has_parity = np.zeros(len(store), bool)

    def useful(self, groups: _Groups) -> _Groups:
        """Groups in which there is someone to catch and someone to be caught."""
        if not len(groups.group):
            return groups
        keep = (groups.sizes > 1) & (np.bincount(groups.group, groups.probing)[groups.group] > 0)
        if self.num_base is not None:
            num_base = np.bincount(groups.group, groups.member < self.num_base)[groups.group]
            keep &= (num_base > 0) & (num_base < groups.sizes)
        return groups.only(keep)

    def leaders_first(self, groups: _Groups) -> _Groups:
        """While it pays, compare each crowd with its head, if the head is sure to be kept; what is still to be done."""
        while True:
            groups = self._living(groups)
            heads = self._heads(groups)
            led = (groups.sizes > CROWD) & self._is_sure(groups, heads)
            if not led.any():
                return groups
            others = led & (groups.member != heads)
            if self.num_base is not None:
                others &= groups.member >= self.num_base
            first, second = _distinct(heads[others], groups.member[others], len(self.store))
            num_caught = self._compare(first, second)
            groups = groups.only(~led | (groups.member != heads))
            if num_caught < _WORTHWHILE * len(second):
                return self._living(groups)

    def _heads(self, groups: _Groups) -> np.ndarray:
        """For each entry, the first member of its group that can catch others; the number of sets if there is none."""
        nobody = len(self.store)
        can_catch = self.by[groups.member] == nobody
        if self.num_base is not None:
            can_catch = groups.member < self.num_base
        starts = np.flatnonzero(run_starts(groups.group))
        heads = np.minimum.reduceat(np.where(can_catch, groups.member, nobody), starts) if len(starts) else starts
        return np.repeat(heads, np.diff(starts, append=len(groups.group)))

    def _is_sure(self, groups: _Groups, heads: np.ndarray) -> np.ndarray:
        """For each entry, whether the head of its group is kept for certain: it heads every group that it is in."""
        if self.num_base is not None:
            return heads < self.num_base
        num_headed = np.bincount(groups.member, groups.member == heads, minlength=len(self.store) + 1)
        num_groups = np.bincount(groups.member, minlength=len(self.store) + 1)
        return ((num_headed == num_groups) & (num_groups > 0))[heads]

    def _living(self, groups: _Groups) -> _Groups:
        """Without the sets that are caught, unless someone earlier than their catcher may still catch them."""
        return self.useful(groups.only(self.by[groups.member] > self._heads(groups)))

    def _compare(self, first: np.ndarray, second: np.ndarray) -> int:
        """Kept sets `first` against later ones; how many of these were caught."""
        first, second, similarity = self._alike(first, second)
        order = np.lexsort((first, second))
        second_sorted = second[order]
        earliest = order[run_starts(second_sorted)]
        better = earliest[first[earliest] < self.by[second[earliest]]]
        self.by[second[better]], self.similarity[second[better]] = first[better], similarity[better]
        return len(earliest)

    def _alike(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that reach the threshold, with their similarity."""
        sizes = self.store.sizes[first], self.store.sizes[second]
        possible = (np.minimum(*sizes) >= self.threshold * np.maximum(*sizes) - 1e-9) & (first != second)
        first, second = first[possible], second[possible]
        if len(first) > _MANY_PAIRS:
            first, second = self._within_reach(first, second)
        similarity = self.store.jaccard(first, second)
        alike = similarity >= self.threshold
        return first[alike], second[alike], similarity[alike]

    def _within_reach(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs whose parities do not rule out that they are similar enough. Loses none that is."""
        involved = np.zeros(len(self.store), bool)
        involved[first] = involved[second] = True
        missing = np.flatnonzero(involved & ~self._has_parity)
        self._parity[missing], self._has_parity[missing] = self.store.parities(missing), True
        # |A Δ B| / |A ∪ B| = 1 - t at most, and |A ∪ B| = (|A| + |B| + |A Δ B|) / 2.
        total = self.store.sizes[first] + self.store.sizes[second]
        reach = (1 - self.threshold) / (1 + self.threshold) * total + 1e-6
        differing = np.zeros(len(first), np.int64)
        step = PARITY_WORDS // 4
        for start in range(0, PARITY_WORDS, step):
            words = slice(start, start + step)
            unlike = self._parity[first, words] ^ self._parity[second, words]
            differing += np.bitwise_count(unlike).sum(axis=1, dtype=np.int64)
            left = differing <= reach
            first, second, differing, reach = first[left], second[left], differing[left], reach[left]
        return first, second

    def all_pairs(self, groups: _Groups) -> None:
        """Compare every pair of every group, then settle in order who is kept and who is caught."""
        probes = groups.only(groups.probing)
        if self.num_base is None:
            found = self._pairs(probes, groups)
        else:
            is_base, probes_base = groups.member < self.num_base, probes.member < self.num_base
            found = self._pairs(probes.only(~probes_base), groups.only(is_base))
            found += self._pairs(probes.only(probes_base), groups.only(~is_base))
        self._settle(np.concatenate([np.empty((3, 0)), *found], axis=1))

    def _pairs(self, small: _Groups, large: _Groups) -> list[np.ndarray]:
        """What is alike of all pairs in which `small` is not the larger set: float64 [3, pairs] a slab."""
        sizes = self.store.sizes
        scale = int(sizes.max(initial=0)) + 1
        ranked = large.group * scale + sizes[large.member]
        order = np.argsort(ranked, kind="stable")
        ranked, members = ranked[order], large.member[order]
        own = sizes[small.member]
        limit = np.minimum(np.floor(own / self.threshold + 1e-9).astype(np.int64), scale - 1)
        starts = np.searchsorted(ranked, small.group * scale + own)
        counts = np.searchsorted(ranked, small.group * scale + limit, side="right") - starts
        found = []
        for slab in slabs(counts, _SLAB_PAIRS):
            total, widths = int(counts[slab].sum()), counts[slab]
            places = np.arange(total) + np.repeat(starts[slab] - (np.cumsum(widths) - widths), widths)
            one, other = np.repeat(small.member[slab], widths), members[places]
            pairs = _distinct(np.minimum(one, other), np.maximum(one, other), len(self.store))
            found.append(np.stack(self._alike(*pairs)))
        return found

    def _settle(self, edges: np.ndarray) -> None:
        """Greedily, in order: a set is caught by the first kept one that is similar to it."""
        order = np.lexsort((edges[0], edges[1]))
        nobody = len(self.store)
        for first, second, similarity in edges[:, order].T.tolist():
            catcher, prey = int(first), int(second)
            if catcher < self.by[prey] and (self.num_base is not None or self.by[catcher] == nobody):
                self.by[prey], self.similarity[prey] = catcher, similarity


def _distinct(first: np.ndarray, second: np.ndarray, num_sets: int) -> tuple[np.ndarray, np.ndarray]:
    codes = first * num_sets + second
    codes.sort()  # np.unique may hash instead, which takes several times as long
    codes = codes[run_starts(codes)]
    return codes // num_sets, codes % num_sets


def _equal_keys(keys: np.ndarray, wanted: np.ndarray) -> _Groups:
    """The sets that have a key in common. Their numbers are packed beside what is left of the key's 64 bits."""
    number_bits = np.uint64(max(1, len(keys).bit_length()))
    packed = (keys >> number_bits << number_bits) | np.arange(len(keys), dtype=np.uint64)
    packed = packed[wanted]
    packed.sort()
    above = packed >> number_bits
    same = above[1:] == above[:-1]
    shared = np.zeros(len(packed), bool)
    shared[1:] |= same
    shared[:-1] |= same
    members = (packed[shared] & ((np.uint64(1) << number_bits) - np.uint64(1))).astype(np.int64)
    return _Groups(np.cumsum(run_starts(above[shared])) - 1, members, np.ones(len(members), bool))


def _shared_rare_members(store: SetStore, numbers: np.ndarray, threshold: float) -> _Groups:
    """Groups of sets that have one of their rarest members in common: so is every pair that is similar enough."""
    ranks = _rarity(store, numbers)
    short_share = 2 * threshold / (1 + threshold)
    rare, member, probing = [], [], []
    for slab in slabs(store.sizes[numbers], SLAB_MEMBERS):
        keys, sizes = store.keys(numbers[slab]), store.sizes[numbers[slab]]
        values = keys & _LOW_HALF
        ranked = (keys ^ values) | (ranks[values >> _COUNT_SHIFT] << _COUNT_SHIFT) | (values & _BELOW_COUNT)
        ranked.sort()
        place = np.arange(len(ranked)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chosen = place <= np.repeat(sizes - np.ceil(threshold * sizes - 1e-9), sizes)
        rare.append(ranked[chosen] & _LOW_HALF)
        member.append(np.repeat(numbers[slab], sizes)[chosen])
        probing.append((place <= np.repeat(sizes - np.ceil(short_share * sizes - 1e-9), sizes))[chosen])
    rare, member, probing = np.concatenate(rare), np.concatenate(member), np.concatenate(probing)
    order = np.argsort(rare, kind="stable")
    return _Groups(np.cumsum(run_starts(rare[order])) - 1, member[order], probing[order])


def _rarity(store: SetStore, numbers: np.ndarray) -> np.ndarray:
    """uint64: a rank for the upper bits of a hash, from those that few of the sets have to those that many have.

    Any one order of all members serves prefix filtering; this one is the quickest. Hashes that share their upper bits
    are counted together.
    """
    counts = np.zeros(1 << _COUNT_BITS, np.int64)
    for slab in slabs(store.sizes[numbers], SLAB_MEMBERS):
        values = store.keys(numbers[slab]) & _LOW_HALF
        counts += np.bincount((values >> _COUNT_SHIFT).astype(np.int64), minlength=len(counts))
    ranks = np.empty(len(counts), np.uint64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts), dtype=np.uint64)
    return ranks
