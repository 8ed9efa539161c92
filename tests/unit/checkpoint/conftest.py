"""Checkpoints small enough to be written hundreds of times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model_foundry.checkpoint.manifest import write_file
from model_foundry.checkpoint.store import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


@pytest.fixture
def fill() -> Callable[[str], Callable[[Path], None]]:
    """fill(text) writes a checkpoint's folders with files that hold `text`."""

    def writer(text: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            for name in ("adapter/weights.bin", "state/optimizer.bin"):
                (folder / name).parent.mkdir()
                write_file(folder / name, f"{name} {text} ".encode() * 50)

        return write

    return writer


def flip_byte(path: Path, position: int) -> None:
    """What a bad disk does."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    return flip_byte
