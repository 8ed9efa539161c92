"""`foundry serve` under load: 1, 4, 16 and 64 clients of locust that ask for answers of 64 tokens.

The server is a process of its own, started as a user starts it. `batched` is how it comes (sixteen places, the
invariant mode on a CPU), `free` the same without that mode, `one-by-one` has one place, and `llama.cpp` serves the same
weights as a bfloat16 GGUF. Every question is another, so no prompt lies in a cache but for what the chat template puts
before it. Latency is a client's, to the last byte; the time to the first text is the server's own, on average. Server
and clients share the machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.generation import write_bfloat16
from benchmarks.harness import ROOT, BenchmarkError, environment, say, table
from model_foundry.models.finder import resolve_model

CLIENTS = Path(__file__).with_name("workers") / "chatting.py"
PERCENTILES = ("50%", "95%", "99%")
MODES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "batched": ((1, 4, 16, 64), ()),
    "free": ((1, 16), ("batch.invariant=false",)),
    "one-by-one": ((4,), ("batch.max_sequences=1",)),
    "llama.cpp": ((1, 16), ("batch.max_cache_tokens=32768",)),
}
"""Name -> numbers of clients, and what the server is told."""


def main(arguments: Sequence[str]) -> int:
    given = _parse(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve_model(given.model).folder
        for mode in given.only.split(",") if given.only else MODES:
            if mode not in MODES:
                raise BenchmarkError(f"no such mode: {mode}; there are {list(MODES)}")
            clients, overrides = MODES[mode]
            served = write_bfloat16(Path(scratch, "model.gguf"), folder) if mode == "llama.cpp" else folder
            with serving(served, (*overrides, *given.set), num_threads=given.threads) as url:
                rows += [
                    {"mode": mode, **load(url, num_clients=number, seconds=given.seconds, given=given)}
                    for number in clients
                    if not given.clients or number in given.clients
                ]
    print(json.dumps({"benchmark": "serve", "max_tokens": given.max_tokens, "seconds": given.seconds, "rows": rows}))
    _show(rows)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench NAME=serve", description=__doc__)
    parser.add_argument("--seconds", type=int, default=30, help="how long clients begin new requests, for each row")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--only", default="", help=f"comma-separated modes of {', '.join(MODES)}")
    parser.add_argument(
        "--clients", type=lambda text: tuple(map(int, text.split(","))), default=(), help="of 1,4,16,64"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--set", action="append", default=[], help="a setting of foundry serve, key=value")
    return parser.parse_args(list(arguments))


@contextmanager
def serving(model: Path, overrides: Sequence[str], *, num_threads: int) -> Iterator[str]:
    """The address of a server in a process of its own, which is stopped at the end."""
    command = [sys.executable, "-m", "model_foundry", "serve", str(model), "port=0", *overrides]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(num_threads), stderr=log, text=True)
        try:
            yield _address(server, log)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _address(server: subprocess.Popen[str], log: Any) -> str:
    while True:
        log.seek(0)
        said = log.read()
        for line in said.splitlines():
            if line.startswith("serving "):
                return line.rsplit(" ", 1)[1]
        if server.poll() is not None:
            raise BenchmarkError(f"the server ended with status {server.returncode}\n{said[-3000:]}")
        time.sleep(0.1)


def load(url: str, *, num_clients: int, seconds: int, given: argparse.Namespace) -> dict[str, Any]:
    """What so many clients see; the first answers, which warm the server up, are not counted.

    Raises:
        BenchmarkError: locust failed, or a request did.
    """
    say(f"{num_clients} clients for {seconds} s")
    _locust(url, num_clients, 3, given)
    before = _stats(url)
    seen = _locust(url, num_clients, seconds, given)
    after = _stats(url)
    whole = seen["/generate"]
    rate = float(whole["Requests/s"])
    first, count = (after[name] - before[name] for name in ("first_seconds", "first_count"))
    tokens, answers = (after[name] - before[name] for name in ("completion_tokens", "total_requests"))
    return {
        "clients": num_clients,
        "requests": int(whole["Request Count"]),
        "requests_per_second": rate,
        "tokens_per_second": rate * tokens / answers,
        "latency_ms": [float(whole[name]) for name in PERCENTILES],
        "first_text_ms": 1000 * first / count,
    }


def _locust(url: str, num_clients: int, seconds: int, given: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Run locust; its statistics by name. It lets requests that are under way end."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "locust", "-f", str(CLIENTS), "--headless", "--host", url, "--only-summary",
            "--users", str(num_clients), "--spawn-rate", str(num_clients), "--run-time", f"{seconds}s",
            "--stop-timeout", "120s", "--reset-stats", "--csv", f"{scratch}/load", "--exit-code-on-error", "1",
        ]  # fmt: skip
        env = {**environment(1), "FOUNDRY_LOAD_MAX_TOKENS": str(given.max_tokens), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"locust ended with status {done.returncode}\n{done.stderr[-3000:]}")
        with Path(scratch, "load_stats.csv").open(encoding="utf-8", newline="") as file:
            return {row["Name"]: row for row in csv.DictReader(file)}


def _stats(url: str) -> dict[str, float]:
    """What the server has counted so far."""
    counted = httpx.get(f"{url}/stats", timeout=30, trust_env=False).json()
    metrics = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
    first = {
        kind: sum(map(float, re.findall(rf"foundry_first_token_seconds_{kind}{{.*}} (\S+)", metrics)))
        for kind in ("sum", "count")
    }
    return {
        "completion_tokens": counted["completion_tokens"], "total_requests": counted["total_requests"],
        "first_seconds": first["sum"], "first_count": first["count"],
    }  # fmt: skip


def _show(rows: Sequence[dict[str, Any]]) -> None:
    header = [
        "mode",
        "clients",
        "requests",
        "requests/s",
        "tokens/s",
        "p50 ms",
        "p95",
        "p99",
        "first text ms",
    ]
    lines = []
    for row in rows:
        rates = [f"{row['requests_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        times = [f"{value:.0f}" for value in (*row["latency_ms"], row["first_text_ms"])]
        lines.append([row["mode"], str(row["clients"]), str(row["requests"]), *rates, *times])
    table(header, lines)
