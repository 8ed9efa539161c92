"""A bar on a terminal, plain lines elsewhere, and a time left that can be believed."""

from __future__ import annotations

import io
import os
from contextlib import suppress

import pytest

from model_foundry.run.progress import TimeLeft, duration, open_progress


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drain(master: int) -> str:
    """What a terminal has received so far."""
    os.set_blocking(master, False)
    shown = b""
    with suppress(BlockingIOError):
        while block := os.read(master, 1 << 16):
            shown += block
    return shown.decode()


def run(seconds_per_step: float, total_steps: int, *, log_steps: int = 1, done_steps: int = 0) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with open_progress(stream=stream, log_steps=log_steps, min_seconds=5.0, clock=clock) as progress:
        progress.start(total_steps, "train", done_steps=done_steps)
        for step in range(done_steps + 1, total_steps + 1):
            clock.now += seconds_per_step
            progress.advance(step, loss=1.0 / step, tokens_per_second=1234.5)
    return stream.getvalue().splitlines()


def test_lines_come_every_few_seconds_and_the_last_always() -> None:
    """Prevents a log of a hundred thousand lines, and one that never says that it ended."""
    lines = run(1.0, 12)
    assert lines == [
        "train 1/12 · loss 1.0000 · 1,234 tokens/s · 11 s left",
        "train 6/12 · loss 0.1667 · 1,234 tokens/s · 6 s left",
        "train 11/12 · loss 0.0909 · 1,234 tokens/s · 1 s left",
        "train 12/12 · loss 0.0833 · 1,234 tokens/s",
    ]


def test_slow_steps_are_shown_as_often_as_log_steps_says() -> None:
    assert [line.split(" ")[1] for line in run(30.0, 7, log_steps=3)] == ["3/7", "6/7", "7/7"]


def test_a_resumed_run_counts_only_its_own_time() -> None:
    """Prevents a time left of seconds because the first steps took none."""
    assert run(10.0, 100, done_steps=90)[0].endswith("1 min 30 s left")


def test_a_slow_first_step_is_forgotten() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.start(1000, 0)
    assert left.mark(0) is None
    clock.now += 600
    assert left.mark(1) == pytest.approx(600 * 999)
    estimate = None
    for step in range(2, 60):
        clock.now += 1
        estimate = left.mark(step)
    assert estimate == pytest.approx(1000 - 59)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_by_example(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_bar_on_a_terminal_shows_step_loss_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real pseudo-terminal: prevents a bar that shows nothing, or plain lines that scroll."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = os.openpty()
    clock = Clock()
    with open(slave, "w") as terminal:
        with open_progress(stream=terminal, clock=clock) as progress:
            progress.start(4, "train")
            for step in range(1, 5):
                clock.now += 2
                progress.advance(step, loss=0.5, tokens_per_second=100)
            progress.start(2, "evaluate")
            progress.advance(2)
        shown = drain(master)
    os.close(master)
    for part in ("train", "4/4", "loss 0.5000", "100 tokens/s", "evaluate", "2/2"):
        assert part in shown


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    master, slave = os.openpty()
    with open(slave, "w") as terminal, open_progress(stream=terminal) as progress:
        progress.start(1, "train")
        progress.advance(1)
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert shown == "train 1/1\r\n"
