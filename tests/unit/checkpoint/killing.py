"""A script that forks writers and kills them with SIGKILL, then looks whether a checkpoint was lost.

    killing.py random ROOT KILLS SEED    at random moments of a loop of saves
    killing.py points ROOT               before each single file operation of one save, one replacement, one pruning

Prints a JSON object; a lost or damaged checkpoint ends it with an error. Forking from one small process makes a kill
cost milliseconds; nothing is patched: the kills are real, and so are the files.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from model_foundry.checkpoint.manifest import write_file
from model_foundry.checkpoint.store import FINAL, CheckpointStore, step_name

FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")


def content(step: int) -> bytes:
    return f"weights after step {step}\n".encode() * 2000


def write(step: int) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "state").mkdir()
        write_file(folder / "state" / "weights.bin", content(step))
        write_file(folder / "state" / "more.bin", content(step + 1))

    return fill


def check(root: Path, at_least_step: int) -> int:
    """The newest checkpoint's step; an error when one that was complete is gone or has other bytes."""
    said: list[str] = []
    newest = CheckpointStore(root).newest_valid(said.append)
    assert not said, said
    assert at_least_step == 0 or newest is not None, "the only checkpoint is gone"
    step = newest.step if newest is not None else 0
    assert step >= at_least_step, (step, at_least_step)
    if newest is not None:
        assert (newest.path / "state" / "weights.bin").read_bytes() == content(step)
    return step


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
    return child


def kill_at_random(root: Path, *, num_kills: int, seed: int) -> dict[str, int]:
    """Children save, replace and prune in a loop, and report each completed save through a pipe."""
    chance = random.Random(seed)
    last_step = num_in_mid_save = 0
    for _ in range(num_kills):
        reader, writer = os.pipe()

        def loop(first: int = last_step + 1, report: int = writer) -> None:
            store = CheckpointStore(root)
            for step in range(first, first + 10_000):
                store.save(step_name(step), step, write(step))
                store.save(FINAL, step, write(step))
                os.write(report, step.to_bytes(4, "big"))
                store.prune(2)

        child = in_child(loop)
        os.close(writer)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader, "rb") as pipe:
            told = pipe.read()
        reported = int.from_bytes(told[-4:], "big") if told else last_step
        num_in_mid_save += any(path.name.startswith((".tmp-", ".old-")) for path in root.glob(".*"))
        last_step = check(root, reported)
    # The next undisturbed save clears everything that the killed ones left.
    CheckpointStore(root).save(step_name(last_step + 1), last_step + 1, write(last_step + 1))
    leftovers = [path.name for path in root.iterdir() if path.name.startswith((".tmp-", ".old-"))]
    assert not leftovers, leftovers
    return {"kills": num_kills, "in_mid_save": num_in_mid_save, "steps": last_step}


def kill_at_every_operation(root: Path) -> dict[str, int]:
    """A child dies before its n-th file operation, for every n until one lives through it all."""
    scenarios: dict[str, Callable[[CheckpointStore], object]] = {
        "save": lambda store: store.save(step_name(2), 2, write(2)),
        "replace": lambda store: store.save(step_name(1), 1, write(1)),
        "prune": lambda store: store.prune(1),
    }
    killed = dict.fromkeys(scenarios, 0)
    for name, act in scenarios.items():
        for number in range(1, 1000):
            folder = root / name / str(number)
            store = CheckpointStore(folder)
            store.save(step_name(1), 1, write(1))
            if name == "prune":
                store.save(step_name(2), 2, write(2))

            def work(number: int = number, act: Callable[[CheckpointStore], object] = act, at: Path = folder) -> None:
                left = [number]

                def die(event: str, _: object) -> None:
                    if event in FILE_OPERATIONS:
                        left[0] -= 1
                        if left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(die)
                act(CheckpointStore(at))

            _, status = os.waitpid(in_child(work), 0)
            check(folder, 2 if name == "prune" else 1)
            CheckpointStore(folder).save(step_name(3), 3, write(3))  # whatever was left must not be in the way
            assert not list(folder.glob(".tmp-*")) + list(folder.glob(".old-*"))
            assert CheckpointStore(folder).open(step_name(2 if name == "prune" else 1))
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            killed[name] += 1
    return killed


if __name__ == "__main__":
    mode, place, *numbers = sys.argv[1:]
    if mode == "random":
        print(json.dumps(kill_at_random(Path(place), num_kills=int(numbers[0]), seed=int(numbers[1]))))
    else:
        print(json.dumps(kill_at_every_operation(Path(place))))
