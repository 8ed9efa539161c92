"""Shards of a corpus of some size, by two processes that are killed in the middle: same bytes, flat memory.

The small sets of `test_shards` fit into one block of records; here blocks, windows and shards come by the hundred.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_foundry.data.shards.writer import work_folder
from tests.shard_sets import bytes_of, chat

pytestmark = pytest.mark.prove

ROOT = Path(__file__).parents[2]
NUM_BYTES, NUM_KILLS = 48_000_000, 6
PACK = """
import sys
from pathlib import Path
from tests.shard_sets import pack
source, out, folder, kind = sys.argv[1:]
pack(Path(source), Path(out), Path(folder), kind=kind, processes=2, max_length=2048, shard_tokens=1 << 20)
"""


def write_corpus(path: Path, *, kind: str) -> Path:
    """Pieces of the standard library's sources, no two rows the same."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [source.read_text(encoding="utf-8") for source in sources]
    chance, written = random.Random(7), 0
    with path.open("w", encoding="utf-8") as file:
        while written < NUM_BYTES:
            text = chance.choice(texts)
            start, length = chance.randrange(len(text)), int(chance.expovariate(1 / 1500)) + 40
            said = f"{written}: {text[start : start + length]}"
            row = chat(text[start : start + 60], said) if kind == "rows" else {"text": said}
            written += file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def start(source: Path, out: Path, folder: Path, kind: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PACK, str(source), str(out), str(folder), kind]
    return subprocess.Popen(command, cwd=ROOT, env=env)


def family(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def megabytes(pid: int) -> float:
    """What the largest process of a family holds in memory of its own; 0 when they are ending."""
    sizes = [0.0]
    try:
        for each in family(pid):
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
            sizes += [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return max(sizes)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["rows", "text"])
def test_kills_at_any_moment_change_no_byte_and_memory_stays_flat(
    chatml_folder: Path, tmp_path: Path, kind: str
) -> None:
    source = write_corpus(tmp_path / "corpus.jsonl", kind=kind)
    straight, began, held = start(source, tmp_path / "straight", chatml_folder, kind), time.monotonic(), []
    while straight.poll() is None:
        held.append(megabytes(straight.pid))
        time.sleep(0.1)
    assert straight.returncode == 0
    seconds = time.monotonic() - began
    middle, end = held[len(held) // 3 : 2 * len(held) // 3], held[2 * len(held) // 3 :]
    assert max(end) < 1.15 * max(middle) + 8, f"memory grows: {max(middle):.0f} MB, then {max(end):.0f}"

    out, num_kills, went_on = tmp_path / "killed", 0, 0
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    while num_kills < NUM_KILLS and not out.exists():
        build = start(source, out, chatml_folder, kind)
        try:
            build.wait(timeout=chance.uniform(0.1, 0.6) * seconds)
            continue
        except subprocess.TimeoutExpired:
            children = list(family(build.pid))[1:]
            build.send_signal(signal.SIGKILL)
            build.wait()
        num_kills += 1
        went_on += any(work_folder(out).glob("part-*.json"))
        deadline = time.monotonic() + 60
        while not all(map(has_ended, children)):
            assert time.monotonic() < deadline, f"seed {seed}: processes outlive the build that started them"
            time.sleep(0.1)
    assert went_on, f"seed {seed}: no kill hit a build with something to go on from"
    if not out.exists():
        assert start(source, out, chatml_folder, kind).wait() == 0
    assert bytes_of(out) == bytes_of(tmp_path / "straight"), f"seed {seed}"
    assert not work_folder(out).exists()
