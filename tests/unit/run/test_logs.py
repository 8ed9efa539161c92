"""Console, file and per-run logs that do not interfere, with each other or with anyone else's."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path

import pytest

from model_foundry.errors import RunError
from model_foundry.run.logs import run_logging

logger = logging.getLogger("model_foundry.somewhere")


def test_the_console_shows_from_its_level_up_and_the_file_has_everything(tmp_path: Path) -> None:
    console = io.StringIO()
    with run_logging(tmp_path / "run.log", level="info", stream=console):
        logger.debug("detail")
        logger.info("progress")
        logger.warning("careful %d", 1)
    assert console.getvalue() == "progress\nwarning: careful 1\n"
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "DEBUG   model_foundry.somewhere: detail",
        "INFO    model_foundry.somewhere: progress",
        "WARNING model_foundry.somewhere: careful 1",
    ]
    assert lines[0].split(" ")[0].endswith("Z")


def test_two_runs_one_after_the_other_double_no_line(tmp_path: Path) -> None:
    """Prevents handlers that stay behind, the classic of notebooks."""
    console = io.StringIO()
    for name in ("a", "b"):
        with run_logging(tmp_path / name, stream=console):
            logger.info("from %s", name)
    assert console.getvalue() == "from a\nfrom b\n"
    assert (tmp_path / "a").read_text().count("\n") == 1


def test_two_runs_at_once_keep_to_their_own_files(tmp_path: Path) -> None:
    """Prevents one run's log from holding another's lines."""
    both = threading.Barrier(2)

    def run(name: str) -> None:
        with run_logging(tmp_path / name, console=False):
            both.wait()
            logger.info("from %s", name)
            both.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in "ab":
        (line,) = (tmp_path / name).read_text().splitlines()
        assert line.endswith(f"from {name}")


def test_a_thread_that_belongs_to_no_run_is_heard(tmp_path: Path) -> None:
    with run_logging(tmp_path / "log", console=False):
        thread = threading.Thread(target=lambda: logger.info("from a library's thread"))
        thread.start()
        thread.join()
    assert "library's thread" in (tmp_path / "log").read_text()


def test_the_root_logger_and_our_own_are_left_as_they_were(tmp_path: Path) -> None:
    """Prevents a library that takes over its host's logging."""
    root, ours = logging.getLogger(), logging.getLogger("model_foundry")

    def state() -> tuple[object, ...]:
        return (root.level, list(root.handlers), ours.level, ours.propagate, list(ours.handlers))

    before = state()
    with run_logging(tmp_path / "a", stream=io.StringIO()):
        assert (root.level, list(root.handlers)) == before[:2]
        with run_logging(tmp_path / "b", stream=io.StringIO()):
            pass
    assert state() == before
    with pytest.raises(RunError, match=r"no/where.*cannot be written"), run_logging(tmp_path / "no" / "where"):
        pass
    assert state() == before


def test_with_a_host_that_logs_too_a_line_appears_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents every line twice on the console after somebody's basicConfig."""
    console = io.StringIO()
    with caplog.at_level(logging.DEBUG):
        with run_logging(tmp_path / "a", stream=console):
            logger.info("ours")
        with run_logging(tmp_path / "a", console=False):
            logger.info("the host's")
    assert console.getvalue() == "ours\n"
    assert [record.message for record in caplog.records] == ["the host's"]


def test_tracebacks_go_to_the_file_only_and_a_torn_line_is_ended(tmp_path: Path) -> None:
    console = io.StringIO()
    (tmp_path / "log").write_text("killed in mid-")
    with run_logging(tmp_path / "log", stream=console):
        try:
            raise ValueError("inner")
        except ValueError:
            logger.exception("it failed")
    assert console.getvalue() == "error: it failed\n"
    text = (tmp_path / "log").read_text()
    assert text.startswith("killed in mid-\n20")
    assert "ValueError: inner" in text


def test_the_console_is_wherever_stderr_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents lines that go around a progress bar and break it."""
    with run_logging():
        logger.info("shown")
    assert capsys.readouterr().err == "shown\n"
