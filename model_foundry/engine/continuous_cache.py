"""Which tokens lie where in the key/value cache of a running batch, and which prompts begin alike.

The cache is cut into segments of 256 tokens. A sequence holds a list of them; those that prompts share are counted, not
copied. Prompts are known by a chain of hashes, one for each whole block of 64 tokens (so a hash stands for everything
before it as well), and a prompt's last tokens by one more, kept with the hidden state of the last. Segments that nobody
holds stay until their room is needed, the longest unused first and a sequence's last before its first. Only prompts are
remembered: what was generated is computed again, as a prompt, when it comes back as one.

It knows numbers and hashes. It does not know layers, and holds tensors without looking into them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

SEGMENT_TOKENS = 256
"""What is shared or reserved whole. A product of attention meets one segment; smaller ones are more calls."""
BLOCK_TOKENS = 64
"""Prompts are computed, hashed and found in whole blocks of this many tokens; it divides a segment."""
BLOCKS_PER_SEGMENT = SEGMENT_TOKENS // BLOCK_TOKENS


def segments_for(num_tokens: int) -> int:
    """How many segments hold so many tokens."""
    return -(-num_tokens // SEGMENT_TOKENS)


@dataclass(frozen=True, slots=True)
class PromptHashes:
    """What a prompt is known by: a hash after each whole block, and one of the whole prompt."""

    blocks: tuple[bytes, ...]
    whole: bytes

    @classmethod
    def of(cls, prompt: np.ndarray, adapter: int, client: str = "") -> PromptHashes:
        """prompt: int32 [T]; adapter: a number that no other weights have; client: who alone may find it again."""
        data = np.ascontiguousarray(prompt, dtype="<i4")
        digest = hashlib.sha256(f"adapter {adapter} {client}".encode()).digest()
        blocks = []
        for first in range(0, len(data) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            digest = hashlib.sha256(digest + data[first : first + BLOCK_TOKENS].tobytes()).digest()
            blocks.append(digest)
        rest = data[len(blocks) * BLOCK_TOKENS :].tobytes()
        return cls(tuple(blocks), hashlib.sha256(b"whole" + digest + rest).digest())


@dataclass(frozen=True, slots=True)
class Found:
    """What of a prompt is in the cache.

    Attributes:
        num_tokens: from its beginning.
        shared: segments that are whole and can be held as they are.
        copied_from: the segment whose first `num_copied` tokens belong to the next, partly filled one.
        end: the hidden state of the prompt's last token, where the whole prompt was found.
    """

    num_tokens: int = 0
    shared: tuple[int, ...] = ()
    copied_from: int = -1
    num_copied: int = 0
    end: torch.Tensor | None = None

    @property
    def touched(self) -> tuple[int, ...]:
        return self.shared if self.num_copied == 0 else (*self.shared, self.copied_from)

    def without_copy(self) -> Found:
        """Its whole segments alone: for a moment a copy needs one segment more than the sequence."""
        return Found(len(self.shared) * SEGMENT_TOKENS, self.shared)


@dataclass(slots=True)
class _Segment:
    num_holders: int = 0
    blocks: list[bytes] = field(default_factory=list)
    wholes: list[bytes] = field(default_factory=list)


class SegmentStore:
    """Segments in use, remembered and free."""

    def __init__(self, num_segments: int) -> None:
        self.num_segments = num_segments
        self._segments = [_Segment() for _ in range(num_segments)]
        self._free = list(range(num_segments - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._blocks: dict[bytes, int] = {}
        self._wholes: dict[bytes, tuple[int, torch.Tensor]] = {}

    @property
    def num_held(self) -> int:
        """Segments that some sequence holds."""
        return self.num_segments - len(self._free) - len(self._unused)

    def find(self, hashes: PromptHashes, num_tokens: int) -> Found:
        """The longest remembered beginning of a prompt of so many tokens; less than all of it, or with its end."""
        whole = self._wholes.get(hashes.whole)
        num_blocks = self._num_known(hashes.blocks)
        if whole is not None and num_blocks == len(hashes.blocks):
            num_found, tail, end = num_tokens, whole[0], whole[1]
        else:
            num_blocks = min(num_blocks, (num_tokens - 1) // BLOCK_TOKENS)
            num_found, end = num_blocks * BLOCK_TOKENS, None
            tail = self._blocks[hashes.blocks[num_blocks - 1]] if num_blocks else -1
        num_whole, num_copied = divmod(num_found, SEGMENT_TOKENS)
        shared = tuple(self._blocks[hashes.blocks[(k + 1) * BLOCKS_PER_SEGMENT - 1]] for k in range(num_whole))
        return Found(num_found, shared, tail if num_copied else -1, num_copied, end)

    def _num_known(self, blocks: Sequence[bytes]) -> int:
        for number, digest in enumerate(blocks):
            if digest not in self._blocks:
                return number
        return len(blocks)

    def take(self, found: Found, num_new: int) -> list[int] | None:
        """Hold the shared segments of a prompt and `num_new` fresh ones behind them; None where they do not fit.

        Nothing that was found is given away, so that it can still be copied.
        """
        waiting = sum(1 for segment in found.touched if segment in self._unused)
        if num_new > len(self._free) + len(self._unused) - waiting:
            return None
        for segment in found.touched:
            self._hold(segment)
        fresh = [self._fresh() for _ in range(num_new)]
        if found.num_copied:
            self._release(found.copied_from)
        return [*found.shared, *fresh]

    def remember_block(self, digest: bytes, segment: int) -> None:
        """A whole block of a prompt, its keys and values, is in this segment."""
        if digest not in self._blocks:
            self._blocks[digest] = segment
            self._segments[segment].blocks.append(digest)

    def remember_whole(self, digest: bytes, segment: int, end: torch.Tensor) -> None:
        """A prompt's last tokens are in this segment, and `end` is the hidden state of the last."""
        if digest not in self._wholes:
            self._wholes[digest] = (segment, end)
            self._segments[segment].wholes.append(digest)

    def release(self, segments: Sequence[int]) -> None:
        """One holder less for each; the last of a sequence is forgotten before the first, which more prompts share."""
        for segment in reversed(segments):
            self._release(segment)

    def forget(self) -> None:
        """Forget every prompt; what is held stays held."""
        for segment in list(self._unused):
            self._forget(segment)
            self._free.append(segment)
        self._unused.clear()
        for segment in range(self.num_segments):
            self._forget(segment)

    def check(self, held: Iterator[Sequence[int]]) -> None:
        """Whether the books agree with what the sequences say they hold.

        Raises:
            ValueError: they do not.
        """
        counts = [0] * self.num_segments
        for segments in held:
            for segment in segments:
                counts[segment] += 1
        if counts != [segment.num_holders for segment in self._segments]:
            raise ValueError("a segment has another number of holders than was counted")
        idle = {number for number, count in enumerate(counts) if count == 0}
        if idle != set(self._free) | self._unused.keys() or len(idle) != len(self._free) + len(self._unused):
            raise ValueError("a segment is lost, or held and given away at once")

    def _hold(self, segment: int) -> None:
        self._unused.pop(segment, None)
        self._segments[segment].num_holders += 1

    def _release(self, segment: int) -> None:
        state = self._segments[segment]
        state.num_holders -= 1
        if state.num_holders:
            return
        if state.blocks or state.wholes:
            self._unused[segment] = None
        else:
            self._free.append(segment)

    def _fresh(self) -> int:
        if self._free:
            segment = self._free.pop()
        else:
            segment, _ = self._unused.popitem(last=False)
            self._forget(segment)
        self._segments[segment].num_holders = 1
        return segment

    def _forget(self, segment: int) -> None:
        state = self._segments[segment]
        for digest in state.blocks:
            del self._blocks[digest]
        for digest in state.wholes:
            del self._wholes[digest]
        state.blocks.clear()
        state.wholes.clear()
