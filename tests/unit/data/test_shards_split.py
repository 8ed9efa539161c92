"""Train and validation by content: every document on one side, the same side wherever it stands."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.data.shards.reader import PackedShards
from model_foundry.data.shards.split import Split, place_of
from model_foundry.errors import DataError
from model_foundry.tokenizer import Tokenizer
from tests.shard_sets import pack, texts, write_rows

SHARE = 0.3
END = "<|im_end|>"


@given(st.text(), st.lists(st.integers(0, 50)))
def test_pieces_of_a_document_decide_as_the_whole_does(text: str, cuts: list[int]) -> None:
    """A long file is hashed as it is read; where it happens to be cut must not move it to the other side."""
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert place_of(pieces or [text]) == place_of([text])


@pytest.mark.slow
@given(st.text(), st.floats(0, 0.99))
def test_a_document_is_on_exactly_one_side(text: str, share: float) -> None:
    assert Split("train", share).holds([text]) != Split("validation", share).holds([text])


@pytest.mark.slow
def test_both_sides_together_are_the_corpus(chatml_folder: Path, tmp_path: Path) -> None:
    """A document lost between the sides is never trained on; one on both is measured after it was learned."""
    rows = texts([5 + number % 17 for number in range(200)])
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer, found = Tokenizer.load(chatml_folder), {}
    for part in ("train", "validation"):
        pack(source, tmp_path / part, chatml_folder, kind="text", max_length=64, part=part, validation_share=SHARE)
        shards = PackedShards.open(tmp_path / part)
        stream = [token for number in range(shards.num_bins) for token in shards.bin(number).tokens.tolist()]
        text = tokenizer.decode(stream)
        found[part] = text.removesuffix(END).split(END)
    expected = {part: [row["text"] for row in rows if Split(part, SHARE).holds([row["text"]])] for part in found}  # type: ignore[arg-type]
    assert found == expected
    assert 0.15 < len(found["validation"]) / len(rows) < 0.45
    assert len(found["train"]) + len(found["validation"]) == len(rows)


@pytest.mark.slow
def test_a_text_file_is_split_by_its_text_whatever_its_name(chatml_folder: Path, tmp_path: Path) -> None:
    """Files are read once to be hashed and once to be encoded: the second reading must not find an empty one."""
    rows = [row["text"] for row in texts([30] * 40, seed=3)]
    for folder, name in (("a", "{:03}.txt"), ("b", "z{:03}.txt")):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(rows):
            (tmp_path / folder / name.format(number)).write_text(text)
    tokens = {}
    for folder in ("a", "b"):
        for part in ("train", "validation"):
            out = tmp_path / f"{folder}-{part}"
            pack(tmp_path / folder, out, chatml_folder, kind="text", max_length=64, part=part, validation_share=SHARE)
            tokens[folder, part] = PackedShards.open(out).index.num_tokens
    assert tokens["a", "train"] == tokens["b", "train"] > tokens["a", "validation"] == tokens["b", "validation"] > 0


def test_an_empty_side_is_named(chatml_folder: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "one document"}])
    sides = ("train", "validation")
    empty = next(part for part in sides if not Split(part, 0.5).holds(["one document"]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"no document falls on the side of {empty}"):
        pack(source, tmp_path / "out", chatml_folder, kind="text", part=empty, validation_share=0.5)
    assert not (tmp_path / "out").exists()
