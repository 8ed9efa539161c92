"""Shards are a function of the plan: whatever the lengths, blocks, processes, interruptions and kills."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.shards import blocks
from model_foundry.data.shards.build import PackProgress, build_shards
from model_foundry.data.shards.plan import PackOptions, RendererSource
from model_foundry.data.shards.reader import PackedShards
from model_foundry.data.shards.writer import work_folder
from model_foundry.errors import DataError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message
from tests.shard_sets import bytes_of, chats, pack, rows_of, stream_of, texts, write_rows

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("shard_killing.py")


class _InterruptedError(Exception):
    pass


def build_with_interruptions(
    source: Path, out: Path, folder: Path, options: PackOptions, *, after_blocks: list[int]
) -> None:
    """Stop after so many blocks, go on, stop again; the last time go through."""
    for number in [*after_blocks, None]:
        left = [number]

        def stop(_: PackProgress, left: list[int | None] = left) -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    raise _InterruptedError

        try:
            build_shards(source, out, options, RendererSource(folder), num_processes=1, on_progress=stop)
            return
        except _InterruptedError:
            assert not out.exists()
    raise AssertionError("the last build was interrupted")


LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 8, 13, 40, 90]), min_size=1, max_size=60)
INTERRUPTIONS = st.lists(st.integers(1, 6), max_size=3)


@contextmanager
def in_small_blocks(records: int, chars: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MAX_BLOCK_RECORDS", records)
        patch.setattr(blocks, "MAX_BLOCK_CHARS", chars)
        patch.setattr(blocks, "MAX_SECTION_CHARS", max(60, chars // 2))
        patch.setattr("model_foundry.data.shards.plan._WINDOW_BINS", 2)
        yield


@given(
    lengths=LENGTHS,
    max_length=st.integers(30, 200),
    shard_tokens=st.integers(1, 3000),
    block=st.integers(1, 9),
    after_blocks=INTERRUPTIONS,
)
@settings(max_examples=25, deadline=None)
def test_every_row_comes_out_once(
    chatml_folder: Path, lengths: list[int], max_length: int, shard_tokens: int, block: int, after_blocks: list[int]
) -> None:
    """Split rows included: no token lost, none twice, in order, with the weights of the renderer."""
    renderer = Renderer(Tokenizer.load(chatml_folder))
    rows = chats(lengths)
    options = PackOptions(max_length=max_length, overlength="split", shard_tokens=shard_tokens)
    with in_small_blocks(block, 2000), tempfile.TemporaryDirectory() as place:
        source, out = write_rows(Path(place, "rows.jsonl"), rows), Path(place, "out")
        build_with_interruptions(source, out, chatml_folder, options, after_blocks=after_blocks)
        build_with_interruptions(source, Path(place, "straight"), chatml_folder, options, after_blocks=[])
        assert bytes_of(out) == bytes_of(Path(place, "straight"))
        found = rows_of(PackedShards.open(out, check_hashes=True))
    assert [row for row, _, _ in found] == list(range(len(rows)))
    for (_, ids, weights), row in zip(found, rows, strict=True):
        expected = renderer.render([Message(each["role"], each["content"]) for each in row["messages"]])
        assert (ids, weights) == (expected.tokens.tolist(), expected.weights.tolist())


@given(
    lengths=LENGTHS,
    max_length=st.integers(1, 100),
    shard_tokens=st.integers(1, 2000),
    block=st.integers(1, 9),
    chars=st.integers(100, 2000),
    after_blocks=INTERRUPTIONS,
)
@settings(max_examples=25, deadline=None)
def test_every_token_of_the_stream_comes_out_once(
    chatml_folder: Path,
    lengths: list[int],
    max_length: int,
    shard_tokens: int,
    block: int,
    chars: int,
    after_blocks: list[int],
) -> None:
    """Documents shorter than a chunk, longer than a shard, and empty ones."""
    tokenizer = Tokenizer.load(chatml_folder)
    documents = [row["text"] for row in texts(lengths)]
    options = PackOptions(kind="text", max_length=max_length, shard_tokens=shard_tokens)
    assert tokenizer.eos_id is not None
    expected = [token for text in documents if text for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    with in_small_blocks(block, chars), tempfile.TemporaryDirectory() as place:
        source, out = write_rows(Path(place, "rows.jsonl"), texts(lengths)), Path(place, "out")
        if not expected:
            with pytest.raises(DataError, match=r"nothing is left to pack: \d+ empty"):
                build_with_interruptions(source, out, chatml_folder, options, after_blocks=after_blocks)
            return
        build_with_interruptions(source, out, chatml_folder, options, after_blocks=after_blocks)
        build_with_interruptions(source, Path(place, "straight"), chatml_folder, options, after_blocks=[])
        assert bytes_of(out) == bytes_of(Path(place, "straight"))
        shards = PackedShards.open(out, check_hashes=True)
        assert stream_of(shards) == expected
        numbers = [number for number, text in enumerate(documents) if text]
        starts = [
            int(row)
            for number in range(shards.num_bins)
            for row, start in zip(shards.bin(number).rows, shards.bin(number).starts, strict=True)
            if start or number * max_length == 0 or expected[number * max_length - 1] == tokenizer.eos_id
        ]
        assert starts == numbers


# -- going on ----------------------------------------------------------------------------------------------------------


def cut_short(source: Path, out: Path, folder: Path, **options: Any) -> None:
    """A build that committed some parts and ended."""

    def stop(now: PackProgress) -> None:
        if now.num_records >= 300:
            raise _InterruptedError

    with pytest.raises(_InterruptedError):
        build_shards(source, out, PackOptions(**options), RendererSource(folder), num_processes=1, on_progress=stop)
    assert list(work_folder(out).glob("part-*.json"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_RECORDS", 50)


@pytest.mark.usefixtures("small_blocks")
def test_what_was_cut_short_goes_on_only_as_it_began(chatml_folder: Path, tmp_path: Path) -> None:
    """Shards of two tokenisations or of two versions of a file, in one folder, would be trained on without a word."""
    source, out = write_rows(tmp_path / "rows.jsonl", chats([5] * 600)), tmp_path / "out"
    options: dict[str, Any] = {"max_length": 64, "shard_tokens": 3000}
    cut_short(source, out, chatml_folder, **options)
    with pytest.raises(DataError, match=r"cut short was made otherwise: max_length was 64 and is 32\. .*rm -r"):
        pack(source, out, chatml_folder, max_length=32, shard_tokens=3000)
    with pytest.raises(DataError, match=r"renderer was '\w+' and is '\w+'"):
        pack(source, out, chatml_folder, template="llama3", **options)
    before = source.read_bytes()
    write_rows(source, chats([6] * 600))
    with pytest.raises(DataError, match=r"the input rows\.jsonl has other bytes"):
        pack(source, out, chatml_folder, **options)
    source.write_bytes(before)
    said: list[str] = []
    report = build_shards(source, out, PackOptions(**options), RendererSource(chatml_folder), say=said.append)
    assert report.went_on
    assert said == ["going on after 250 records in 2 shards"]
    assert 0 < report.num_new_tokens < report.index.num_tokens
    pack(source, tmp_path / "straight", chatml_folder, **options)
    assert bytes_of(out) == bytes_of(tmp_path / "straight")


@pytest.mark.usefixtures("small_blocks")
def test_a_shard_that_was_damaged_meanwhile_is_named(chatml_folder: Path, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.jsonl", chats([5] * 600)), tmp_path / "out"
    cut_short(source, out, chatml_folder, max_length=64, shard_tokens=3000)
    (work_folder(out) / "shard-00000.tokens").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tokens is missing"):
        pack(source, out, chatml_folder, max_length=64, shard_tokens=3000)


@pytest.mark.usefixtures("small_blocks")
def test_two_builds_of_one_folder_at_a_time_are_refused(chatml_folder: Path, tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "rows.jsonl", chats([5] * 600)), tmp_path / "out"
    refused: list[str] = []

    def second(_: PackProgress) -> None:
        if not refused:
            with pytest.raises(DataError, match=f"process {os.getpid()} on .* is packing into this folder") as caught:
                pack(source, out, chatml_folder)
            refused.append(str(caught.value))

    build_shards(source, out, PackOptions(), RendererSource(chatml_folder), num_processes=1, on_progress=second)
    assert refused
    pack(source, tmp_path / "straight", chatml_folder)
    assert bytes_of(out) == bytes_of(tmp_path / "straight")


# -- processes and kills -----------------------------------------------------------------------------------------------


@pytest.mark.slow  # starting processes takes seconds
@pytest.mark.parametrize("kind", ["rows", "text"])
def test_any_number_of_processes_writes_the_same_bytes(chatml_folder: Path, tmp_path: Path, kind: str) -> None:
    lengths = [number % 19 for number in range(4000)]
    source = write_rows(tmp_path / "rows.jsonl", chats(lengths) if kind == "rows" else texts(lengths))
    options: dict[str, Any] = {"max_length": 128, "shard_tokens": 20_000}
    for processes in (1, 2, 3):
        pack(source, tmp_path / str(processes), chatml_folder, kind=kind, processes=processes, **options)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2") == bytes_of(tmp_path / "3")
    assert len(PackedShards.open(tmp_path / "1").index.shards) > 2


def kill(*arguments: object) -> dict[str, int]:
    # In memory where there is such a place: a kill of the process does not depend on what the disk has synced.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as root:
        mode, folder, *numbers = map(str, arguments)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), mode, folder, root, *numbers],
            capture_output=True, text=True, timeout=1200, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_five_kills_at_random_moments_change_no_byte(chatml_folder: Path) -> None:
    """Prevents a shard without its record, a record without its shard, and rows that wait for ever."""
    seed = random.SystemRandom().randrange(2**32)
    assert kill("random", chatml_folder, 5, seed)["kills"] == 5, f"seed {seed}"


@pytest.mark.prove
def test_two_hundred_kills_at_random_moments_change_no_byte(chatml_folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    told = kill("random", chatml_folder, 200, seed)
    assert told["kills"] == 200, f"seed {seed}"
    assert told["went_on"] > 20, f"seed {seed}: too few kills hit a build with something to go on from"


@pytest.mark.slow
def test_a_kill_before_a_file_operation_changes_no_byte(chatml_folder: Path) -> None:
    assert min(kill("points", chatml_folder, 9).values()) >= 3


@pytest.mark.prove
def test_a_kill_before_any_single_file_operation_changes_no_byte(chatml_folder: Path) -> None:
    killed = kill("points", chatml_folder, 1)
    assert min(killed.values()) > 30, f"the kills missed the file operations: {killed}"


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from tests.shard_sets import pack
source, out, folder, kind = sys.argv[1:]
pack(Path(source), Path(out), Path(folder), kind=kind, max_length=128, shard_tokens=1 << 16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_megabytes(source: Path, out: Path, folder: Path, kind: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(out), str(folder), kind],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "text.jsonl", "one.txt"])
def test_memory_does_not_grow_with_the_corpus(chatml_folder: Path, tmp_path: Path, name: str) -> None:
    """A corpus larger than memory must work; eight times the input may take no more than a window's worth more."""
    kind = "rows" if name == "rows.jsonl" else "text"
    peaks, sizes = [], []
    for times in (1, 8):
        folder = tmp_path / str(times)
        folder.mkdir()
        rows = (chats if kind == "rows" else texts)([60 + number % 40 for number in range(4000)])
        lines = [row["text"] if name == "one.txt" else json.dumps(row, ensure_ascii=False) for row in rows]
        with (folder / name).open("w", encoding="utf-8") as file:
            for _ in range(times):
                file.write("\n".join(lines) + "\n")
        sizes.append((folder / name).stat().st_size / 1e6)
        peaks.append(peak_megabytes(folder / name, folder / "out", chatml_folder, kind))
    assert sizes[1] - sizes[0] > 10
    assert peaks[1] - peaks[0] < 8, (peaks, sizes)
