"""Futures that do nothing, asked of our service one after the other; or the health page, while others train."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.workers.process import run_worker
from benchmarks.workers.tenants import running_service

NOTHING = {"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}, "type": "optim_step"}


def sync_milliseconds(folder: Path) -> float:
    """The median of appending 20 kB to a file and syncing it."""
    found = []
    with (folder / "probe").open("wb") as file:
        for _ in range(30):
            began = time.perf_counter()
            file.write(os.urandom(20_000))
            file.flush()
            os.fdatasync(file.fileno())
            found.append(1000 * (time.perf_counter() - began))
    return statistics.median(found)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    root = "/dev/shm" if spec["place"] == "memory" else None
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        spec = {"dtype": "auto", **spec, "scratch": scratch}
        sync = sync_milliseconds(Path(scratch))
        with running_service(spec) as url:
            found = CLIENTS[spec["client"]](spec, url)
    return {
        "milliseconds": found, "sync_milliseconds": sync,
        "versions": {name: importlib.metadata.version(name) for name in ("tinker", "uvicorn", "httpx")},
    }  # fmt: skip


def plain(spec: dict[str, Any], url: str) -> list[float]:
    with httpx.Client(base_url=f"{url}/api/v1/", headers={"X-API-Key": "tml-one"}, timeout=60) as api:
        model = new_model(api, spec)
        found = []
        for number in range(spec["calls"] + 20):
            began = time.perf_counter()
            request = api.post("optim_step", json={**NOTHING, "model_id": model, "seq_id": number + 1}).json()
            answer = api.post("retrieve_future", json={"request_id": request["request_id"]}).json()
            found.append(1000 * (time.perf_counter() - began))
            assert "not offered" in answer["error"]
    return found[20:]


def new_model(api: httpx.Client, spec: dict[str, Any]) -> str:
    session = api.post("create_session", json={"tags": [], "sdk_version": "0.38.0", "type": "create_session"}).json()
    body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": spec["model"]}
    request = api.post("create_model", json={**body, "lora_config": {"rank": 8}}).json()
    return api.post("retrieve_future", json={"request_id": request["request_id"]}).json()["model_id"]


def sdk(spec: dict[str, Any], url: str) -> list[float]:
    os.environ["TINKER_TELEMETRY"] = "0"
    import tinker
    from tinker import types

    client = tinker.ServiceClient(base_url=url, api_key="tml-one")
    model = client.create_lora_training_client(base_model=spec["model"], rank=1, train_unembed=False).result()
    found = []
    for _ in range(spec["calls"] + 20):
        began = time.perf_counter()
        # The SDK has no call for a refused optimizer; a step of an adapter of rank 1 without gradients takes 1 ms.
        model.optim_step(types.AdamParams(learning_rate=0.0)).result()
        found.append(1000 * (time.perf_counter() - began))
    return found[20:]


def load(spec: dict[str, Any], url: str) -> list[float]:
    over = threading.Event()
    errors: list[BaseException] = []

    def train(number: int) -> None:
        row = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": list(range(100, 132))}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": list(range(101, 133)), "dtype": "int64", "shape": [32]},
                "weights": {"data": [1.0] * 32, "dtype": "float32", "shape": [32]},
            },
        }
        try:
            with httpx.Client(base_url=f"{url}/api/v1/", headers={"X-API-Key": f"tml-{number}"}, timeout=60) as api:
                model, seq = new_model(api, spec), 0
                while not over.is_set():
                    for kind, more in (
                        ("forward_backward", {"forward_backward_input": {"data": [row], "loss_fn": "cross_entropy"}}),
                        ("optim_step", {"adam_params": {"learning_rate": 1e-4}}),
                    ):
                        seq += 1
                        request = api.post(kind, json={**more, "model_id": model, "seq_id": seq}).json()
                        api.post("retrieve_future", json={"request_id": request["request_id"]}).raise_for_status()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(5)
    found = []
    with httpx.Client(base_url=f"{url}/api/v1/", timeout=60) as api:
        for _ in range(spec["calls"]):
            began = time.perf_counter()
            api.get("healthz").raise_for_status()
            found.append(1000 * (time.perf_counter() - began))
            time.sleep(0.02)
    over.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


CLIENTS = {"plain": plain, "sdk": sdk, "load": load}

if __name__ == "__main__":
    run_worker(measure)
