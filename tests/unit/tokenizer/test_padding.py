"""Rectangles of ids: nothing is lost uncounted, and the mask says what is real."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.errors import DataError
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.padding import Side, pad, truncate

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=5)
SIDES = st.sampled_from(["left", "right"])


@given(rows=ROWS, side=SIDES, multiple=st.integers(1, 8))
def test_padded_rows_come_back_from_the_mask(rows: list[list[int]], side: Side, multiple: int) -> None:
    batch = pad(rows, pad_id=7, multiple_of=multiple, side=side)
    assert batch.ids_BT.shape == batch.mask_BT.shape == (len(rows), batch.ids_BT.shape[1])
    assert batch.ids_BT.shape[1] % multiple == 0
    assert [ids[mask].tolist() for ids, mask in zip(batch.ids_BT, batch.mask_BT, strict=True)] == rows
    assert (batch.ids_BT[~batch.mask_BT] == 7).all()
    assert batch.num_tokens_B.tolist() == [len(row) for row in rows]
    edge = batch.mask_BT[:, :1] if side == "right" else batch.mask_BT[:, -1:]
    assert edge.any(axis=1).tolist() == [bool(row) for row in rows]


@given(row=st.lists(st.integers(0, 99), max_size=20), length=st.integers(2, 25), side=SIDES)
def test_truncation_keeps_the_frame(row: list[int], length: int, side: Side) -> None:
    """Cutting after the frame is put on would lose the end-of-text token of every long row."""
    kept = truncate(row, length, frame=([1000], [1001]), side=side)
    assert len(kept) == min(length, len(row) + 2)
    assert (kept[0], kept[-1]) == (1000, 1001)
    inner = kept[1:-1]
    assert inner == (row[: len(inner)] if side == "right" else row[len(row) - len(inner) :])


def test_a_frame_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tokens do not hold the 2"):
        truncate([5], 1, frame=([1], [2]))


def test_a_row_longer_than_the_length_is_refused_not_cut() -> None:
    with pytest.raises(ValueError, match="row 1 has 3"):
        pad([[1], [1, 2, 3]], pad_id=0, length=2)


def test_a_tokenizer_makes_the_whole_batch(chatml_folder: Path, sentencepiece_folder: Path) -> None:
    chatml, framed = Tokenizer.load(chatml_folder), Tokenizer.load(sentencepiece_folder)
    texts = ["the quick brown fox", "a", ""]
    batch = chatml.encode_padded(texts, max_length=4, multiple_of=8, fill="left")
    rows = [chatml.encode(text) for text in texts]
    assert batch.ids_BT.shape == (3, 8)
    assert batch.num_cut_B.tolist() == [len(rows[0]) - 4, 0, 0]
    assert batch.ids_BT[0, -4:].tolist() == rows[0][:4]
    assert (batch.ids_BT[~batch.mask_BT] == chatml.pad_id).all()
    with_bos = framed.encode_padded(texts, add_special=True, max_length=3, pad_id=0)
    assert with_bos.ids_BT[:, 0].tolist() == [framed.bos_id] * 3
    assert with_bos.num_tokens_B.tolist() == [3, len(framed.encode("a")) + 1, 1]


def test_without_a_padding_token_nothing_is_guessed(sentencepiece_folder: Path) -> None:
    """Padding with end-of-text, as many do, masks the end of text out of training."""
    with pytest.raises(DataError, match="no padding token"):
        Tokenizer.load(sentencepiece_folder).encode_padded(["a", "b c"])


def test_lengths_that_do_not_fit_are_errors_in_words(chatml_folder: Path) -> None:
    with pytest.raises(DataError, match="more than the 1"):
        Tokenizer.load(chatml_folder).encode_padded(["the quick brown fox"], length=1)
