"""Left running: the journal and the process stay as large as their work, and large checkpoints are quick."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conformance.test_service_by_hand import new_session, one_step
from tests.service_rig import Service, finish


def life_of_a_model(api: httpx.Client, service: Service, session: str, number: int) -> None:
    """Made, trained, saved, sampled from, deleted, unloaded."""
    body = {"session_id": session, "model_seq_id": number, "base_model": str(service.base)}
    model = finish(api, api.post("create_model", json={**body, "lora_config": {"rank": 4, "seed": 5}}))["model_id"]
    for seq in range(1, 9, 2):
        one_step(api, model, seq)
    body = {"model_id": model, "path": "sampler", "seq_id": 9}
    path = finish(api, api.post("save_weights_for_sampler", json=body))["path"]
    finish(api, api.post("save_weights", json={"model_id": model, "path": "end", "seq_id": 10}))
    asked = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}, "num_samples": 3,
             "sampling_params": {"max_tokens": 20, "stop": []}, "model_path": path}  # fmt: skip
    finish(api, api.post("asample", json=asked))
    for kind in ("weights/end", "sampler_weights/sampler"):
        assert api.delete(f"training_runs/{model}/checkpoints/{kind}").status_code == 204
    finish(api, api.post("unload_model", json={"model_id": model, "type": "unload_model"}))


def sizes_over(service: Service, seconds: float) -> tuple[list[int], list[int], list[int]]:
    """Bytes of the process, the journal and the state folder's files, once a second, while two tenants are at work."""
    over = threading.Event()
    errors: list[BaseException] = []

    def tenant(name: str) -> None:
        try:
            with service.api(f"tml-{name}") as api:
                session = new_session(api)
                for number in range(10**6):
                    if over.is_set():
                        return
                    life_of_a_model(api, service, session, number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=tenant, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    assert service.process is not None
    process = psutil.Process(service.process.pid)
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    until = time.monotonic() + seconds
    while time.monotonic() < until and not errors:
        time.sleep(1)
        found[0].append(process.memory_info().rss)
        found[1].append(sum(path.stat().st_size for path in service.state.glob("journal.sqlite*")))
        found[2].append(sum(path.stat().st_size for path in service.state.rglob("*.safetensors") if path.exists()))
    over.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return found


def check_level(values: list[int], *, slack: int, what: str) -> None:
    """The last third is not above the middle one by more than a tenth and some slack."""
    third = len(values) // 3
    middle, last = statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])
    assert last <= middle * 1.1 + slack, f"{what} grew from {middle:,} to {last:,} bytes"


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds", [45, pytest.param(1800, marks=[pytest.mark.prove, pytest.mark.timeout(2400)])]
)  # fmt: skip
def test_a_soak_leaves_memory_and_journal_level(
    seconds: int, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Replies that nobody asks for again, bodies that no snapshot needs, models that were unloaded: all must go."""
    options = ("dtype=float32", "result_hours=0.002", "snapshot_seconds=0.05")
    with Service(tiny_folder("llama-tied"), tmp_path / "state", *options) as service:
        process, journal, files = sizes_over(service, seconds)
    check_level(process, slack=30_000_000, what="the process")
    check_level(journal, slack=1_000_000, what="the journal")
    check_level(files, slack=2_000_000, what="the state folder")


@pytest.mark.slow
@pytest.mark.prove
def test_half_a_gigabyte_is_saved_and_loaded_in_seconds(tmp_path: Path) -> None:
    """Adapter and optimizer of rank 136 over the small real model; and four saves at once, all whole."""
    with Service(Path("smollm2-135m-instruct"), tmp_path / "state", "max_body_bytes=1000000") as service:
        with service.api() as api:
            session = new_session(api)
            lora = {"rank": 136, "seed": 1}
            body = {"session_id": session, "base_model": str(service.base), "lora_config": lora}
            model = finish(api, api.post("create_model", json={**body, "model_seq_id": 0}))["model_id"]
            one_step(api, model, 1)
            began = time.monotonic()
            path = finish(api, api.post("save_weights", json={"model_id": model, "path": "a", "seq_id": 3}))["path"]
            saved = time.monotonic() - began
            began = time.monotonic()
            load = {"model_id": model, "path": path, "optimizer": True, "seq_id": 4}
            finish(api, api.post("load_weights", json=load))
            loaded = time.monotonic() - began
            (item,) = api.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]
            assert item["size_bytes"] > 490_000_000
            print(f"saved {item['size_bytes']:,} bytes in {saved:.1f} s, loaded in {loaded:.1f} s; "
                  f"the disk took {write_seconds(tmp_path, item['size_bytes']):.1f} s for as many")  # fmt: skip
            allowed = max(5.0, 2 * write_seconds(tmp_path, item["size_bytes"]))
            assert saved < allowed
            # A load in place writes a snapshot before it is answered.
            assert loaded < 2 * allowed

        def save(seq: int) -> dict[str, object]:
            with service.api() as own:
                return finish(own, own.post("save_weights", json={"model_id": model, "path": f"n{seq}", "seq_id": seq}))

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(save, range(5, 9)))
        assert all("error" not in answer for answer in answers), answers


def write_seconds(folder: Path, num_bytes: int) -> float:
    """How long the disk takes to write and sync so much."""
    began = time.monotonic()
    with (folder / "probe").open("wb") as file:
        for _ in range(num_bytes // 10_000_000):
            file.write(b"\1" * 10_000_000)
        file.flush()
        os.fsync(file.fileno())
    (folder / "probe").unlink()
    return time.monotonic() - began
