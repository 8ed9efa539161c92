"""Disks that fill up and files that end in the middle: a typed error at most, and nothing that was accepted is lost."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conformance.test_service_by_hand import new_model, one_step, pass_body, step_body
from tests.service_rig import Service, files_of, finish

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 12 MB; none where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", folder], capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def patient_step(api: httpx.Client, model: str, seq: int, refused: list[int]) -> None:
    """A pass and a step, tried again while the service says to."""
    for kind, body in (("forward_backward", pass_body(model, seq)), ("optim_step", step_body(model, seq + 1))):
        while (answer := api.post(kind, json=body)).status_code == 503:
            assert int(answer.headers["Retry-After"]) > 0
            refused.append(seq)
            time.sleep(0.05)
        finish(api, answer)


def end_of(api: httpx.Client, service: Service, model: str, seq: int) -> dict[str, bytes]:
    path = finish(api, api.post("save_weights", json={"model_id": model, "path": "end", "seq_id": seq}))["path"]
    return files_of(service.state / "runs" / path.removeprefix("tinker://").replace(":", "-"))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits the files of a process that runs")
def test_a_full_disk_is_waited_for_and_nothing_is_lost(
    tiny_folder: Callable[[str], Path], tmp_path: Path, small_disk: Path | None
) -> None:
    """The disk is full for every program where one may be mounted, and for the service alone everywhere."""
    ends = []
    for place, ends_up in ((tmp_path / "whole", None), (tmp_path / "limited", limit_files), (small_disk, fill)):
        if place is None:
            continue
        state = place / "state"
        with Service(tiny_folder("llama-tied"), state, "snapshot_seconds=0.001") as service, service.api() as api:
            model, refused = new_model(api, service), []
            for seq in range(1, 9, 2):
                one_step(api, model, seq)
            over = threading.Timer(1.5, ends_up(service) if ends_up else lambda: None)
            over.start()
            for seq in range(9, 41, 2):
                patient_step(api, model, seq, refused)
            over.join()
            ends.append(end_of(api, service, model, 41))
            assert bool(refused) == (ends_up is not None)
    assert len(ends) >= 2
    assert all(end == ends[0] for end in ends)


def limit_files(service: Service) -> Callable[[], object]:
    """The service can write nothing more; returns what ends that."""
    assert service.process is not None
    pid, kind = service.process.pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (0, before[1]))
    return lambda: resource.prlimit(pid, kind, before)


def fill(service: Service) -> Callable[[], object]:
    """The disk that the service's state is on, to the last byte; returns what ends that."""
    filler = service.state.parent / "filler"
    with filler.open("wb") as file:
        for size in (100_000, 4096, 1):
            try:
                while True:
                    os.write(file.fileno(), b"\0" * size)
            except OSError:
                continue
    return filler.unlink


@pytest.mark.parametrize("damage", ["half a frame", "noise"])
def test_a_journal_that_ends_in_the_middle_is_read_to_its_last_whole_entry(
    damage: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a power cut leaves behind the last synced entry is not an entry."""
    with Service(tiny_folder("llama-tied"), tmp_path / "state") as service, service.api() as api:
        model = new_model(api, service)
        one_step(api, model, 1)
        service.kill()
        log = service.state / "journal.sqlite-wal"
        data = log.read_bytes()
        assert data
        log.write_bytes(data + (data[-2000:] if damage == "half a frame" else os.urandom(9000)))
        service.start()
        one_step(api, model, 3)
        assert len(end_of(api, service, model, 5)) == 2
        repeat = api.post("optim_step", json=step_body(model, 2))
        assert finish(api, repeat)["metrics"]["step"] == 1.0
