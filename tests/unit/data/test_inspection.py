"""What the inspector shows is what the engine would get, and all of it is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.gate.judge import judge, make_subject
from model_foundry.data.gate.reading import read_attentively
from model_foundry.data.inspection import MAX_ROW_TOKENS, Inspection, inspect_rows, token_texts
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from tests.unit.data.gate_sets import conversation, conversations, sentence, write_rows


@pytest.fixture(scope="session")
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return Tokenizer.load(chatml_folder)


def inspect(path: Path, tokenizer: Tokenizer, *, num_shown: int = 5, **options: object) -> Inspection:
    given_options = {"max_length": 2048} | options
    subject = make_subject(read_attentively(path), Renderer(tokenizer), **given_options)  # pyright: ignore[reportArgumentType]
    return inspect_rows(subject, judge(subject), num_shown=num_shown)


def test_the_tokens_shown_are_the_datum_s(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", conversations(30))
    shown = inspect(path, tokenizer, num_shown=3)
    assert [row.source for row in shown.rows] == [f"{path}:{n}" for n in (1, 15, 30)]
    assert shown.num_rows == 30
    for row, number in zip(shown.rows, (0, 14, 29), strict=True):
        messages = conversation(number)["messages"]
        assert "".join(token.text for token in row.tokens if token.is_trained) == f"{messages[1]['content']}<|im_end|>"
        assert row.num_tokens == len(row.tokens)
        assert {token.text for token in row.tokens if token.is_special} == {"<|im_start|>", "<|im_end|>"}


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd\U0010fffe\U0010ffff")))
def test_what_tokens_add_up_to_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    """Prevents an emoji, which is several tokens, from being shown as question marks or twice."""
    ids = tokenizer.encode(text)
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_spaces_before_words_are_shown_for_sentencepiece_too(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)
    text = "The quick brown fox asks"
    assert "".join(token_texts(tokenizer, tokenizer.encode(text))).strip() == text


def test_every_row_left_out_has_its_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        *conversations(20), {"messages": [{"role": "user", "content": "?"}]}, ["no row"],
        {"messages": [{"role": "bard", "content": "O!"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": sentence(3, 300)}]},
    ]  # fmt: skip
    shown = inspect(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, max_length=200)
    assert {each.reason: each.count for each in shown.left_out} == {
        "cannot be read": 1, "a role that nobody knows": 1, "no answer in it": 1, "longer than 200 tokens": 1,
    }  # fmt: skip
    assert shown.num_rows + sum(each.count for each in shown.left_out) == len(rows)
    assert shown.histogram is not None
    assert (sum(shown.histogram.kept), sum(shown.histogram.lost)) == (20, 1)


def test_notes_say_what_happened_to_a_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": sentence(3, 300)}]}
    path = write_rows(tmp_path / "rows.jsonl", [long, conversation(1), conversation(1)])
    shown = inspect(path, tokenizer, max_length=200, overlength="truncate")
    cut, first, second = shown.rows
    assert cut.notes[0].startswith("cut off: ")
    assert "control tokens in the text" in cut.notes[1]
    assert (first.notes, second.notes) == ((), (f"repeats {path}:2",))
    assert (shown.num_exact, shown.num_near) == (1, 0)
    assert shown.repeats[0].first == f"{path}:2"


def test_a_giant_row_is_shown_in_part_and_counted_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(1, 2000)}])
    row = inspect(path, tokenizer, max_length=1_000_000).rows[0]
    assert len(row.tokens) == MAX_ROW_TOKENS < row.num_tokens


def test_nothing_to_show_is_no_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shown = inspect(write_rows(tmp_path / "rows.jsonl", b""), tokenizer)
    assert (shown.rows, shown.histogram, shown.num_rows) == ((), None, 0)
    assert not shown.gate.passed


def test_the_histogram_holds_every_row_and_no_giant_squeezes_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*conversations(300), {"messages": [
        {"role": "user", "content": "?"}, {"role": "assistant", "content": sentence(3, 3000)}]}]  # fmt: skip
    found = inspect(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, max_length=256).histogram
    assert found is not None
    assert sum(found.kept) + sum(found.lost) == 301
    assert found.edges[-1] < 1000
    assert found.lost[-1] == 1
    assert found.percentiles["max"] > 5000
