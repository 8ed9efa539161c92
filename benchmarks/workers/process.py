"""What every worker does to its own process: the allocator, the clock of the steps, its memory. Linux with glibc.

Knows nothing of torch, so that it can be called before torch makes its first allocation.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def tune_allocator() -> None:
    """Keeps freed pages instead of handing them back each step. Every peer at its best gets the same settings."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
        if libc.mallopt(option, value) != 1:
            raise OSError(f"mallopt({option}, {value}) was refused")


def resident_bytes(field_name: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field_name} is not in /proc/self/status")


def settle_memory() -> int:
    """Returns what is freed, restarts the peak counter and tells what is resident: the level a peak stands on."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_bytes()


@dataclass
class StepLog:
    """One optimizer step after another, as the peer's own loop made them.

    `seconds` is the step alone, `ends` when each ended; `saved_after` counts the steps done when a save was made.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    saved_after: list[int] = field(default_factory=list)
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    loaded_bytes: int = 0
    peak_bytes: int = 0
    num_trainable: int = 0
    num_parameters: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    _started: float = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.ends.append(time.perf_counter())
        self.seconds.append(self.ends[-1] - self._started)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {key: value for key, value in values.items() if not key.startswith("_")}


def run_worker(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Reads SPEC, tunes the allocator when it says so, works, writes RESULT."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec.get("allocator") == "tuned":
        tune_allocator()
    Path(sys.argv[2]).write_text(json.dumps(work(spec)), encoding="utf-8")
