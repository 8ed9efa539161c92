"""B9: how soon something happens: `--help` on the command line, and the first optimizer step of a LoRA run.

Times are wall-clock from the start of the process, model files cached, bytecode compiled. For the first step both sides
read the same JSONL of chats, render and tokenise it, load the model, add the same adapter and make one step of eight
rows. TRL is called as a script would call it (`trl sft` itself starts one more process).
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chat_rows import make_messages
from benchmarks.harness import BenchmarkError, Options, environment, model_folder, parse, run_worker, say, table
from benchmarks.training import LEARNING_RATE, LORA, ROWS_PER_STEP
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

HELP = {"foundry": ["--help"], "trl": ["--help"], "llamafactory-cli": ["version"]}
POLL_S = 0.005
PATIENCE_S = 300.0


def program(name: str) -> str | None:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def help_seconds(options: Options) -> dict[str, list[float]]:
    """Interleaved, after one uncounted run of each that compiles its bytecode."""
    commands = {name: [found, *flags] for name, flags in HELP.items() if (found := program(name))}
    commands["python -c pass"] = [sys.executable, "-c", "pass"]
    for name in set(HELP) - set(commands):
        say(f"{name} is not installed; left out")
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_number in range(options.rounds + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment(options.num_threads))
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def foundry_first_step(rows: Path, model: Path, options: Options) -> float:
    """Seconds until metrics.jsonl holds the first step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        metrics = run / "metrics.jsonl"
        settings = {
            "run_dir": run, "model.name": model, "model.dtype": "bfloat16", "data.train_file": rows,
            "training.max_steps": 1, "training.batch_size": ROWS_PER_STEP, "training.learning_rate": LEARNING_RATE,
            "lora.r": LORA["r"], "lora.lora_alpha": LORA["lora_alpha"], "training.num_threads": options.num_threads,
            "criteria.loss_fall": "null", "criteria.answers_improved": "null", "criteria.memory_saving": "null",
            "criteria.parameters_changed": "null",
        }  # fmt: skip
        command = [program("foundry") or "foundry", "train", *(f"{key}={value}" for key, value in settings.items())]
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(options.num_threads), text=True
        ) as process:
            seconds = wait_for_step(metrics, started, process)
            process.communicate()
        return seconds


def wait_for_step(metrics: Path, started: float, process: subprocess.Popen[str]) -> float:
    while time.perf_counter() - started < PATIENCE_S:
        ended = process.poll() is not None
        if metrics.is_file() and '"kind":"step"' in metrics.read_text(encoding="utf-8").replace(" ", ""):
            return time.perf_counter() - started
        if ended:
            break
        time.sleep(POLL_S)
    process.kill()
    output = process.stdout.read() if process.stdout else ""
    raise BenchmarkError(f"foundry train ended, or {PATIENCE_S:.0f} s passed, before its first step:\n{output[-2000:]}")


def trl_first_step(rows: Path, model: Path, options: Options) -> float:
    arguments = {"max_steps": 1, "num_train_epochs": 1}
    spec = {
        "trainer": "trl", "dtype": "bfloat16", "model": str(model), "messages": str(rows), "lora": LORA,
        "rows_per_step": ROWS_PER_STEP, "learning_rate": LEARNING_RATE, "arguments": arguments,
    }  # fmt: skip
    started = time.time()
    return run_worker("hf_trainer", spec, options=options)["notes"]["first_step_ended"] - started


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=ROWS_PER_STEP * 8)
    model = model_folder(options)
    helps = help_seconds(options)
    ways: dict[str, Callable[[Path, Path, Options], float]] = {"foundry": foundry_first_step, "trl": trl_first_step}
    ways = {name: way for name, way in ways.items() if not options.only or name in options.only}
    first: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "chats.jsonl"
        conversations = make_messages(Renderer(Tokenizer.load(model)), num_rows=options.num_rows, seed=options.seed)
        rows.write_text("".join(json.dumps(row) + "\n" for row in conversations), encoding="utf-8")
        for number in range(options.rounds):
            for name, way in ways.items():
                say(f"first step, round {number + 1} of {options.rounds}: {name}")
                first[name].append(way(rows, model, options))
    tell(helps, first, options)
    return 0


def tell(helps: dict[str, list[float]], first: dict[str, list[float]], options: Options) -> None:
    bare = statistics.median(helps["python -c pass"])
    beyond = {name: statistics.median(seconds) - bare for name, seconds in helps.items()}
    figures: dict[str, Any] = {
        "benchmark": "b9",
        "rounds": options.rounds,
        "help_seconds": {name: statistics.median(seconds) for name, seconds in helps.items()},
        "help_seconds_beyond_python": beyond,
        "first_step_seconds": {name: statistics.median(seconds) for name, seconds in first.items()},
        "command": "make bench NAME=b9",
    }
    if {"foundry", "trl"} <= set(first):
        ratios = [ours / theirs for ours, theirs in zip(first["foundry"], first["trl"], strict=True)]
        figures["first_step_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    print(json.dumps(figures))
    lines = [
        [name, f"{statistics.median(seconds) * 1000:.0f}", f"{beyond[name] * 1000:.0f}"]
        + [f"{statistics.median(first[name]):.1f}" if name in first else ""]
        for name, seconds in helps.items()
    ]
    table(["command", "--help, ms", "beyond python, ms", "first step, s"], lines)
