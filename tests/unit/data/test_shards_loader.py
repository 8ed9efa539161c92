"""Any number of processes, any place to begin: the same chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_foundry.data.shards.loader import BinLoader
from model_foundry.data.shards.reader import PackedShards
from model_foundry.errors import DataError
from tests.shard_sets import pack, texts, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(chatml_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedShards:
    folder = tmp_path_factory.mktemp("text")
    path = write_rows(folder / "rows.jsonl", texts([20] * 60))
    pack(path, folder / "out", chatml_folder, kind="text", max_length=48)
    return PackedShards.open(folder / "out")


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_processes_change_nothing(shards: PackedShards, num_processes: int, mask: bool) -> None:
    """A resume with another number of processes would be another run; two epochs, from their middle on."""
    inline = BinLoader(shards, seed=5, mask_documents=mask)
    start = shards.num_bins // 2
    with BinLoader(shards, seed=5, mask_documents=mask, num_processes=num_processes) as loader:
        for position in [*range(start, start + shards.num_bins + 3), 0, 1, start]:
            mine, theirs = loader.datums(position), inline.datums(position)
            assert len(mine) == len(theirs) > 0
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(a.tokens, b.tokens)
                np.testing.assert_array_equal(a.loss_inputs["target_tokens"], b.loss_inputs["target_tokens"])


def test_a_shard_that_goes_while_training_is_named(shards: PackedShards, tmp_path: Path) -> None:
    for path in shards.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loader = BinLoader(PackedShards.open(tmp_path), seed=1)
    (tmp_path / "shard-00000.tokens").unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        loader.datums(0)
