"""How far training is: a bar on a terminal, plain lines elsewhere.

Shows steps, loss, tokens per second and the time left; decides nothing. Clock and stream are handed in.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self, TextIO

_RATE_WINDOW_STEPS = 20


class Progress(Protocol):
    """`start`, then `advance` after every step, then `close`. The three may be repeated."""

    def start(self, total_steps: int, description: str, *, done_steps: int = 0) -> None: ...

    def advance(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_progress(
    *,
    stream: TextIO | None = None,
    log_steps: int = 1,
    min_seconds: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A bar when `stream` (default stderr) is a terminal, plain lines otherwise.

    Args:
        log_steps: plain lines only: at steps divisible by this, but not more often than `min_seconds` (seconds).
    """
    target = sys.stderr if stream is None else stream
    if target.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return _BarProgress(target, clock)
    return _PlainProgress(target, clock, log_steps, min_seconds)


class TimeLeft:
    """Remaining seconds from the last few steps, so that a slow first step or a pause is soon forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._total_steps = 0
        self._marks: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW_STEPS + 1)

    def start(self, total_steps: int, done_steps: int) -> None:
        self._total_steps = total_steps
        self._marks.clear()
        self._marks.append((done_steps, self._clock()))

    def mark(self, step: int) -> float | None:
        """Note that `step` is done; seconds left, None before anything is known."""
        self._marks.append((step, self._clock()))
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if last_step <= first_step or last_time <= first_time:
            return None
        return (self._total_steps - step) * (last_time - first_time) / (last_step - first_step)


class _Base:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None: ...


class _PlainProgress(_Base):
    def __init__(self, stream: TextIO, clock: Callable[[], float], log_steps: int, min_seconds: float) -> None:
        self._stream = stream
        self._clock = clock
        self._log_steps = log_steps
        self._min_seconds = min_seconds
        self._time_left = TimeLeft(clock)
        self._total_steps = 0
        self._description = ""
        self._last_line = float("-inf")

    def start(self, total_steps: int, description: str, *, done_steps: int = 0) -> None:
        self._total_steps, self._description = total_steps, description
        self._last_line = float("-inf")
        self._time_left.start(total_steps, done_steps)

    def advance(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        seconds_left = self._time_left.mark(step)
        is_last = step >= self._total_steps
        is_due = step % self._log_steps == 0 and self._clock() - self._last_line >= self._min_seconds
        if not is_last and not is_due:
            return
        self._last_line = self._clock()
        parts = [f"{self._description} {step}/{self._total_steps}", *numbers(loss, tokens_per_second)]
        if seconds_left is not None and not is_last:
            parts.append(f"{duration(seconds_left)} left")
        self._stream.write(" · ".join(parts) + "\n")
        self._stream.flush()


class _BarProgress(_Base):
    """rich's bar. While it shows, what others write to stderr appears above it."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskID, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=stream),
            get_time=clock,
            expand=True,
        )
        self._time_left = TimeLeft(clock)
        self._total_steps = 0
        self._task: TaskID | None = None

    def start(self, total_steps: int, description: str, *, done_steps: int = 0) -> None:
        self._total_steps = total_steps
        self._task = self._bar.add_task(description, total=total_steps, completed=done_steps, numbers="")
        self._time_left.start(total_steps, done_steps)
        self._bar.start()

    def advance(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        if self._task is None:
            return
        parts = numbers(loss, tokens_per_second)
        seconds_left = self._time_left.mark(step)
        is_last = step >= self._total_steps
        if seconds_left is not None and not is_last:
            parts.append(f"{duration(seconds_left)} left")
        # rich draws ten times a second by itself; the end must not wait for it.
        self._bar.update(self._task, completed=step, numbers=" · ".join(parts), refresh=is_last)

    def close(self) -> None:
        self._bar.stop()


def numbers(loss: float | None, tokens_per_second: float | None) -> list[str]:
    """The measured numbers as a person reads them."""
    parts = [] if loss is None else [f"loss {loss:.4f}"]
    return parts if tokens_per_second is None else [*parts, f"{tokens_per_second:,.0f} tokens/s"]


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
