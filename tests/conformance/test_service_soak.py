"""Left running, the journal and the process stay as large as their work; and large checkpoints are quick."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from model_foundry.service.janitor import PERIOD_SECONDS
from tests.conformance.test_service_by_hand import new_session, one_step
from tests.service_rig import Service, finish

RESULT_HOURS = 0.002
SOAK_SECONDS = float(os.environ.get("FOUNDRY_SERVICE_SOAK_SECONDS", "1800"))


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
        sizes = dict(sizes_below(service.state))
        found[1].append(sum(size for name, size in sizes.items() if "journal.sqlite" in name))
        found[2].append(sum(size for name, size in sizes.items() if name.endswith(".safetensors")))
    over.set()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return found


def sizes_below(folder: Path) -> Iterator[tuple[str, int]]:
    """(path, bytes) of files; they come and go meanwhile."""
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                path = Path(where, name)
                yield str(path), path.stat().st_size


def check_level(values: list[int], *, slack: float, what: str) -> None:
    """The last third is not above the middle one by more than a tenth and some slack."""
    third = len(values) // 3
    middle, last = statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])
    assert last <= middle * 1.1 + slack, f"{what} grew from {middle:,} to {last:,} bytes"


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_a_soak_leaves_memory_and_journal_level(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Replies that nobody asks for again, bodies that no snapshot needs, models that were unloaded: all must go."""
    soak(tiny_folder("llama-tied"), tmp_path / "state", seconds=SOAK_SECONDS)


def soak(base: Path, state: Path, *, seconds: float) -> None:
    options = ("dtype=float32", f"result_hours={RESULT_HOURS}", "snapshot_seconds=0.05")
    with Service(base, state, *options) as service:
        process, journal, files = sizes_over(service, seconds)
        with service.api("tml-a") as api:
            # A result that is old is gone, and said to be.
            run = api.get("training_runs", params={"limit": 1, "offset": 1}).json()["training_runs"][0]
            time.sleep(RESULT_HOURS * 3600 + 2 * PERIOD_SECONDS)
            answer = api.post("retrieve_future", json={"request_id": f"{run['training_run_id']}:2"})
            assert answer.status_code == 410, answer.text
    for values, slack, what in (
        (process, 30e6, "the process"),
        (journal, 1e6, "the journal"),
        (files, 2e6, "the files"),
    ):
        check_level(values, slack=slack, what=what)


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_half_a_gigabyte_is_saved_and_loaded_in_seconds(tmp_path: Path) -> None:
    """Adapter and optimizer of rank 136 over the small real model; four saves at once, all whole; health meanwhile."""
    with Service(Path("smollm2-135m-instruct"), tmp_path / "state", "dtype=float32") as service, service.api() as api:
        lora = {"rank": 136, "seed": 1, "train_unembed": False}
        body = {"session_id": new_session(api), "base_model": str(service.base), "lora_config": lora}
        model = finish(api, api.post("create_model", json={**body, "model_seq_id": 0}))["model_id"]
        one_step(api, model, 1)
        began = time.monotonic()
        path = finish(api, api.post("save_weights", json={"model_id": model, "path": "a", "seq_id": 3}))["path"]
        saved = time.monotonic() - began
        load = {"path": path, "optimizer": True, "session_id": body["session_id"], "model_seq_id": 1}
        began = time.monotonic()
        finish(api, api.post("load_weights", json=load))
        loaded = time.monotonic() - began
        (item,) = api.get(f"training_runs/{model}/checkpoints").json()["checkpoints"]
        assert item["size_bytes"] > 490_000_000
        disk = write_seconds(tmp_path, item["size_bytes"])
        print(
            f"saved {item['size_bytes']:,} bytes in {saved:.1f} s, loaded in {loaded:.1f} s; the disk took {disk:.1f} s"
        )
        assert saved < max(5.0, 2 * disk)
        assert loaded < max(5.0, 2 * disk)

        def save(seq: int) -> dict[str, object]:
            with service.api() as own:
                return finish(own, own.post("save_weights", json={"model_id": model, "path": f"n{seq}", "seq_id": seq}))

        waits = []
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(save, seq) for seq in range(4, 8)]
            while not all(answer.done() for answer in answers):
                began = time.monotonic()
                assert api.get("healthz").status_code == 200
                waits.append(time.monotonic() - began)
                time.sleep(0.02)
        assert all("error" not in answer.result() for answer in answers), answers
        print(f"health meanwhile: {max(waits) * 1e3:.0f} ms at most, of {len(waits)}")
        assert max(waits) < 1.0


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
