"""When to save, and what to keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_foundry.checkpoint.manifest import read_manifest, write_manifest
from model_foundry.checkpoint.schedule import Schedule, save_steps, should_save
from model_foundry.checkpoint.store import FINAL, CheckpointStore, step_name
from model_foundry.errors import CheckpointError

SCHEDULES: list[Schedule] = ["linear", "log", "explicit"]


def test_schedules_by_example() -> None:
    assert save_steps(total_steps=25, every=10) == [10, 20, 25]
    assert save_steps(total_steps=20, every=0) == [20]
    assert save_steps(total_steps=3) == [3], "no distance means the end alone"
    assert [step for step in range(5) if should_save(step, total_steps=3)] == [3]
    assert save_steps(total_steps=3, every=1) == [1, 2, 3]
    assert save_steps(total_steps=20, schedule="log") == [1, 2, 4, 8, 16, 20]
    assert save_steps(total_steps=20, schedule="explicit", at=(3, 7, 40)) == [3, 7, 20]


@given(
    total_steps=st.integers(1, 300),
    schedule=st.sampled_from(SCHEDULES),
    every=st.integers(0, 50),
    at=st.lists(st.integers(1, 400), max_size=5),
)
def test_the_last_step_is_always_saved_and_none_beyond_it(
    total_steps: int, schedule: Schedule, every: int, at: list[int]
) -> None:
    """Prevents a run whose end is not on the schedule, and is lost."""
    steps = save_steps(total_steps=total_steps, schedule=schedule, every=every, at=at)
    assert steps == sorted(set(steps))
    assert steps[-1] == total_steps
    for step in (-1, 0, total_steps + 1, 2 * total_steps + 64):
        assert not should_save(step, total_steps=total_steps, schedule=schedule, every=every, at=at)


@given(short=st.integers(1, 200), longer=st.integers(0, 200), schedule=st.sampled_from(SCHEDULES))
def test_a_longer_run_saves_at_the_same_steps_before_its_end(short: int, longer: int, schedule: Schedule) -> None:
    """Prevents a schedule that depends on anything but the step: a resumed run must save where the straight one did."""
    first = save_steps(total_steps=short, schedule=schedule, every=7, at=(5, 50))
    second = save_steps(total_steps=short + longer, schedule=schedule, every=7, at=(5, 50))
    assert [step for step in first if step < short] == [step for step in second if step < short]


def make_template(folder: Path) -> Path:
    """One checkpoint to copy from; copying and renaming in the manifest is cheaper than syncing hundreds."""
    store = CheckpointStore(folder)

    def write(path: Path) -> None:
        (path / "weights").write_bytes(b"0123456789")

    store.save("template", 1, write)
    return store.path("template")


def place(template: Path, root: Path, name: str, step: int) -> Path:
    shutil.copytree(template, root / name)
    (root / name / "manifest.json").unlink()
    write_manifest(root / name, fields={"name": name, "step": step, "metadata": {}})
    return root / name


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fates=st.lists(st.sampled_from(["good", "good", "flipped", "truncated", "no manifest"]), min_size=1, max_size=7),
    final=st.sampled_from(["good", "flipped", None]),
    keep=st.integers(1, 4),
)
def test_pruning_never_takes_the_last_valid_checkpoint(
    fates: list[str], final: str | None, keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Prevents retention that counts a damaged checkpoint as kept and deletes the good one."""
    folder = tmp_path_factory.mktemp("prune")
    template, root = make_template(folder / "template"), folder / "checkpoints"
    root.mkdir()
    for index, fate in enumerate(fates, start=1):
        damage(place(template, root, step_name(index), index), fate)
    if final is not None:
        damage(place(template, root, FINAL, len(fates)), final)
    before = CheckpointStore(root).newest_valid(lambda _: None)
    removed = CheckpointStore(root).prune(keep)
    after = CheckpointStore(root).newest_valid(lambda _: None)
    assert (before and before.name) == (after and after.name)
    assert FINAL not in removed
    left = {path.name for path in root.iterdir() if path.is_dir()}
    assert removed == [step_name(i) for i in range(1, len(fates) + 1) if step_name(i) not in left]
    # "flipped" has the right size, so it counts until it is read.
    num_looking_good = sum(fate in ("good", "flipped") for fate in fates)
    num_left = sum(fates[i - 1] in ("good", "flipped") for i in range(1, len(fates) + 1) if step_name(i) in left)
    assert num_left in (min(keep, num_looking_good), min(keep, num_looking_good) + 1)


def damage(path: Path, fate: str) -> None:
    weights = path / "weights"
    if fate == "flipped":
        weights.write_bytes(b"0123456780")
    elif fate == "truncated":
        weights.write_bytes(b"0123")
    elif fate == "no manifest":
        (path / "manifest.json").unlink()


def test_pruning_keeps_the_newest_and_what_is_protected(tmp_path: Path) -> None:
    template, root = make_template(tmp_path / "template"), tmp_path / "checkpoints"
    root.mkdir()
    for step in range(1, 6):
        place(template, root, step_name(step), step)
    store = CheckpointStore(root)
    assert store.prune(None) == []
    assert store.prune(2, protected=(step_name(1),)) == [step_name(2), step_name(3)]
    assert [checkpoint.step for checkpoint in store.list()] == [1, 4, 5]
    with pytest.raises(CheckpointError, match="cannot keep 0"):
        store.prune(0)


def test_a_manifest_with_a_step_of_another_kind_is_damage_not_a_crash(tmp_path: Path) -> None:
    template, root = make_template(tmp_path / "template"), tmp_path / "checkpoints"
    root.mkdir()
    path = place(template, root, "odd", 1)
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": [], "fields": {}, "sha256": 5}))
    said: list[str] = []
    assert CheckpointStore(root).newest_valid(said.append) is None
    assert "odd" in said[0]
    assert read_manifest(template).fields["step"] == 1
