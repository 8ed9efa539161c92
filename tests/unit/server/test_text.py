"""Text as it comes: joined, the pieces are the whole; no piece holds half a character or part of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.server.text import Detokenizer, StopStrings
from model_foundry.tokenizer import Tokenizer
from tests.conftest import byte_level_tokenizer

BYTES = Tokenizer(byte_level_tokenizer(["<|end|>"], vocab_size=300))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "\ufffd" not in text)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(lambda tokens: tokenizer.decode(tokens, skip_special=True))
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@given(TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    pieces = pieces_of(BYTES, BYTES.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(TEXTS.filter(bool), st.data())
def test_a_cut_anywhere_leaves_out_half_a_character_and_nothing_else(text: str, data: st.DataObject) -> None:
    ids = BYTES.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    shown = "".join(pieces_of(BYTES, ids[:cut]))
    assert "\ufffd" not in shown
    assert text.startswith(shown)
    assert shown == BYTES.decode(ids[:cut]).rstrip("\ufffd")


def test_bytes_that_are_no_text_do_not_hold_up_the_rest() -> None:
    start = BYTES.backend.token_to_id("Ġ")
    lone = [token for token in range(300) if BYTES.decode([token]) == "\ufffd"][:1] * 30
    assert start is not None
    pieces = pieces_of(BYTES, [*lone, *BYTES.encode(" then words")])
    assert "".join(pieces).endswith(" then words")
    assert any(pieces[:20]), "thirty lone bytes waited for a character that they cannot become"


def test_words_are_joined_as_in_the_whole(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog")
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special=True)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["END"], ["a E", "N", "D b"], "a "),
        (["END"], ["a E", "N", "X b"], "a ENX b"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo"),
        (["aab"], ["aa", "aab"], "aa"),
        (["bc", "abcd"], ["a", "b", "c", "d"], "a"),
        (["xyz"], ["", "no stop", ""], "no stop"),
        ([], ["any", "thing"], "anything"),
    ],
)
def test_text_ends_before_a_stop_string(stops: list[str], pieces: list[str], shown: str) -> None:
    filtered, out = StopStrings(stops), ""
    for piece in pieces:
        text, hit = filtered.push(piece)
        out += text
        if hit:
            break
    else:
        out += filtered.finish()
    assert out == shown


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_how_text_is_cut_changes_nothing(text: str, stops: list[str], data: st.DataObject) -> None:
    def run(pieces: list[str]) -> str:
        filtered, out = StopStrings(stops), ""
        for piece in pieces:
            shown, hit = filtered.push(piece)
            out += shown
            if hit:
                return out
        return out + filtered.finish()

    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    one_by_one = run(list(text))
    assert one_by_one == run([*"".join(pieces)])
    if not found:
        assert run(pieces) == text
    else:
        assert not any(stop in run(pieces) for stop in stops)
