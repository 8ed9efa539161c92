"""The processes of a run that torchrun started, and how the first of them leads the others.

Rank 0 runs the command line, the recipe and its files. The other ranks hold their share of each model and wait: what
rank 0's engine is asked to do it tells them first, and all do it together. So there is one configuration, one order of
events, one set of signals, and nothing that ranks could come to disagree on.

Messages are JSON and arrays in the safetensors format, nothing is unpickled. They go through a gloo group of their own
that waits as long as rank 0 has other things to do, and breaks when a process dies; work together has a time limit. It
knows nothing of models.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load as unpack
from safetensors.numpy import save as pack
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model_foundry.errors import EngineError, FoundryError, OutOfMemoryError

WORK_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other in the middle of common work."""
IDLE_TIMEOUT = timedelta(days=30)
"""How long they wait for the next thing to do: rank 0 may be reading data."""
_HEARD_TIMEOUT = timedelta(seconds=15)
_LOST, _HEARD = "foundry/lost", "foundry/heard"
_KINDS = {"OutOfMemoryError": OutOfMemoryError}
_AGAIN = "Start it again with --resume auto: it goes on from its last checkpoint."


@dataclass(frozen=True, slots=True)
class Said:
    """One message: what to do, or what came of it; `engine` is the number of the one that is meant."""

    verb: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    engine: int = 0


class LostRankError(EngineError):
    """Another process of the run is gone, or gave up; this one cannot go on alone."""


class Ranks:
    """This process among the others. `join` first, `leave` last.

    Attributes:
        broken: common work failed half-way, so that the ranks no longer stand at the same place.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size, self.broken = rank, size, False
        self._store = store
        self._lock = threading.RLock()
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=WORK_TIMEOUT)
        self._talk: Any = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    @classmethod
    def join(cls) -> Ranks:
        """Meet the other processes; the launcher's environment says where. Children of this one are no ranks."""
        store, rank, size = next(dist.rendezvous("env://", timeout=WORK_TIMEOUT))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        ranks = cls(dist.PrefixStore("foundry", store), rank, size)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        return ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All ranks in a row; a collective call."""
        return init_device_mesh(device.type, (self.size,))

    def leave(self) -> None:
        """Rank 0: send the others home. After common work broke off they notice by themselves, when we are gone."""
        if self.is_first and not self.broken:
            with suppress(RuntimeError), self._lock:
                self._tell(Said("leave"))
        if self.broken:
            _ignore_the_launcher()
            return
        with suppress(RuntimeError):
            dist.destroy_process_group()

    @contextmanager
    def leading(
        self, verb: str, *, together: bool, engine: int, arrays: Mapping[str, np.ndarray] | None = None, **fields: Any
    ) -> Iterator[list[Said]]:
        """Rank 0: tell the others what to do, do our part in the block, then hear them; yields where answers come.

        Args:
            together: the work has collective calls in it, so that a failure on one rank ends the run; else all ranks
                reach its end whatever happens.

        Raises:
            LostRankError: a rank is gone. Any FoundryError: a rank's, where ours did not fail.
        """
        answers: list[Said] = []
        with self._lock:
            if self.broken:
                raise LostRankError("the processes of this run have lost each other", hint=_AGAIN)
            try:
                with self.noticing_loss():
                    self._tell(Said(verb, fields, dict(arrays or {}), engine))
                yield answers
            except FoundryError:
                self.broken = self.broken or together
                if not self.broken:
                    self._hear()
                raise
            except BaseException as error:
                self.broken = True
                self._blame(error)
                raise
            with self.noticing_loss():
                answers += self._hear()
        for rank, answer in enumerate(answers, start=1):
            if answer.verb == "failed":
                raise _error_of(answer.fields, rank)

    def next(self) -> Said:
        """Others: wait to be told.

        Raises:
            LostRankError: rank 0 is gone.
        """
        with self.noticing_loss():
            return _unpacked(self._broadcast(None))

    def answer(self, said: Said) -> None:
        """Others: what came of it."""
        self._send(said)

    def answer_failure(self, error: FoundryError) -> None:
        """Others: it did not work, and nothing was broken off half-way."""
        self._send(Said("failed", _fields_of(error)))

    def give_up(self, error: BaseException) -> None:
        """Others: common work failed here. Say why, let go of everyone, and leave rank 0 the time to say it."""
        self.broken = True
        with suppress(RuntimeError):
            self._store.set(_LOST, json.dumps({**_fields_of(error), "rank": self.rank}))
            dist.destroy_process_group()
            self._store.wait([_HEARD], _HEARD_TIMEOUT)

    def sum_in_order(self, value: float) -> float:
        """The float64 sum over ranks, the same bits on each; a collective call."""
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(values, torch.tensor([value], dtype=torch.float64), group=self._talk)
        return sum(float(each) for each in values)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of counts or other values that add up exactly; a collective call."""
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """Common work: where it breaks off because of another rank, say so.

        Raises:
            LostRankError: another rank is gone. Rank 0: the error that it gave up with.
        """
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            self._blame(error)
            raise

    def _blame(self, error: BaseException) -> None:
        """Common work broke off: raise the reason that a rank gave, or that one is gone; else it was our own."""
        if not isinstance(error, RuntimeError):
            return
        reason = self._reason() if self.is_first else {}
        if not reason and not _is_about_others(error):
            return
        _ignore_the_launcher()
        if reason:
            raise _error_of(reason, int(reason["rank"])) from error
        what = "another process of this run is gone, or did not answer in time"
        raise LostRankError(what, where=f"rank {self.rank}", hint=_AGAIN) from error

    def _reason(self) -> dict[str, Any]:
        """Why another rank gave up, which is glad to be heard."""
        with suppress(RuntimeError, ValueError):
            if self._store.check([_LOST]):
                reason = json.loads(self._store.get(_LOST))
                self._store.set(_HEARD, "yes")
                return reason
        return {}

    def _tell(self, said: Said) -> None:
        self._broadcast(_packed(said))

    def _broadcast(self, payload: bytes | None) -> bytes:
        size = torch.tensor([0 if payload is None else len(payload)])
        dist.broadcast(size, 0, group=self._talk)
        data = _as_tensor(payload) if payload is not None else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._talk)
        return data.numpy().tobytes()

    def _send(self, said: Said) -> None:
        payload = _packed(said)
        with self.noticing_loss():
            dist.send(torch.tensor([len(payload)]), 0, group=self._talk)
            dist.send(_as_tensor(payload), 0, group=self._talk)

    def _hear(self) -> list[Said]:
        return [_unpacked(self._receive(rank)) for rank in range(1, self.size)]

    def _receive(self, rank: int) -> bytes:
        size = torch.zeros(1, dtype=torch.int64)
        _wait(dist.irecv(size, rank, group=self._talk))
        data = torch.empty(int(size), dtype=torch.uint8)
        _wait(dist.irecv(data, rank, group=self._talk))
        return data.numpy().tobytes()


_here: Ranks | None = None


def current() -> Ranks | None:
    """The ranks that this process has joined, or None where it is alone."""
    return _here


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that the launcher started, and leave them at the end."""
    global _here
    _here = Ranks.join()
    try:
        yield _here
    finally:
        ranks, _here = _here, None
        ranks.leave()


def _ignore_the_launcher() -> None:
    """It stops all processes when one is gone; what is to be said is why that one is."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _wait(work: Any) -> None:
    work.wait(WORK_TIMEOUT)


def _is_about_others(error: RuntimeError) -> bool:
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "timed out", "peer", "process group", "processgroup")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _fields_of(error: BaseException) -> dict[str, Any]:
    if isinstance(error, FoundryError):
        return {"kind": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    trace = "".join(traceback.format_exception(error))
    return {"kind": "", "what": f"unforeseen {type(error).__name__}: {error}", "where": None, "trace": trace}


def _error_of(fields: Mapping[str, Any], rank: int) -> FoundryError:
    where = f"rank {rank}" if fields.get("where") is None else f"rank {rank}, {fields['where']}"
    error = _KINDS.get(fields["kind"], EngineError)(fields["what"], where=where, hint=fields.get("hint"))
    error.__cause__ = RuntimeError(fields["trace"]) if fields.get("trace") else None
    return error


def _packed(said: Said) -> bytes:
    head = json.dumps({"verb": said.verb, "fields": said.fields, "engine": said.engine}).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in said.arrays.items()}
    return pack({"": np.frombuffer(head, dtype=np.uint8), **arrays})


def _unpacked(payload: bytes) -> Said:
    arrays = unpack(payload)
    head = json.loads(arrays.pop("").tobytes())
    return Said(head["verb"], head["fields"], arrays, head["engine"])


def _as_tensor(payload: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
