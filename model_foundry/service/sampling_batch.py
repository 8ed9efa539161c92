"""Samples of every tenant in one running batch: begun, advanced a token at a time, and handed back as they finish.

Places in the batch are shared between tenants, so one that asks for a thousand samples leaves places for the others.
What a sample is does not depend on who else is in the batch. Used by the worker's thread alone.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from model_foundry.engine.continuous import ContinuousBatch, TokenEvent
from model_foundry.engine.continuous_cache import SEGMENT_TOKENS
from model_foundry.engine.platform import is_out_of_memory, release_memory
from model_foundry.errors import EngineError, OutOfMemoryError
from model_foundry.models.language_model import NativeModel
from model_foundry.service.books import Checkpoint, Operation
from model_foundry.service.host import Host
from model_foundry.service.sampling import Prepared, Texts, sequences_of
from model_foundry.types import SampledSequence, check_logprob

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Asked:
    """A sampling operation under way.

    Attributes:
        rows: (token, logprob) of each sample so far.
        coming: samples that have no place in the batch yet.
        stopped: samples that ended where they were asked to.
    """

    operation: Operation
    prepared: Prepared
    checkpoint: Checkpoint | None
    adapter: str | None
    rows: list[list[tuple[int, float]]]
    coming: deque[int]
    stopped: set[int] = field(default_factory=set)
    num_done: int = 0

    @property
    def owner(self) -> str:
        return self.operation.owner


@dataclass(frozen=True, slots=True)
class Finished:
    """A sampling operation and what came of it."""

    operation: Operation
    prepared: Prepared
    checkpoint: Checkpoint | None
    sequences: list[SampledSequence]
    error: Exception | None = None


class SamplingBatch:
    """The batch, and who has which place in it.

    Args:
        max_sequences: places.
        cache_tokens: keys and values that the batch may keep.
    """

    def __init__(self, host: Host, texts: Texts, *, max_sequences: int, cache_tokens: int) -> None:
        self.host, self.texts = host, texts
        self.max_sequences, self.cache_tokens = max_sequences, cache_tokens
        self._batch: ContinuousBatch | None = None
        self._is_native = isinstance(host.engine.language_model(host.base_id), NativeModel)
        self._asked: list[Asked] = []
        self._places: dict[int, tuple[Asked, int]] = {}
        self._adapters: OrderedDict[tuple[str, float], str] = OrderedDict()
        self._lost: list[Finished] = []

    @property
    def is_active(self) -> bool:
        return bool(self._asked or self._lost)

    @property
    def may_batch(self) -> bool:
        """Whether this base is sampled in a batch, as far as is known; transformers' models answer one by one."""
        return self._is_native

    def can_batch(self) -> bool:
        """The same, tried: the batch is made when the first sample is asked for, for it keeps the weights twice."""
        if self._is_native and self._batch is None:
            engine = self.host.engine
            try:
                self._batch = ContinuousBatch(
                    engine.language_model(self.host.base_id), device=engine.device,
                    max_sequences=self.max_sequences, max_cache_tokens=self.cache_tokens,
                )  # fmt: skip
            except EngineError as error:
                logger.warning("samples are answered one request after another: %s", error)
                self._is_native = False
        return self._is_native

    def owners(self) -> Counter[str]:
        """Places by owner."""
        return Counter(asked.owner for asked, _ in self._places.values())

    def takes(self, owner: str) -> bool:
        """Whether another operation of this owner is welcome now."""
        if not self._is_native or any(asked.owner == owner and asked.coming for asked in self._asked):
            return False
        return len(self._places) < self.max_sequences and self.owners()[owner] < self._most_places

    @property
    def _most_places(self) -> int:
        """Of one owner: the rest is for those who come meanwhile."""
        return max(1, self.max_sequences // 2)

    @property
    def room_tokens(self) -> int:
        """The longest text, prompt and answer, that the cache holds."""
        return self.cache_tokens // SEGMENT_TOKENS * SEGMENT_TOKENS

    def begin(
        self,
        operation: Operation,
        prepared: Prepared,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Let an operation in, where `can_batch`.

        Raises:
            FoundryError: its adapter cannot be read, or the batch could never hold it.
        """
        rows: list[list[tuple[int, float]]] = [[] for _ in range(prepared.num_samples)]
        coming = deque(range(prepared.num_samples))
        asked = Asked(operation, prepared, checkpoint, self._adapter(checkpoint), rows, coming)
        # The first goes in here, so that what is refused is refused with everything as it was.
        self._place(asked)
        self._asked.append(asked)
        self._fill()

    def step(self) -> Iterator[Finished]:
        """At most a token for every sample in the batch; the operations that are finished with it."""
        assert self._batch is not None
        self._fill()
        num_places = len(self._places)
        try:
            events = self._batch.step()
        except Exception as error:
            self._fail(error, num_places)
            events = []
        for event in events:
            if event.number not in self._places:
                # Its operation failed over another of its samples, a moment ago.
                continue
            asked, row = self._places[event.number]
            try:
                done = self._note(event, asked, row)
            except Exception as error:
                self._lose(asked, error)
                continue
            if done is not None:
                yield done
        lost, self._lost = self._lost, []
        yield from lost

    def _fail(self, error: Exception, num_places: int) -> None:
        if is_out_of_memory(error):
            release_memory(self.host.engine.device)
            # The step has lost nothing; without the one that came last the others go on.
            dropped = self._asked[-1:]
            hint = "Ask for fewer samples at once, or for shorter ones."
            error = OutOfMemoryError(f"memory ran out over {num_places} samples at once", hint=hint)
        else:
            dropped = list(self._asked)
        for asked in dropped:
            self._lose(asked, error)

    def _note(self, event: TokenEvent, asked: Asked, row: int) -> Finished | None:
        assert self._batch is not None
        check_logprob(event.logprob)
        tokens, prepared = asked.rows[row], asked.prepared
        tokens.append((event.token, event.logprob))
        stops = event.finish == "stop"
        if not stops and prepared.stops:
            stops = self.texts.holds([token for token, _ in tokens], prepared.stops)
        if not stops and event.finish is None:
            return None
        if stops:
            asked.stopped.add(row)
        if event.finish is None:
            self._batch.cancel(event.number)
        del self._places[event.number]
        asked.num_done += 1
        if asked.num_done < len(asked.rows):
            return None
        sequences = sequences_of(asked.rows, asked.stopped)
        self._asked.remove(asked)
        self._let_go()
        return Finished(asked.operation, prepared, asked.checkpoint, sequences)

    def _fill(self) -> None:
        """Give free places away, each to the owner who has fewest. What cannot have one is lost, and nothing else."""
        held = self.owners()
        while len(self._places) < self.max_sequences:
            waiting = [asked for asked in self._asked if asked.coming and held[asked.owner] < self._most_places]
            if not waiting:
                return
            # The first of the fewest: an owner's own operations go in their order.
            chosen = min(waiting, key=lambda asked: held[asked.owner])
            try:
                self._place(chosen)
            except Exception as error:
                self._lose(chosen, error)
                held = self.owners()
                continue
            held[chosen.owner] += 1

    def _place(self, asked: Asked) -> None:
        assert self._batch is not None
        row = asked.coming[0]
        prepared = asked.prepared
        number = self._batch.add(
            prepared.prompt, prepared.params, adapter=asked.adapter, copy=row, client=asked.owner
        )  # whose prompts are found again, which time would tell another owner
        asked.coming.popleft()
        self._places[number] = (asked, row)

    def _lose(self, asked: Asked, error: Exception) -> None:
        """An operation has failed; it is handed back with the next step."""
        assert self._batch is not None
        for number in [number for number, (other, _) in self._places.items() if other is asked]:
            self._batch.cancel(number)
            del self._places[number]
        self._asked.remove(asked)
        self._let_go()
        self._lost.append(Finished(asked.operation, asked.prepared, asked.checkpoint, [], error=error))

    def _adapter(self, checkpoint: Checkpoint | None) -> str | None:
        """The batch's name for a checkpoint's weights, read where they are not there yet."""
        if checkpoint is None:
            return None
        assert self._batch is not None
        key = (checkpoint.path, checkpoint.created)
        if key not in self._adapters:
            folder = self.host.open_for_base(checkpoint).path / "adapter"
            name = f"{checkpoint.path}@{checkpoint.created!r}"
            self._batch.add_adapter(name, folder)
            self._adapters[key] = name
            self._let_go(besides=name)
        self._adapters.move_to_end(key)
        return self._adapters[key]

    def _let_go(self, besides: str | None = None) -> None:
        """Those adapters not used for longest, where there are too many; none whose samples are not all done."""
        assert self._batch is not None
        used = {besides, *(asked.adapter for asked in self._asked)}
        free = [key for key, name in self._adapters.items() if name not in used]
        for key in free[: max(0, len(self._adapters) - self.host.max_models)]:
            self._batch.remove_adapter(self._adapters.pop(key))
