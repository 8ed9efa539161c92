"""Bytes that go past the page cache are the bytes that were written, whatever their sizes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.checkpoint import direct
from model_foundry.checkpoint.direct import DirectFile

MEBIBYTE = 1 << 20


def written(path: Path, parts: list[bytes], *, planned_bytes: int) -> bytes:
    file = DirectFile(path, planned_bytes=planned_bytes)
    try:
        for part in parts:
            file.write(memoryview(part))
        file.finish()
    finally:
        file.close()
    return path.read_bytes()


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 4095, 4096, 4097, MEBIBYTE - 1, MEBIBYTE, MEBIBYTE + 1]), max_size=6),
    planned_bytes=st.sampled_from([0, MEBIBYTE]),
)
def test_any_parts_come_out_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], planned_bytes: int
) -> None:
    parts = [os.urandom(size) for size in sizes]
    path = tmp_path_factory.mktemp("direct") / "file"
    assert written(path, parts, planned_bytes=planned_bytes) == b"".join(parts)


def test_a_disk_with_larger_blocks_gets_the_bytes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An odd alignment makes the kernel refuse the write (EINVAL), as a disk with larger blocks would."""
    monkeypatch.setattr(direct, "_ALIGNMENT", 1)
    parts = [os.urandom(MEBIBYTE), os.urandom(100)]
    assert written(tmp_path / "file", parts, planned_bytes=MEBIBYTE) == b"".join(parts)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file", planned_bytes=MEBIBYTE)
    assert (tmp_path / "file").read_bytes() == b"before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's always-full device")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    file = DirectFile(tmp_path / "file", planned_bytes=0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.fileno())
    os.close(full)
    with pytest.raises(OSError) as raised:
        file.write(memoryview(b"bytes"))
    file.close()
    assert raised.value.errno == errno.ENOSPC
