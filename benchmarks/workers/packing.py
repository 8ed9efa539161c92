"""What the packing workers share: one core, the clock around the work, and what proves that the rows are the same."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np


def use_one_core() -> None:
    """This process and whatever threads it starts run on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


class Clock:
    """Wall-clock and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}


def rows_digest(rows: Iterable[tuple[Any, Any]]) -> str:
    """sha256 over (ids, mask) of every row in the order of the file."""
    digest = hashlib.sha256()
    for ids, mask in rows:
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(np.asarray(ids, dtype=np.int32).tobytes())
        digest.update((np.asarray(mask) > 0).astype(np.uint8).tobytes())
    return digest.hexdigest()
