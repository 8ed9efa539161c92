"""Who is next: operations of one model by their sequence ids, models by the time that their owners have used.

Ids may come in any order; an operation waits until everything before it has come. It knows nothing of what the
operations do. Not for several threads: `worker` holds a lock around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from model_foundry.service.books import Operation

PASSES = ("forward_backward", "forward")
SLACK_SECONDS = 0.5
"""So much more an owner may have used whose step is done before another's pass."""


@dataclass(slots=True)
class Lane:
    """The operations of one model (`next_seq` is what it waits for), or of one sampler (None: as they come)."""

    name: str
    owner: str
    next_seq: int | None
    used_seconds: float = 0.0
    held: dict[int, Operation] = field(default_factory=dict)
    line: deque[Operation] = field(default_factory=deque)

    def add(self, operation: Operation) -> None:
        if self.next_seq is None:
            self.line.append(operation)
        else:
            assert operation.seq is not None
            self.held[operation.seq] = operation

    @property
    def head(self) -> Operation | None:
        """What could be done now."""
        if self.next_seq is None:
            return self.line[0] if self.line else None
        return self.held.get(self.next_seq)

    def take(self) -> Operation:
        if self.next_seq is None:
            return self.line.popleft()
        self.next_seq += 1
        return self.held.pop(self.next_seq - 1)

    def __len__(self) -> int:
        return len(self.held) + len(self.line)


class Lanes:
    """All lanes, and whose turn it is.

    Owners are served by the time that they have used (Goyal et al. 1996, "Start-time Fair Queueing"): time that nobody
    wanted is not saved up, so who comes back starts level with those who are at it.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}
        self._used: dict[str, float] = {}
        self._level = 0.0

    def add(self, operation: Operation, *, next_seq: int | None) -> None:
        """Put an operation in its lane; `next_seq` is where a lane begins that is not there yet."""
        lane = self._lanes.get(operation.lane)
        if lane is None:
            lane = self._lanes[operation.lane] = Lane(operation.lane, operation.owner, next_seq)
        was_idle = not any(other.owner == lane.owner and other.head is not None for other in self._lanes.values())
        lane_was_idle = lane.head is None
        lane.add(operation)
        if was_idle:
            self._used[lane.owner] = max(self.used(lane.owner), self._level)
        if lane_was_idle:
            going = [other.used_seconds for other in self._ready() if other.owner == lane.owner and other is not lane]
            lane.used_seconds = max(lane.used_seconds, min(going, default=0.0))

    def last_seq(self, name: str) -> int | None:
        """The largest id of a model that has come; None where nothing of it is known here."""
        lane = self._lanes.get(name)
        return None if lane is None or lane.next_seq is None else max([lane.next_seq - 1, *lane.held])

    def __contains__(self, name: object) -> bool:
        """Whether anything waits in a lane, or is being done."""
        return name in self._lanes

    def is_ready(self, name: str) -> bool:
        """Whether something could be done now in a lane."""
        lane = self._lanes.get(name)
        return lane is not None and lane.head is not None

    def abandon(self, name: str) -> list[Operation]:
        """Take a lane away; what waited in it."""
        lane = self._lanes.pop(name, None)
        return [] if lane is None else [*lane.line, *(lane.held[seq] for seq in sorted(lane.held))]

    def take(self, *, samples: bool = True) -> Operation | None:
        """The next operation of whoever has used least; without `samples`, a model's."""
        ready = self._ready(samples=samples)
        if not ready:
            return None
        lane = min(ready, key=self._turn)
        self.reached(self._used[lane.owner])
        if lane.head is not None and lane.head.kind in PASSES:
            # Whoever has a step to do first can be in the next pass then, together with this one.
            others = [other for other in ready if other.head is not None and other.head.kind not in PASSES]
            other = min(others, key=self._turn, default=lane)
            lane = other if self._used[other.owner] <= self._used[lane.owner] + SLACK_SECONDS else lane
        return lane.take()

    def take_like(self, kind: str, is_welcome: Callable[[str], bool]) -> Operation | None:
        """The next operation of this kind, of whoever has used least among the models that are welcome."""
        ready = [lane for lane in self._ready(samples=False) if is_welcome(lane.name)]
        ready = [lane for lane in ready if lane.head is not None and lane.head.kind == kind]
        return min(ready, key=self._turn).take() if ready else None

    def put_back(self, operation: Operation) -> None:
        """An operation of a model that was taken and not done: it is the next of its lane again."""
        lane = self._lanes[operation.lane]
        assert operation.seq is not None
        lane.next_seq = operation.seq
        lane.held[operation.seq] = operation

    def has_samples(self) -> bool:
        """Whether sampling operations wait."""
        return any(lane.next_seq is None for lane in self._ready())

    def take_sample(self, is_welcome: Callable[[str], bool]) -> Operation | None:
        """The next sampling operation of the owner who has used least among those who are welcome."""
        ready = [lane for lane in self._ready() if lane.next_seq is None and is_welcome(lane.owner)]
        return min(ready, key=self._turn).take() if ready else None

    def least_used(self) -> float | None:
        """Seconds of whoever has used least among those whose models have something to do; None where none has."""
        return min((self._used[lane.owner] for lane in self._ready(samples=False)), default=None)

    def used(self, owner: str) -> float:
        return self._used.get(owner, 0.0)

    def reached(self, seconds: float) -> None:
        """Somebody who has used so much is served, so nobody who comes from now on is owed more."""
        self._level = max(self._level, seconds)

    def charge_owner(self, owner: str, seconds: float) -> None:
        self._used[owner] = self.used(owner) + seconds

    def charge(self, operation: Operation, seconds: float) -> None:
        """Add time that an operation took."""
        self.charge_owner(operation.owner, seconds)
        lane = self._lanes.get(operation.lane)
        if lane is not None:
            lane.used_seconds += seconds

    def settle(self, operation: Operation) -> None:
        """An operation is done and noted: a lane that is empty goes."""
        lane = self._lanes.get(operation.lane)
        if lane is not None and not lane:
            del self._lanes[operation.lane]

    def waiting_for(self, operation: Operation) -> str | None:
        """Why an operation is not being done, for its client to read; None: it is its turn, or being done."""
        lane = self._lanes.get(operation.lane)
        if lane is None:
            return None
        if operation.seq is not None and lane.next_seq is not None and lane.head is None and operation.seq in lane.held:
            return f"waiting for the operation with seq_id {lane.next_seq} of this model, which has not come"
        others = sum(len(other) for other in self._ready() if other.owner != lane.owner)
        mine = sum(1 for seq in lane.held if operation.seq is not None and seq < operation.seq)
        if not others and not mine:
            return None
        return f"{mine} operations of this model are before it, and {others} of other clients are waiting"

    def owners(self) -> set[str]:
        """Everybody who has ever had something done."""
        return set(self._used)

    def num_waiting(self, owner: str) -> int:
        return sum(len(lane) for lane in self._lanes.values() if lane.owner == owner)

    def _turn(self, lane: Lane) -> tuple[float, float]:
        return self._used[lane.owner], lane.used_seconds

    def _ready(self, *, samples: bool = True) -> list[Lane]:
        lanes = self._lanes.values()
        return [lane for lane in lanes if lane.head is not None and (samples or lane.next_seq is not None)]
