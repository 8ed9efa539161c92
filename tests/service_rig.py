"""A training service in a process of its own, to be talked to over a socket, killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from tinker import types

KEY = "tml-test"


class Service:
    """`foundry service` over a tiny base. Its port stays the same over restarts, as a client needs it to.

    Args:
        options: `key=value` overrides.
    """

    def __init__(self, base: Path, state: Path, *options: str) -> None:
        self.base, self.state, self.options = base, state, options
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and wait until it answers."""
        arguments = [f"base_model={self.base}", f"state_dir={self.state}", f"port={self.port}", "num_threads=1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "model_foundry", "service", *arguments, *self.options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=open(self.log, "a"),  # noqa: SIM115 - the child's
            text=True,
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text()[-3000:])
            try:
                if httpx.get(f"{self.url}/api/v1/healthz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the service did not answer")

    @property
    def log(self) -> Path:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        return self.state.with_name(f"{self.state.name}.log")

    def kill(self) -> None:
        """As a power cut would, but for what the disk had not written."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)

    def api(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=f"{self.url}/api/v1/", headers={"X-API-Key": key}, timeout=60)


def finish(api: httpx.Client, request: httpx.Response) -> dict[str, Any]:
    """What became of an operation that was accepted, as JSON."""
    assert request.status_code == 200, request.text
    while True:
        answer = api.post("retrieve_future", json={"request_id": request.json()["request_id"]})
        if answer.status_code != 408:
            assert answer.status_code == 200, answer.text
            return answer.json()


def datum(seed: int, *, length: int = 10) -> types.Datum:
    ids = np.random.default_rng(seed).integers(3, 250, length + 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1].tolist()),
        loss_fn_inputs=inputs(target_tokens=ids[1:].tolist(), weights=[1.0] * length),
    )


def inputs(**values: Any) -> Any:
    """Lists, which the SDK takes and its types do not name."""
    return values


def batch(step: int) -> list[types.Datum]:
    return [datum(100 * step + row, length=6 + row) for row in range(3)]


def files_of(folder: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, by file."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
