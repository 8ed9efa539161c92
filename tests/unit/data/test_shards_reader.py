"""Shards as a data set: what is refused, what a bin holds, and an order that anyone can work out again."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from model_foundry.data.shards.overlap import count_shared
from model_foundry.data.shards.reader import PackedShards
from model_foundry.errors import DataError
from model_foundry.tokenizer import Tokenizer
from tests.shard_sets import chats, pack, rows_of, stream_of, texts, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(chatml_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of bins of 64 tokens."""
    folder = tmp_path_factory.mktemp("rows")
    lengths = np.random.default_rng(1).integers(1, 12, size=900).tolist()
    pack(
        write_rows(folder / "rows.jsonl", chats(lengths)),
        folder / "out",
        chatml_folder,
        max_length=64,
        shard_tokens=6000,
    )
    return folder / "out"


@pytest.fixture(scope="module")
def text(chatml_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream over several shards."""
    folder = tmp_path_factory.mktemp("text")
    lengths = np.random.default_rng(2).integers(1, 40, size=1500).tolist()
    path = write_rows(folder / "rows.jsonl", texts(lengths))
    pack(path, folder / "out", chatml_folder, kind="text", max_length=50, shard_tokens=9000)
    return folder / "out"


@pytest.fixture
def copy(rows: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in rows.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_no_shards_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no packed shards: there is no index\.json.*foundry data pack"):
            PackedShards.open(folder)


def test_shards_of_another_tokenizer_are_refused(rows: Path, chatml_folder: Path) -> None:
    """The ids would be valid and mean something else: a model that learns nothing, and nobody knows why."""
    assert PackedShards.open(rows, tokenizer=Tokenizer.load(chatml_folder).fingerprint).num_bins
    with pytest.raises(DataError, match=r"another tokenizer: [0-9a-f]{12}…, the model has 123456789012…"):
        PackedShards.open(rows, tokenizer="1234567890123456")


@pytest.mark.parametrize("array", ["tokens", "weights", "starts", "rows", "bins"])
def test_a_missing_or_cut_file_in_the_middle_is_named(copy: Path, array: str) -> None:
    path = copy / f"shard-00001.{array}"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"shard-00001\.{array} has [\d,]+ bytes, not [\d,]+"):
        PackedShards.open(copy)
    path.unlink()
    with pytest.raises(DataError, match=rf"the shard file shard-00001\.{array} is missing"):
        PackedShards.open(copy)


def test_a_flipped_byte_is_found_when_hashes_are_checked(copy: Path) -> None:
    path = copy / "shard-00000.tokens"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    PackedShards.open(copy)
    with pytest.raises(DataError, match=r"shard-00000\.tokens is damaged: its sha256"):
        PackedShards.open(copy, check_hashes=True)


def test_a_damaged_index_is_refused(copy: Path) -> None:
    path = copy / "index.json"
    values = json.loads(path.read_text())
    for changed, what in (
        ({**values, "max_length": 32}, "sha256 does not match"),
        ({**values, "format": 9}, "format 9 are not known"),
        ({"format": 1}, "not what was written"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=what):
            PackedShards.open(copy)
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        PackedShards.open(copy)


def test_bins_of_rows_keep_their_length(rows: Path) -> None:
    with pytest.raises(DataError, match="packed into bins of 64 tokens, not 128"):
        PackedShards.open(rows, max_length=128)
    shards = PackedShards.open(rows)
    for number in (-1, shards.num_bins):
        with pytest.raises(IndexError):
            shards.bin(number)


# -- bins --------------------------------------------------------------------------------------------------------------


def test_a_bin_of_rows_says_where_rows_begin(rows: Path) -> None:
    """Attention and positions must begin again with each row, or rows leak into each other."""
    shards = PackedShards.open(rows)
    assert len(shards.index.shards) > 2
    for number in range(0, shards.num_bins, 7):
        found = shards.bin(number)
        assert found.tokens.dtype == np.int32
        assert found.weights.dtype == np.float32
        assert len(found.tokens) == len(found.weights) <= 64
        assert found.starts[0] == 0
        assert np.flatnonzero(found.positions == 0).tolist() == found.starts.tolist()
        assert np.flatnonzero(np.diff(found.segments, prepend=-1)).tolist() == found.starts.tolist()
        assert len(found.rows) == len(found.starts) == found.segments[-1] + 1


def test_datums_of_rows_are_the_rows(rows: Path) -> None:
    shards = PackedShards.open(rows)
    made = [datum for number in range(shards.num_bins) for datum in shards.datums(number)]
    assert len(made) == shards.stats().num_rows
    weights = sum(float(datum.loss_inputs["weights"].sum()) for datum in made)
    assert weights == shards.stats().num_trained_tokens
    first, (_, ids, trained) = shards.datums(0)[0], rows_of(shards)[int(shards.bin(0).rows[0])]
    assert first.tokens.tolist() == ids[:-1]
    assert first.loss_inputs["target_tokens"].tolist() == ids[1:]
    assert first.loss_inputs["weights"].tolist() == trained[1:]


@pytest.mark.parametrize("max_length", [None, 1, 7, 64, 100_000])
def test_a_stream_is_cut_into_chunks_of_any_length(text: Path, max_length: int | None) -> None:
    """Packed once, read with the context that a model has."""
    shards = PackedShards.open(text, max_length=max_length)
    assert len(shards.index.shards) > 2
    whole = stream_of(PackedShards.open(text))
    step = max_length or 50
    assert shards.num_bins == -(-len(whole) // step)
    for number in [0, shards.num_bins // 2, shards.num_bins - 1]:
        assert shards.bin(number).tokens.tolist() == whole[number * step : (number + 1) * step]


def test_every_token_of_the_stream_but_the_first_is_a_target(text: Path) -> None:
    """Chunks that share no token would never train the first token of any of them."""
    shards = PackedShards.open(text)
    whole = stream_of(shards)
    datums = [datum for number in range(shards.num_bins) for datum in shards.datums(number)]
    assert [t for datum in datums for t in datum.loss_inputs["target_tokens"].tolist()] == whole[1:]
    assert [t for datum in datums for t in datum.tokens.tolist()] == whole[:-1]
    assert all(np.all(datum.loss_inputs["weights"] == 1) for datum in datums)


def test_documents_of_a_chunk_can_be_kept_apart(text: Path, chatml_folder: Path) -> None:
    """With masking no datum reaches over the end of a document; only the first token of each is no target."""
    shards = PackedShards.open(text)
    end = Tokenizer.load(chatml_folder).eos_id
    datums = [datum for number in range(shards.num_bins) for datum in shards.datums(number, mask_documents=True)]
    assert not any(end in datum.tokens for datum in datums)
    targets = sum(datum.num_tokens for datum in datums)
    assert targets == shards.stats().num_tokens - shards.stats().num_rows


def test_a_chunk_says_which_documents_it_holds(text: Path, chatml_folder: Path) -> None:
    shards = PackedShards.open(text)
    end = Tokenizer.load(chatml_folder).eos_id
    whole = np.array(stream_of(shards))
    document = np.cumsum(np.append(0, (whole == end)[:-1]))
    for number in range(shards.num_bins):
        found = shards.bin(number)
        places = document[number * 50 : (number + 1) * 50]
        assert found.rows[found.segments].tolist() == places.tolist()


# -- order -------------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_bin_once_and_each_epoch_is_another(rows: Path) -> None:
    shards = PackedShards.open(rows)
    first, second = shards.epoch(0, seed=3), shards.epoch(1, seed=3)
    assert sorted(first.tolist()) == list(range(shards.num_bins))
    assert first.tolist() != second.tolist() != shards.epoch(1, seed=4).tolist()
    assert shards.bin_at(shards.num_bins + 5, seed=3) == second[5]
    assert shards.epoch(2, seed=3, shuffle=False).tolist() == list(range(shards.num_bins))


def test_the_order_is_fixed_for_ever(text: Path) -> None:
    """A run resumed with a newer numpy must go on in the same order."""
    shards = PackedShards.open(text, max_length=4000)
    assert shards.num_bins == 15
    assert shards.epoch(0, seed=0).tolist() == [0, 2, 11, 9, 1, 8, 13, 5, 4, 3, 12, 10, 14, 6, 7]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 13])
def test_any_number_of_loaders_gives_the_same_stream(rows: Path, num_workers: int, start: int) -> None:
    shards = PackedShards.open(rows)
    stop = start + 2 * shards.num_bins
    expected = [(position, shards.bin_at(position, seed=9)) for position in range(start, stop)]
    parts = [
        [
            (position, found.tokens.tolist())
            for position, found in shards.stream(seed=9, start=start, stop=stop, worker=worker, num_workers=num_workers)
        ]
        for worker in range(num_workers)
    ]
    together = sorted((each for part in parts for each in part), key=lambda each: each[0])
    assert together == [(position, shards.bin(number).tokens.tolist()) for position, number in expected]
    endless = shards.stream(seed=9, start=start, shuffle=False)
    assert [position for position, _ in islice(endless, 3)] == [start, start + 1, start + 2]


def _tokens_of_bin(shards: PackedShards, number: int) -> list[int]:
    return shards.bin(number).tokens.tolist()


def test_shards_travel_to_other_processes_without_their_data(rows: Path) -> None:
    shards = PackedShards.open(rows)
    shards.bin(0)
    data = pickle.dumps(shards)
    assert len(data) < 20_000
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_tokens_of_bin, (shards, 3)) == shards.bin(3).tokens.tolist()


# -- facts -------------------------------------------------------------------------------------------------------------


def test_statistics_are_counted(rows: Path, text: Path) -> None:
    shards = PackedShards.open(rows)
    stats = shards.stats()
    every = rows_of(shards)
    lengths = sorted(len(ids) for _, ids, _ in every)
    assert stats.num_tokens == sum(lengths)
    assert stats.num_rows == len(every) == 900
    assert (stats.lengths[0], stats.lengths[-1]) == (lengths[0], lengths[-1])
    assert stats.lengths[3] in (lengths[449], lengths[450])
    assert stats.fill == stats.num_tokens / (shards.num_bins * 64)
    assert [stats.steps_per_epoch(n) for n in (1, 2, stats.num_bins + 1)] == [
        stats.num_bins,
        -(-stats.num_bins // 2),
        1,
    ]
    of_text = PackedShards.open(text).stats()
    whole = stream_of(PackedShards.open(text))
    assert (of_text.num_tokens, of_text.num_rows) == (len(whole), 1500)
    assert of_text.num_trained_tokens == len(whole)
    assert sum(of_text.lengths) > 0


# -- what two sets share ---------------------------------------------------------------------------------------------


def test_documents_of_two_sets_are_found_wherever_they_lie(chatml_folder: Path, tmp_path: Path) -> None:
    """Against a count of texts: over the borders of shards, twice, and beside others of the same length and ends."""
    lengths = np.random.default_rng(5).integers(1, 30, size=1700).tolist()
    mine = texts(lengths, seed=1)
    theirs = [*mine[100:130], *texts([12] * 1200, seed=2), mine[0], mine[0], mine[-1]]
    opened = []
    for name, documents, shard_tokens in (("a", mine, 9000), ("b", theirs, 7000)):
        pack(
            write_rows(tmp_path / f"{name}.jsonl", documents), tmp_path / name, chatml_folder,
            kind="text", max_length=50, shard_tokens=shard_tokens,
        )  # fmt: skip
        opened.append(PackedShards.open(tmp_path / name))
    a, b = opened
    assert min(len(a.index.shards), len(b.index.shards)) > 1
    in_mine, in_theirs = ({each["text"] for each in documents} for documents in (mine, theirs))
    assert count_shared(a, b) == sum(each["text"] in in_mine for each in theirs) >= 33
    assert count_shared(b, a) == sum(each["text"] in in_theirs for each in mine)
    assert [a.at(np.arange(40, 90))[n] for n in range(50)] == stream_of(a)[40:90]
