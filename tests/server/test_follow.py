"""A run that is being trained: served at its newest checkpoint, request by request."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from model_foundry.checkpoint.store import CheckpointStore
from tests.serving import serving
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import foundry_here, write_project

pytestmark = pytest.mark.slow
ASK = {"prompt": "Colour of the fox? ", "max_tokens": 12}


def test_the_newest_checkpoint_is_served_as_it_appears(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    project = write_project(tmp_path / "project", model=model, training__save_total_limit=None)
    assert foundry_here("train", project).returncode == 0
    run = tmp_path / "project" / "run"
    later = tmp_path / "later"
    later.mkdir()
    names = [checkpoint.name for checkpoint in CheckpointStore(run / "checkpoints").list()]
    assert len(names) > 2
    for name in names[1:]:  # as if they had not been written yet
        shutil.move(run / "checkpoints" / name, later / name)
    with serving(run, follow="true", follow_seconds=0.1) as served:
        assert [each.name for each in served.opened.catalog] == ["run", "model"]
        texts = [served.post("/generate", ASK).json()["text"]]
        for name in names[1:]:
            shutil.move(later / name, run / "checkpoints" / name)
            until = time.monotonic() + 20
            while served.opened.catalog.find("run").note != name:
                assert time.monotonic() < until
                time.sleep(0.05)
            texts.append(served.post("/generate", ASK).json()["text"])
        assert texts[0] != texts[-1]
        chat = foundry_here("chat", run, f"prompt={ASK['prompt']}", "max_new_tokens=12")
        assert texts[-1] == chat.stdout.removesuffix("\n")
        (run / "checkpoints" / names[-1] / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
        time.sleep(0.5)
        assert served.post("/generate", ASK).json()["text"] == texts[-1], (
            "a damaged checkpoint does not reach the batch"
        )
