"""Small training runs: a random model, eight facts that it cannot know, and the command line as a real process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from model_foundry.cli.main import main
from model_foundry.config.load import load_config
from model_foundry.config.preference import DpoConfig
from model_foundry.config.schema import TrainConfig
from model_foundry.run.metrics import read_metrics

COLOURS = {
    "the fox": "red", "the sea": "blue", "the cat": "grey", "the sun": "gold",
    "the owl": "brown", "the ice": "white", "the ash": "black", "the elm": "green",
}  # fmt: skip
NO_CRITERIA = {"loss_fall": None, "answers_improved": None, "memory_saving": None, "parameters_changed": None}


def chat_row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_colours(path: Path, *, repeat: int = 1) -> Path:
    """Eight rows; `repeat` makes their questions, and so the steps, longer."""
    return write_jsonl(path, [chat_row(f"Colour of {name}? " * repeat, colour) for name, colour in COLOURS.items()])


def write_questions(path: Path) -> Path:
    return write_jsonl(path, [{"prompt": f"Colour of {name}? ", "answer": colour} for name, colour in COLOURS.items()])


def write_project(folder: Path, *, model: Path, **changes: Any) -> Path:
    """A configuration with its data in `folder`; `changes` are fields by dotted name with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    write_colours(folder / "train.jsonl")
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"name": str(model), "template": "chatml", "dtype": "float32"},
        "lora": {"r": 8, "lora_alpha": 16},
        "data": {"train_file": str(folder / "train.jsonl"), "max_length": 64},
        "training": {"max_steps": 12, "learning_rate": 0.02, "num_threads": 1, "save_steps": 4},
        "evaluation": {"suites": []},  # what they cost is for the tests that are about them
        "criteria": dict(NO_CRITERIA),
        "gate": {"max_overlap_share": 1.0},  # the tests ask what they have taught
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config.setdefault(section, {}) if section else config)[key] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return path


def write_pairs(path: Path, *, repeat: int = 1, **first: Any) -> Path:
    """Eight pairs: the right colour before the next one's; `first` replaces fields of the first row."""
    colours = list(COLOURS.values())
    rows: list[dict[str, Any]] = [
        {"prompt": f"Colour of {name}? " * repeat, "chosen": colour, "rejected": colours[(index + 1) % 8]}
        for index, (name, colour) in enumerate(COLOURS.items())
    ]
    rows[0] = {key: value for key, value in (rows[0] | first).items() if value is not None}
    return write_jsonl(path, rows)


def tiny_pairs_config(folder: Path, *, model: Path, **changes: Any) -> DpoConfig:
    """As `tiny_config`, for method dpo on `folder`/pairs.jsonl, which is written where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs)
    given = {"method": "dpo", "data__train_file": str(pairs), "criteria__pairs_preferred": None}
    return load_config(DpoConfig, path=write_project(folder, model=model, **given | changes)).config


def tiny_config(folder: Path, *, model: Path, **changes: Any) -> TrainConfig:
    return load_config(TrainConfig, path=write_project(folder, model=model, **changes)).config


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would configure a run, with one thread."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FOUNDRY_", "TRAINING_", "HF_"))}
    return kept | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"} | changes


def unmeasured(env: Mapping[str, str]) -> dict[str, str]:
    """Without the measurement of coverage, whose own file cannot be written where files may not grow."""
    return {name: value for name, value in env.items() if not name.startswith("COVERAGE_PROCESS")}


def start(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`foundry ARGUMENTS` as a process of its own."""
    command = [sys.executable, "-m", "model_foundry", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=dict(env or environment()), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def foundry(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """`foundry ARGUMENTS`, waited for."""
    with start(*arguments, cwd=cwd, env=env) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def foundry_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same command line within this process: no second import of torch, for tests of what it says."""
    stdout, stderr, folder, code = io.StringIO(), io.StringIO(), Path.cwd(), 0
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            main.main([str(argument) for argument in arguments])
    except SystemExit as leave:
        code = int(leave.code or 0)
    finally:
        os.chdir(folder)  # `foundry resume` goes where the run was started
    return subprocess.CompletedProcess([str(each) for each in arguments], code, stdout.getvalue(), stderr.getvalue())


def assert_one_paragraph(done: subprocess.CompletedProcess[str], *, code: int, words: tuple[str, ...] = ()) -> str:
    """The error a person sees: its exit code, one paragraph that holds `words`, no traceback; returns it."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "unforeseen" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1, done.stderr
    paragraph = done.stderr[done.stderr.index("error:") :].strip()
    assert "\n\n" not in paragraph
    for word in words:
        assert word in paragraph, paragraph
    return paragraph


def records(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == kind]


def losses(run_dir: Path, kind: str = "step") -> list[float]:
    return [record["loss"] for record in records(run_dir, kind)]


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("."))
