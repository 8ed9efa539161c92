"""No record is lost, none is half, and two runs can be compared by everything but the clock."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.errors import RunError
from model_foundry.run.metrics import MetricsLog, comparable_lines, read_metrics


def step(number: int, seconds: float = 0.0) -> dict[str, object]:
    return {"kind": "step", "step": number, "loss": 1.0 / number, "clock": {"seconds": seconds}}


def write(path: Path, *steps: int) -> None:
    with MetricsLog(path) as log:
        for number in steps:
            log.append(step(number))


def test_a_record_is_on_its_way_to_the_disk_when_append_returns(tmp_path: Path) -> None:
    """Prevents a buffer that a SIGKILL empties. A real process is killed in mid-append."""
    path = tmp_path / "metrics.jsonl"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        log = MetricsLog(path)
        for number in range(1, 10_000_000):
            log.append(step(number))
            os.write(writer, number.to_bytes(4, "big"))
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        for _ in range(200):
            pipe.read(4)
        os.kill(child, signal.SIGKILL)
        told = pipe.read()
    os.waitpid(child, 0)
    told_last = 200 + len(told) // 4
    records = MetricsLog(path).read()
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= told_last


def test_a_torn_last_line_is_cut_on_opening_and_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + b'{"kind": "st')
    assert len(read_metrics(path)) == 2, "a reader beside the writer sees whole records only"
    with MetricsLog(path) as log:
        assert log.torn == b'{"kind": "st'
        log.append(step(3))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", [b"not json", b"[1]", b"", b'{"a": NaN}'])
def test_a_line_that_is_no_record_is_an_error_with_its_number(tmp_path: Path, line: bytes) -> None:
    """Prevents a reader that skips what it does not understand."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_a_missing_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none\.jsonl.*No such file"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(RunError, match="No such file"):
        MetricsLog(tmp_path / "no" / "none.jsonl")


def test_truncation_keeps_everything_of_the_step_and_the_log_goes_on(tmp_path: Path) -> None:
    """Prevents a resumed run with the records of both its lives."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"kind": "validation", "step": 0, "loss": 3.0})
        for number in (1, 2, 3):
            log.append(step(number))
            log.append({"kind": "validation", "step": number, "loss": 1.0})
        log.append({"kind": "note"})
        assert log.truncate_after(2) == 3
        log.append(step(3))
        assert log.truncate_after(3) == 0
        assert [record["step"] for record in log.read()] == [0, 1, 1, 2, 2, 3]
        assert log.truncate_after(0) == 5
    assert [record["step"] for record in read_metrics(path)] == [0]


def test_a_log_that_ends_before_the_checkpoint_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a hole in the curve that nobody hears of."""
    write(tmp_path / "metrics.jsonl", 1, 2)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.truncate_after(2)
        assert not caplog.records
        log.truncate_after(5)
    assert "ends at step 2, the run goes on after step 5" in caplog.text


@pytest.mark.slow
@given(steps=st.lists(st.integers(1, 20), max_size=12).map(sorted), cut=st.integers(0, 21))
def test_truncated_and_continued_equals_undisturbed(
    steps: list[int], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    write(folder / "straight", *steps)
    write(folder / "resumed", *steps)
    with MetricsLog(folder / "resumed") as log:
        log.truncate_after(cut)
        for number in steps:
            if number > cut:
                log.append(step(number, seconds=9.0))
    assert comparable_lines(folder / "resumed") == comparable_lines(folder / "straight")


def test_comparison_leaves_out_the_clock_and_nothing_else(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1.0, 0.1), ("b", 2.0, 0.1), ("c", 1.0, np.nextafter(0.1, 1))):
        with MetricsLog(tmp_path / name) as log:
            log.append({"kind": "step", "step": 1, "loss": loss, "clock": {"seconds": seconds}})
    assert comparable_lines(tmp_path / "a") == comparable_lines(tmp_path / "b")
    assert comparable_lines(tmp_path / "a") != comparable_lines(tmp_path / "c"), "the last bit counts"


def test_numpy_numbers_keep_every_digit(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.append({"f32": np.float32(0.1), "f64": np.float64(0.1), "i": np.int64(3), "nan": float("nan")})
        assert log.read() == [{"f32": 0.1, "f64": 0.1, "i": 3, "nan": None}]


def test_a_full_disk_is_an_error_and_leaves_no_half_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(path) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        try:
            with pytest.raises(RunError, match="File too large"):
                log.append(step(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.append(step(2))
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    closers: list[Callable[[], None]] = [log.close, log.close]
    for close in closers:
        close()
