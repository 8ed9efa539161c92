"""A run that is being trained: served at its newest checkpoint, request by request."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model_foundry.checkpoint.store import CheckpointStore
from tests.serving import serving
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import assert_one_paragraph, foundry_here, write_project

pytestmark = pytest.mark.slow
ASK = {"prompt": "Colour of the fox? ", "max_tokens": 12}
LONG = {"prompt": "Colours of all animals? ", "max_tokens": 400}


EVERY_WEIGHT: dict[str, Any] = {"lora__enabled": False, "training__learning_rate": 2e-3}


@pytest.mark.parametrize("changes, part", [({}, "adapter"), (EVERY_WEIGHT, "model")], ids=["adapter", "every weight"])
def test_the_newest_checkpoint_is_served_as_it_appears(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    project = write_project(tmp_path / "project", model=model, training__save_total_limit=None, **changes)
    assert foundry_here("train", project).returncode == 0
    run = tmp_path / "project" / "run"
    later = tmp_path / "later"
    later.mkdir()
    names = [checkpoint.name for checkpoint in CheckpointStore(run / "checkpoints").list()]
    assert len(names) > 2
    for name in names[1:]:  # as if they had not been written yet
        shutil.move(run / "checkpoints" / name, later / name)
    with serving(run, follow="true", follow_seconds=0.1) as served:
        assert [each.name for each in served.opened.catalog] == (["run", "model"] if part == "adapter" else ["run"])
        texts = [served.post("/generate", ASK).json()["text"]]
        before = served.post("/generate", LONG).json()
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(served.post, "/generate", LONG) for _ in range(4)]
            while served.stats()["running"] == 0 and not running[0].done():
                time.sleep(0.005)
            shutil.move(later / names[1], run / "checkpoints" / names[1])
        assert {each.result().json()["text"] for each in running} == {before["text"]}, "what runs ends as it began"
        for name in names[1:]:
            if name != names[1]:
                shutil.move(later / name, run / "checkpoints" / name)
            until = time.monotonic() + 20
            while served.opened.catalog.find("run").checkpoint != name:
                assert time.monotonic() < until
                time.sleep(0.05)
            texts.append(served.post("/generate", ASK).json()["text"])
        assert texts[0] != texts[-1]
        with serving(run) as afresh:
            assert texts[-1] == afresh.post("/generate", ASK).json()["text"]
        assert served.stats()["batch_running"] == 0
        weights = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
        (run / "checkpoints" / names[-1] / part / weights).write_bytes(b"damaged")
        time.sleep(0.5)
        assert served.post("/generate", ASK).json()["text"] == texts[-1], (
            "a damaged checkpoint does not reach the batch"
        )


def flip_a_bit(checkpoint: Path) -> None:
    """The size stays, so that only reading every byte tells."""
    path = checkpoint / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_the_name_stays_true(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before was loaded again and said to be the news; damaged ones on both sides led back to an older one."""
    model = write_tiny_model(tmp_path / "model")
    saves: dict[str, Any] = {"training__save_steps": 2, "training__save_total_limit": None}
    project = write_project(tmp_path / "project", model=model, **saves)
    assert foundry_here("train", project).returncode == 0
    store, later = CheckpointStore(tmp_path / "project" / "run" / "checkpoints"), tmp_path / "later"
    later.mkdir()
    first, second, third, fourth, *_ = (checkpoint.name for checkpoint in store.list())
    for checkpoint in store.list()[1:]:
        shutil.move(checkpoint.path, later / checkpoint.name)
    for damaged in (second, fourth):
        flip_a_bit(later / damaged)

    def wait_for(said: str) -> None:
        until = time.monotonic() + 20
        while said not in caplog.text:
            assert time.monotonic() < until, caplog.text
            time.sleep(0.05)

    caplog.set_level("INFO")
    with serving(tmp_path / "project" / "run", follow="true", follow_seconds=0.1) as served:

        def now() -> tuple[str, str | None]:
            listed = served.get("/v1/models").json()["data"]
            return listed[0]["checkpoint"], served.opened.catalog.find("run").adapter

        before = now()
        assert before[0] == first
        shutil.move(later / second, store.root / second)
        wait_for(f"checkpoint {second} cannot be used")
        time.sleep(0.3)
        assert now() == before, "nothing was loaded"
        assert caplog.text.count("cannot be used") == 1, "it is said once, not each time it looks"
        shutil.move(later / third, store.root / third)
        wait_for(f"run is now {third}")
        at_third = now()
        assert at_third[0] == third
        flip_a_bit(store.root / third)  # what is in memory is whole
        shutil.move(later / fourth, store.root / fourth)
        wait_for(f"checkpoint {fourth} cannot be used")
        time.sleep(0.3)
        assert now() == at_third
    assert caplog.text.count("run is now") == 1


def test_adapters_over_weights_that_change_are_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    project = write_project(tmp_path / "project", model=model, **EVERY_WEIGHT)
    assert foundry_here("train", project).returncode == 0
    done = foundry_here("serve", tmp_path / "project" / "run", "follow=true", f"access.adapter_folder={tmp_path}")
    assert_one_paragraph(done, code=2, words=("every weight", "adapter_folder"))
    assert_one_paragraph(foundry_here("serve", model, "follow=true"), code=2, words=("only a run",))
