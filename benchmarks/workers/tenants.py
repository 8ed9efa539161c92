"""Several tenants that train adapters of their own over one base: our service, our engine, or PEFT in a loop.

Each tenant repeats a forward_backward and a step on rows of its own. The first step is a warm-up and not timed.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.workers.process import run_worker, tune_allocator

LEARNING_RATE = 1e-3
Rows = list[np.ndarray]


def rows_of(spec: dict[str, Any], tenant: int) -> Rows:
    """int64 [row_tokens + 1] each: the same in every step, so that the loss falls."""
    draw = np.random.default_rng(spec["seed"] * 1000 + tenant)
    return [draw.integers(1000, 20000, spec["row_tokens"] + 1) for _ in range(spec["rows"])]


def result(spec: dict[str, Any], seconds: float, losses: list[float], **more: Any) -> dict[str, Any]:
    per_step = spec["rows"] * spec["row_tokens"]
    return {
        "seconds": seconds,
        "tokens": spec["tenants"] * (spec["steps"] - 1) * per_step,
        "last_losses": [loss / per_step for loss in losses],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers", "tinker")},
        **more,
    }


def engine(spec: dict[str, Any]) -> dict[str, Any]:
    from model_foundry.engine.torch_engine import TorchEngine
    from model_foundry.types import AdamParams, Datum, LoraConfig

    made = TorchEngine(device="cpu", dtype=spec["dtype"], num_threads=spec["num_threads"], micro_batch_tokens=512)
    base = Path(spec["model"])
    made.create_model(base, lora=None, trainable=False)
    lora = LoraConfig(r=spec["rank"], lora_alpha=32)
    models = [made.create_model(base, lora=lora, seed=tenant) for tenant in range(spec["tenants"])]
    data = [
        [
            Datum(row[:-1].astype(np.int32), {"target_tokens": row[1:], "weights": np.ones(len(row) - 1, np.float32)})
            for row in rows_of(spec, tenant)
        ]
        for tenant in range(spec["tenants"])
    ]
    began, losses = 0.0, [0.0] * len(models)
    for step in range(spec["steps"]):
        if step == 1:
            began = time.perf_counter()
        for tenant, model in enumerate(models):
            losses[tenant] = made.forward_backward(model, data[tenant], logprobs="all").loss_sum
            made.optim_step(model, AdamParams(learning_rate=LEARNING_RATE))
    return result(spec, time.perf_counter() - began, losses)


def peft(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["num_threads"])
    base: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    base.config.use_cache = False
    lora = LoraConfig(r=spec["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora, adapter_name="0")
    for tenant in range(1, spec["tenants"]):
        model.add_adapter(str(tenant), lora)
    optimizers, tokens = [], []
    for tenant in range(spec["tenants"]):
        model.set_adapter(str(tenant))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0))
        tokens.append(torch.from_numpy(np.stack(rows_of(spec, tenant))))
    began, losses = 0.0, [0.0] * spec["tenants"]
    for step in range(spec["steps"]):
        if step == 1:
            began = time.perf_counter()
        for tenant, batch in enumerate(tokens):
            model.set_adapter(str(tenant))
            logits = model(input_ids=batch[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            loss.backward()
            optimizers[tenant].step()
            optimizers[tenant].zero_grad()
            losses[tenant] = float(loss)
    return result(spec, time.perf_counter() - began, losses)


def service(spec: dict[str, Any]) -> dict[str, Any]:
    """Clients are threads of this process; the service is another."""
    with running_service(spec) as url:
        return _clients(spec, url)


@contextmanager
def running_service(spec: dict[str, Any]) -> Iterator[str]:
    """`foundry service` in a process of its own; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "model_foundry", "service", f"base_model={spec['model']}", f"port={port}",
        f"state_dir={spec['scratch']}/state", f"num_threads={spec['num_threads']}", f"dtype={spec['dtype']}",
        "log_level=warning", *spec.get("options", []),
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{port}/api/v1/healthz", running)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait()


def _wait(url: str, running: subprocess.Popen[bytes]) -> None:
    while running.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the service did not start")


def _clients(spec: dict[str, Any], url: str) -> dict[str, Any]:
    os.environ["TINKER_TELEMETRY"] = "0"
    import tinker
    from tinker import types

    num_tenants, losses, seconds = spec["tenants"], [0.0] * spec["tenants"], [0.0] * spec["tenants"]
    begin = threading.Barrier(num_tenants + 1)
    errors: list[BaseException] = []

    def tenant_loop(tenant: int) -> None:
        client = tinker.ServiceClient(base_url=url, api_key=f"tml-tenant-{tenant}")
        model = client.create_lora_training_client(
            base_model=spec["model"], rank=spec["rank"], seed=tenant, train_unembed=False
        ).result()
        data: list[Any] = []
        for row in rows_of(spec, tenant):
            inputs: Any = {"target_tokens": row[1:].tolist(), "weights": [1.0] * (len(row) - 1)}
            prompt = types.ModelInput.from_ints(row[:-1].tolist())
            data.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))

        def step() -> None:
            done = model.forward_backward(data, "cross_entropy")
            stepped = model.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
            losses[tenant] = done.result().metrics["loss:sum"]
            stepped.result()

        step()
        begin.wait()
        for _ in range(spec["steps"] - 1):
            step()
        seconds[tenant] = time.perf_counter()

    def guarded(tenant: int) -> None:
        try:
            tenant_loop(tenant)
        except BaseException as error:
            errors.append(error)
            begin.abort()

    threads = [threading.Thread(target=guarded, args=(tenant,)) for tenant in range(num_tenants)]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return result(spec, max(seconds) - began, losses)


PEERS = {"service": service, "engine": engine, "peft": peft}

if __name__ == "__main__":
    tune_allocator()
    run_worker(lambda spec: PEERS[spec["peer"]](spec))
