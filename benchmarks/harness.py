"""Rounds, ratios and the machine: how every benchmark here is run and told.

A round runs each peer once, in a process of its own, one after the other (A, B, C, then A, B, C again), with the same
number of threads. The machine is measured before and after every round; a round between two measurements that differ by
more than 5 % is dropped and another one run. What is reported is the median of the rounds' ratios, with the smallest
and the largest. A benchmark knows its peers; this module knows none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.models.finder import resolve_model

ROOT = Path(__file__).parents[1]
MAX_DRIFT = 0.05
MACHINE_KEYS = ("gflops_bfloat16", "bandwidth_gb_s")
Result = dict[str, Any]


class BenchmarkError(RuntimeError):
    """A run that says nothing about speed: it learned nothing, or the peers computed different things."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One side of a comparison: a worker module, what it is told, and its Python where that is not this one."""

    name: str
    worker: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int
    num_threads: int
    num_rows: int
    seed: int
    model: str
    only: tuple[str, ...]
    output: Path | None
    verbose: bool
    max_drift: float = MAX_DRIFT

    def choose(self, peers: Sequence[Peer]) -> list[Peer]:
        """The peers that --only names, or all of them."""
        unknown = set(self.only) - {peer.name for peer in peers}
        if unknown:
            raise BenchmarkError(f"no such peer: {sorted(unknown)}; there are {[peer.name for peer in peers]}")
        return [peer for peer in peers if not self.only or peer.name in self.only]


@dataclass
class Rounds:
    """Every kept round's results by peer, and what the machine did meanwhile."""

    results: dict[str, list[Result]]
    machine: list[Result]
    num_dropped: int

    def median(self, peer: str, value: Callable[[Result], float]) -> float:
        return statistics.median(value(result) for result in self.results[peer])

    def ratio(self, above: str, below: str, value: Callable[[Result], float]) -> dict[str, float]:
        """Median, smallest and largest of value(above) / value(below), each taken within one round."""
        pairs = zip(self.results[above], self.results[below], strict=True)
        ratios = [value(first) / value(second) for first, second in pairs]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def parse(arguments: Sequence[str], *, about: str | None, num_rows: int = 48) -> Options:
    parser = argparse.ArgumentParser(prog="make bench", description=about)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to keep (five or more to publish)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", type=int, default=num_rows, help="conversations a peer trains on in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", default="", help="comma-separated peers, to try one alone")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file too")
    parser.add_argument(
        "--max-drift", type=float, default=MAX_DRIFT, help="drop a round in which the machine drifted more"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the workers print")
    given = parser.parse_args(list(arguments))
    only = tuple(name for name in given.only.split(",") if name)
    return Options(
        rounds=given.rounds, num_threads=given.threads, num_rows=given.rows, seed=given.seed, model=given.model,
        only=only, output=given.output, verbose=given.verbose, max_drift=given.max_drift,
    )  # fmt: skip


def model_folder(options: Options) -> Path:
    return resolve_model(options.model).folder


def environment(num_threads: int) -> dict[str, str]:
    threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    # Importing our package has set these here, for its own sake; a peer gets the system's.
    own = ("OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return {**inherited, **threads, **quiet, "WANDB_DISABLED": "true", "PYTHONWARNINGS": "ignore"}


def run_worker(worker: str, spec: Mapping[str, Any], *, options: Options, python: str = sys.executable) -> Result:
    """One process, one result. Its output is shown only when it fails or --verbose asks."""
    with tempfile.TemporaryDirectory() as scratch:
        spec_path, result_path = Path(scratch, "spec.json"), Path(scratch, "result.json")
        full = {"num_threads": options.num_threads, "seed": options.seed, "scratch": scratch, **spec}
        spec_path.write_text(json.dumps(full), encoding="utf-8")
        command = [python, "-m", f"benchmarks.workers.{worker}", str(spec_path), str(result_path)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(options.num_threads), stdin=subprocess.DEVNULL,
            capture_output=not options.verbose, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0 or not result_path.is_file():
            raise BenchmarkError(f"{worker} failed with status {done.returncode}\n{(done.stderr or '')[-3000:]}")
        return json.loads(result_path.read_text(encoding="utf-8"))


def measure_machine(options: Options) -> Result:
    return run_worker("machine", {"seconds": 0.7}, options=options)


def drift(before: Result, after: Result) -> float:
    return max(abs(after[key] / before[key] - 1) for key in MACHINE_KEYS)


def run_rounds(peers: Sequence[Peer], *, options: Options) -> Rounds:
    """Interleaved rounds; at most twice as many as asked for when the machine will not hold still."""
    rounds = Rounds(results={peer.name: [] for peer in peers}, machine=[measure_machine(options)], num_dropped=0)
    num_kept = 0
    while num_kept < options.rounds:
        results = {}
        for peer in peers:
            say(f"round {num_kept + 1} of {options.rounds}: {peer.name}")
            results[peer.name] = run_worker(peer.worker, peer.spec, options=options, python=peer.python)
        rounds.machine.append(measure_machine(options))
        moved = drift(*rounds.machine[-2:])
        if moved > options.max_drift:
            rounds.num_dropped += 1
            say(f"round dropped: the machine drifted by {moved:.0%}")
            if rounds.num_dropped > options.rounds:
                raise BenchmarkError("the machine drifts too much to measure on; try again when it is quiet")
            continue
        num_kept += 1
        for name, result in results.items():
            rounds.results[name].append(result)
    return rounds


def say(line: str) -> None:
    print(f"# {line}", file=sys.stderr, flush=True)


def report(name: str, *, figures: Mapping[str, Any], rounds: Rounds, options: Options) -> None:
    """The JSON line: figures, peers' versions, the machine first and last, how many rounds."""
    record = {
        "benchmark": name,
        "rounds": options.rounds,
        "dropped": rounds.num_dropped,
        "threads": options.num_threads,
        "rows": options.num_rows,
        **figures,
        "machine": {"first": rounds.machine[0], "last": rounds.machine[-1]},
        "versions": {
            key: value for found in rounds.results.values() for key, value in found[0].get("versions", {}).items()
        },
        "command": f"make bench NAME={name}",
    }
    line = json.dumps(record)
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
