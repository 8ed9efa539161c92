"""A script that packs in forked children, kills them with SIGKILL, packs on, and compares every byte.

    shard_killing.py random FOLDER ROOT KILLS SEED   at random moments
    shard_killing.py points FOLDER ROOT STEP         before every STEP-th single file operation of one build

FOLDER holds a tokenizer. Prints a JSON object; a build that ends with other bytes than an undisturbed one is an error.
Nothing is patched: the kills are real, and so are the files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from model_foundry.data.shards import blocks
from model_foundry.data.shards.writer import work_folder
from tests.shard_sets import bytes_of, chats, pack, texts, write_rows

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
KINDS = ("rows", "text")


def in_child(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
    return child


class Job:
    """One corpus, how it is packed, and what must come out."""

    def __init__(self, folder: Path, root: Path, kind: str, *, num_rows: int) -> None:
        lengths = [number % 23 for number in range(num_rows)]
        root.mkdir(parents=True, exist_ok=True)
        self.source = write_rows(root / f"{kind}.jsonl", chats(lengths) if kind == "rows" else texts(lengths))
        self.folder, self.kind = folder, kind
        started = time.perf_counter()
        self.pack(root / f"{kind}-undisturbed")
        self.seconds = time.perf_counter() - started
        self.expected = bytes_of(root / f"{kind}-undisturbed")

    def pack(self, out: Path) -> None:
        pack(
            self.source, out, self.folder,
            kind=self.kind, max_length=64, shard_tokens=3000, bad_records="drop", overlength="truncate",
        )  # fmt: skip

    def require(self, out: Path) -> None:
        assert bytes_of(out) == self.expected, f"{self.kind}: other bytes than undisturbed"
        assert not work_folder(out).exists()


def kill_at_random(folder: Path, root: Path, *, num_kills: int, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    jobs = [Job(folder, root, kind, num_rows=600) for kind in KINDS]
    told = {"kills": 0, "went_on": 0}
    while told["kills"] < num_kills:
        job, out = chance.choice(jobs), root / f"killed-{told['kills']}"
        while True:
            child = in_child(lambda job=job, out=out: job.pack(out))
            time.sleep(chance.uniform(0.0, job.seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told["kills"] += 1
            told["went_on"] += any(work_folder(out).glob("part-*.json")) if work_folder(out).exists() else 0
            if out.exists() or chance.random() < 0.3 or told["kills"] >= num_kills:
                break
        job.pack(out)
        job.require(out)
    return told


def kill_at_every_operation(folder: Path, root: Path, *, step: int) -> dict[str, int]:
    """A child dies before its n-th file operation, for every n until one lives through it all."""
    killed: dict[str, int] = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        job = Job(folder, root, kind, num_rows=160)
        for number in range(1, 10_000, step):
            out = root / f"{kind}-{number}"

            def work(number: int = number, out: Path = out, job: Job = job) -> None:
                left = [number]

                def die(event: str, arguments: tuple[object, ...]) -> None:
                    # The operations on the shards, not those of reading the tokenizer.
                    if event in FILE_OPERATIONS and str(root) in str(arguments[0]) + str(arguments[-1]):
                        left[0] -= 1
                        if left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(die)
                job.pack(out)

            _, status = os.waitpid(in_child(work), 0)
            job.pack(out)
            job.require(out)
            shutil.rmtree(out)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            killed[kind] += 1
    return killed


if __name__ == "__main__":
    mode, model, place, *numbers = sys.argv[1:]
    blocks.MAX_BLOCK_RECORDS = 20
    if mode == "random":
        done = kill_at_random(Path(model), Path(place), num_kills=int(numbers[0]), seed=int(numbers[1]))
    else:
        done = kill_at_every_operation(Path(model), Path(place), step=int(numbers[0]))
    print(json.dumps(done))
