"""The cookbook's own supervised loop, `chat_sl`, unmodified, against the service: stopped, and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_foundry.checkpoint import atomic
from tests.service_rig import Service

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]
COOKBOOK = "tinker-cookbook==0.6.1"
BESIDE = (
    "chz==0.4.0", "blobfile==3.3.0", "tml-renderers==0.2.1", "pyrage==1.4.0", "termcolor==3.3.0", "cloudpickle==3.1.3",
    "tiktoken==0.14.0",
)  # fmt: skip
"""What it imports and we do not; its other dependencies are taken from the environment of the tests."""


def python() -> Path:
    """An environment with the cookbook, made once for each list of packages."""
    home = Path(os.environ.get("FOUNDRY_HOME", "~/.cache/model-foundry")).expanduser() / "test-sdks"
    digest = hashlib.sha256("\n".join((COOKBOOK, *BESIDE)).encode()).hexdigest()
    folder = home / f"{COOKBOOK.replace('==', '-')}-{digest[:12]}"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with atomic.atomic_directory(folder) as target:
            packages = target / "packages"
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
            subprocess.run([*command, COOKBOOK, *BESIDE], check=True, timeout=300)
    return folder / "packages"


def run(service: Service, log: Path, rows: Path, *, steps: int) -> list[dict[str, Any]]:
    """The loop up to a step; what it measured, by step."""
    arguments = {
        "model_name": service.base, "dataset": rows, "renderer_name": "role_colon", "base_url": service.url,
        "batch_size": 4, "max_length": 128, "learning_rate": 0.01, "lr_schedule": "constant", "lora_rank": 4,
        "save_every": 2, "eval_every": 0, "max_steps": steps, "log_path": log, "behavior_if_log_dir_exists": "resume",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tinker_cookbook.recipes.chat_sl.train", *(f"{k}={v}" for k, v in arguments.items())],
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(python()), sysconfig.get_path("purelib")]),
            "TINKER_API_KEY": "tml-cookbook", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1",
        },
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


def test_chat_sl_resumes_with_the_same_losses(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Gone on with from a checkpoint, a run has the same losses, the service killed in between or not.

    The loop names no seed, so a second run would begin with another adapter; and it saves after the next step was
    submitted, so its own continuation repeats two batches: two continuations are what can be compared.
    """
    rows, start = tmp_path / "rows.jsonl", tmp_path / "start"
    talks = [
        [("user", f"Colour of thing {n}?"), ("assistant", f"It is {'red' if n % 2 else 'blue'}.")] for n in range(40)
    ]
    rows.write_text("".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) + "\n"
                            for talk in talks))  # fmt: skip
    with Service(tiny_folder("llama-tied"), tmp_path / "state", "dtype=float32") as service:
        whole = losses(run(service, start, rows, steps=8))
        (middle,) = [line for line in (start / "checkpoints.jsonl").read_text().splitlines() if '"000004"' in line]
        continued = []
        for name in ("undisturbed", "killed"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "checkpoints.jsonl").write_text(f"{middle}\n")
            if name == "killed":
                service.kill()
                service.start()
            continued.append(losses(run(service, tmp_path / name, rows, steps=8)))
    assert list(whole) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(continued[0]) == [7, 8, 9, 10]  # the optimizer's count goes on
    assert continued[1] == continued[0]
    assert whole[8] < whole[1]
    assert continued[0][7] < whole[5], "the same batch, two steps later"


def losses(metrics: list[dict[str, Any]]) -> dict[int, float]:
    """By the optimizer's count of steps."""
    return {int(line["step"]): line["train_mean_nll"] for line in metrics if "train_mean_nll" in line}
