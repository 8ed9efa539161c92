"""A real server on a real port, in a thread of this process; with small models, hundreds of requests take seconds."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from model_foundry.config.load import load_config
from model_foundry.config.serve import ServeConfig
from model_foundry.server.opening import Opened, open_model
from model_foundry.server.running import Server, listen, make_server
from model_foundry.server.security import load_keys
from tests.tiny_runs import environment, start


@dataclass(frozen=True)
class Served:
    """Where it is, and what is inside."""

    port: int
    opened: Opened
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **options)

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        with self.client(key) as client:
            return client.post(path, json=body)

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        with self.client(key) as client:
            return client.get(path)

    def stats(self, key: str | None = None) -> dict[str, Any]:
        return self.get("/stats", key).json()

    def wait_until_idle(self, key: str | None = None, seconds: float = 20) -> None:
        """Until no answer is computed or waits."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            stats = self.stats(key)
            if stats["running"] == stats["waiting"] == stats.get("batch_running", 0) == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"still busy: {stats}")

    def send(self, data: bytes, *, wait: float = 5) -> bytes:
        """Raw bytes on a connection of their own; everything that comes back until it is closed or quiet."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            received = b""
            try:
                while part := connection.recv(65536):
                    received += part
            except (TimeoutError, ConnectionResetError):
                pass
            return received


def _precision(model: Path) -> dict[str, str]:
    """A GGUF has its own."""
    return {} if model.suffix == ".gguf" else {"model.dtype": "float32"}


@contextmanager
def serving(model: Path, *, environ: Mapping[str, str] | None = None, **fields: Any) -> Iterator[Served]:
    """Serve a model on a free port; `fields` by dotted name with __ for the dot."""
    values = {**_precision(model), "batch.max_cache_tokens": 8192} | {
        name.replace("__", "."): value for name, value in fields.items()
    }
    overrides = [f"model.name={model}", *(f"{name}={value}" for name, value in values.items())]
    config = load_config(ServeConfig, path=None, overrides=overrides, environ={}).config
    keys = load_keys(config.access.keys_file, environ or {})
    listener = listen("127.0.0.1", 0)
    opened = open_model(config)
    server = make_server(config, opened, keys)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(listener.getsockname()[1], opened, server)
    finally:
        server.should_exit = True
        thread.join(timeout=40)
        opened.backend.close()
        listener.close()
        assert not thread.is_alive()


@contextmanager
def process(model: Path, *arguments: str, port: int = 0, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`foundry serve MODEL` and its address; killed at the end if it still runs."""
    precision = [f"{name}={value}" for name, value in _precision(model).items()]
    running = start("serve", model, f"port={port}", *precision, *arguments, env=environment(**env))
    assert running.stderr is not None
    lines: list[str] = []
    try:
        for line in running.stderr:
            lines.append(line)
            if line.startswith("serving "):
                break
        else:
            raise AssertionError("".join(lines))
        # Somebody must go on reading, or the log fills the pipe and the server stands still.
        threading.Thread(target=lambda: lines.extend(running.stderr or ()), daemon=True).start()
        yield running, line.rsplit(" ", 1)[1].strip()
    finally:
        if running.poll() is None:
            running.kill()
        running.wait(timeout=10)
