"""The server as a process: how it starts, refuses to start, stops, and is started again."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import Served, process
from tests.tiny_runs import assert_one_paragraph, foundry, start

pytestmark = pytest.mark.slow
LONG = {"prompt": "Go on", "max_tokens": 500}  # takes seconds


def ask(url: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=body, trust_env=False, **{"timeout": 60, **options})


def fails(url: str) -> bool:
    """Whether a long answer breaks off."""
    try:
        return ask(url, LONG).status_code >= 500
    except httpx.HTTPError:
        return True


def test_a_port_in_use_is_told_before_anything_is_loaded(tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = foundry("serve", tiny / "base", f"port={port}")
        assert_one_paragraph(done, code=2, words=(f"127.0.0.1:{port}", "port=0"))
        assert_one_paragraph(foundry("serve", tiny / "base", "host=no.such.host.invalid"), code=2, words=("no.such",))


def test_sigterm_lets_running_answers_end(endless: Path) -> None:
    with process(endless) as (running, url):
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(ask(url, LONG)))
        asking.start()
        while httpx.get(f"{url}/stats", trust_env=False).json()["running"] == 0:
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.HTTPError):
            ask(url, LONG, timeout=2)
        asking.join(timeout=60)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 500
        assert running.wait(timeout=20) == 0


def test_a_stream_that_is_cut_off_by_the_end_says_so(endless: Path) -> None:
    """Its connection broke in the middle of a piece, which a client cannot tell from a network that failed."""
    with process(endless, "limits.drain_seconds=0.05") as (running, url):
        with httpx.stream("POST", f"{url}/generate/stream", json=LONG, timeout=60, trust_env=False) as answer:
            events = answer.iter_lines()
            next(events)
            running.send_signal(signal.SIGTERM)
            last = [line for line in events if line][-1]
        assert running.wait(timeout=20) == 0
    told = json.loads(last.removeprefix("data: "))
    assert told["status"] == 503
    assert "the server stops" in told["error"]


def test_what_does_not_end_in_time_is_cut_off(endless: Path) -> None:
    # A quiet machine writes the whole answer within a second.
    with process(endless, "limits.drain_seconds=0.05") as (running, url):
        failed: list[bool] = []
        asking = threading.Thread(target=lambda: failed.append(fails(url)))
        asking.start()
        while httpx.get(f"{url}/stats", trust_env=False).json()["running"] == 0:
            time.sleep(0.02)
        started = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=20) == 0
        assert time.monotonic() - started < 10
        asking.join(timeout=20)
        assert failed == [True]


def test_killed_under_load_and_started_again_on_the_same_port(endless: Path) -> None:
    with process(endless) as (running, url):
        expected = ask(url, {"prompt": "Name a colour."}).json()["text"]
        failed: list[bool] = []
        threads = [threading.Thread(target=lambda: failed.append(fails(url))) for _ in range(8)]
        for thread in threads:
            thread.start()
        # Not after some time: within it a quiet machine has written a whole answer.
        while httpx.get(f"{url}/stats", trust_env=False).json()["running"] == 0:
            time.sleep(0.01)
        running.kill()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a client hangs on a server that is gone"
        assert failed == [True] * 8
    port = int(url.rsplit(":", 1)[1])
    with process(endless, port=port) as (_, again):
        assert again == url
        assert ask(again, {"prompt": "Name a colour."}).json()["text"] == expected


def test_health_check_only(tiny: Path, served: Served) -> None:
    done = foundry("serve", tiny / "base", "--health-check-only", "model.dtype=float32")
    assert done.returncode == 0, done.stderr
    assert "/generate: 200" in done.stderr
    there = foundry("serve", "--health-check-only", "--json", f"port={served.port}")
    assert (there.returncode, json.loads(there.stdout)) == (0, {"healthy": True})
    nobody = foundry("serve", "--health-check-only", "port=9")
    assert nobody.returncode == 1
    assert "no answer" in nobody.stderr


def test_a_thousand_connections_that_never_send(tiny: Path) -> None:
    with process(tiny / "base", "limits.header_seconds=5", "limits.connections=200") as (running, url):
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        idle: list[socket.socket] = []
        for _ in range(1000):
            try:
                idle.append(socket.create_connection(address, timeout=5))
            except OSError:
                break  # the system's own limit of open files, ours
        try:
            assert len(idle) > 500
            assert ask(url, {"prompt": "Name a colour.", "max_tokens": 2}, timeout=10).status_code == 200
            assert running.poll() is None
        finally:
            for connection in idle:
                connection.close()


def test_one_json_object_a_line_is_logged(tiny: Path) -> None:
    running = start("serve", tiny / "base", "port=0", "model.dtype=float32")
    assert running.stderr is not None
    while not (line := running.stderr.readline()).startswith("serving "):
        assert line
    url = line.rsplit(" ", 1)[1].strip()
    ask(url, {"prompt": "my-private-question", "max_tokens": 2})
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=30)
    assert "my-private-question" not in said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [entry["route"] for entry in lines if entry["event"] == "request"] == ["/generate"]


def test_foundry_chat_talks_to_a_server(served: Served) -> None:
    done = foundry("chat", served.url, "prompt=Name a colour.", "max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    expected = served.post("/generate", {"prompt": "Name a colour.", "max_tokens": 8}).json()["text"]
    assert done.stdout == expected + "\n"
    base = foundry("chat", f"{served.url}/v1#base", "prompt=Name a colour.", "max_new_tokens=8")
    assert base.stdout not in ("", done.stdout)
    missing = foundry("chat", f"{served.url}#gpt-9", "prompt=x")
    assert_one_paragraph(missing, code=3, words=("not served", "tuned"))
    assert_one_paragraph(foundry("chat", "http://127.0.0.1:9", "prompt=x"), code=3, words=("foundry serve",))
