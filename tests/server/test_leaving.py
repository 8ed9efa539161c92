"""Who goes leaves nothing behind: clients at any moment, and adapters that are taken away while requests wait."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_foundry.types import LoraConfig
from tests.serving import Served, serving
from tests.tiny_adapters import write_tiny_adapter

pytestmark = pytest.mark.slow
KEY = "a-key-that-may-do-everything"
LONG = {"prompt": "Go on", "max_tokens": 500}


def ask_and_go(served: Served, seed: int) -> None:
    """Streams that are left between the first byte of the request and the first of the answer, or a little later."""
    drawn = random.Random(seed)
    body = json.dumps(LONG).encode()
    head = b"POST /generate/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    for _ in range(60):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
            time.sleep(drawn.random() * drawn.choice([0.001, 0.004, 0.02]))


def test_clients_that_go_at_any_moment_leave_every_place_free(endless: Path) -> None:
    """A stream whose client goes before its first event never begins, so nothing at its end is done."""
    with serving(endless, batch__max_sequences=4) as served:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: ask_and_go(served, seed), range(4)))
        served.wait_until_idle()
        assert served.post("/generate", {"prompt": "Name a colour.", "max_tokens": 2}).status_code == 200


def test_an_adapter_that_is_taken_away_stays_for_requests_that_wait(endless: Path, tmp_path: Path) -> None:
    """Under load each new checkpoint of a followed run, and each removed adapter, failed whoever stood in the queue."""
    write_tiny_adapter(tmp_path / "shelf" / "third", endless, LoraConfig(r=4), scale=0.2)
    shelf = {"access__adapter_folder": str(tmp_path / "shelf"), "batch__max_sequences": 1}
    environ = {"FOUNDRY_API_KEY": KEY}
    with serving(endless, environ=environ, **shelf) as served, served.client(KEY) as client:
        ask = {"prompt": "Name a colour.", "max_tokens": 8, "model": "third"}

        def add() -> int:
            return client.post("/adapters", json={"name": "third"}).status_code

        assert add() == 201
        expected = client.post("/generate", json=ask).json()["text"]
        with ThreadPoolExecutor() as pool:
            long = pool.submit(served.post, "/generate", LONG, key=KEY)
            while served.stats(KEY)["running"] == 0:
                time.sleep(0.002)
            waits = pool.submit(served.post, "/generate", ask, key=KEY)
            while served.stats(KEY)["waiting"] == 0 and not long.done():
                time.sleep(0.002)
            assert client.delete("/adapters/third").status_code == 200
            assert client.post("/generate", json=ask).status_code == 404
            assert add() == 201, "the name is free at once"
        assert long.result().status_code == 200
        assert (waits.result().status_code, waits.result().json()["text"]) == (200, expected)
        assert client.post("/generate", json=ask).json()["text"] == expected
