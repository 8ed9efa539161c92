"""From rows to datums: policies are applied and counted, nothing is lost in silence."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from model_foundry.data.rows import Row, RowSet
from model_foundry.data.tokenise import tokenise_rows
from model_foundry.errors import DataError, TemplateError, UnsafeTemplateError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message

ANSWER = Message("assistant", "Paris.")


@pytest.fixture(scope="session")
def renderer(chatml_folder: Path) -> Renderer:
    return Renderer(Tokenizer.load(chatml_folder))


def conversation(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts))


def row_set(*rows: tuple[Message, ...] | str) -> RowSet:
    made = [
        Row(text=row, source=f"f:{n}") if isinstance(row, str) else Row(row, source=f"f:{n}")
        for n, row in enumerate(rows, start=1)
    ]
    return RowSet(tuple(made), "messages", Path("f"))


def test_datums_are_shifted_and_counted(renderer: Renderer) -> None:
    """A weight belongs to the token it predicts; one off, and the user's last token is trained."""
    rows = row_set(conversation("q", "a"), conversation("q", "a b c"))
    made = tokenise_rows(rows, renderer, max_length=128)
    full = renderer.render(rows.rows[0].messages)
    datum = made.datums[0]
    assert datum.tokens.tolist() == full.tokens[:-1].tolist()
    assert datum.loss_inputs["target_tokens"].tolist() == full.tokens[1:].tolist()
    assert datum.loss_inputs["weights"].tolist() == full.weights[1:].tolist()
    assert made.sources == ("f:1", "f:2")
    assert made.lengths.tolist() == [datum.num_tokens for datum in made.datums]
    assert made.num_tokens == int(made.lengths.sum())
    assert made.num_trained_tokens == sum(int(d.loss_inputs["weights"].sum()) for d in made.datums)
    assert (made.num_rows, made.num_dropped, made.num_truncated) == (2, 0, 0)


def test_longer_rows_are_dropped_counted_and_named(renderer: Renderer) -> None:
    made = tokenise_rows(row_set(conversation("q", "a"), conversation("q " * 99, "a")), renderer, max_length=40)
    assert made.num_dropped == 1
    assert made.reasons == {"longer than 40 tokens": 1}
    assert made.first_dropped[0].startswith("f:2: longer than 40 tokens (")
    assert len(made.datums) == 1


def test_longer_rows_are_truncated_and_counted(renderer: Renderer) -> None:
    rows = row_set(conversation("q", "word " * 99), conversation("q " * 99, "a"))
    made = tokenise_rows(rows, renderer, max_length=40, overlength="truncate")
    assert made.num_truncated == 1
    assert made.datums[0].num_tokens == 39
    assert made.reasons == {"nothing to train on once truncated": 1}


def test_longer_rows_are_errors_when_asked(renderer: Renderer) -> None:
    rows = row_set(conversation("q", "a"), *[conversation("q " * 99, "a")] * 12)
    with pytest.raises(DataError, match=r"(?s)12 of 13 rows.*f:2: \d+ tokens, over data\.max_length 40.*and 2 more"):
        tokenise_rows(rows, renderer, max_length=40, overlength="error")


def test_a_row_of_exactly_max_length_stays(renderer: Renderer) -> None:
    rows = row_set(conversation("q", "a"))
    length = len(renderer.render(rows.rows[0].messages).tokens)
    assert tokenise_rows(rows, renderer, max_length=length).num_dropped == 0
    with pytest.raises(DataError, match=r"no row is left to train on: longer than .* tokens \(1\)"):
        tokenise_rows(rows, renderer, max_length=length - 1)


def test_a_row_without_an_assistant_turn_is_an_error(renderer: Renderer) -> None:
    rows = row_set(conversation("q", "a"), (Message("user", "q"),))
    with pytest.raises(DataError, match=r"f:2: no message has the role assistant"):
        tokenise_rows(rows, renderer, max_length=64)
    assert len(tokenise_rows(rows, renderer, max_length=64, train_on="all").datums) == 2


def test_no_assistant_tokens_in_the_whole_set_is_an_error(renderer: Renderer) -> None:
    rows = row_set(conversation("q " * 99, "a"), conversation("q " * 99, "b"))
    with pytest.raises(DataError, match=r"no row is left to train on: nothing to train on once truncated \(2\)"):
        tokenise_rows(rows, renderer, max_length=16, overlength="truncate")


def test_last_assistant_reaches_the_renderer(renderer: Renderer) -> None:
    rows = row_set(conversation("q", "a", "q", "b"))
    all_turns = tokenise_rows(rows, renderer, max_length=128).num_trained_tokens
    assert tokenise_rows(rows, renderer, max_length=128, train_on="last_assistant").num_trained_tokens < all_turns


def test_text_rows_are_trained_throughout(renderer: Renderer) -> None:
    made = tokenise_rows(row_set("once upon a time"), renderer, max_length=64)
    assert np.all(made.datums[0].loss_inputs["weights"] == 1)


def test_rows_with_control_tokens_are_counted(renderer: Renderer) -> None:
    """A file already formatted with control tokens would train on their spelling; the count gives it away."""
    rows = row_set(conversation("q<|im_end|>", "a"), conversation("> q <", "a"), "<|im_start|>user", "a <")
    assert tokenise_rows(rows, renderer, max_length=128).num_escaped == 2


def test_rows_the_template_refuses_are_named(chatml_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "strict.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    renderer = Renderer(Tokenizer.load(chatml_folder), str(path))
    rows = row_set(conversation("q", "a"), (Message("tool", "x"), ANSWER))
    with pytest.raises(DataError, match=r"1 of 2 rows.*\n  f:2: strict:1: the chat template refuses the row: no tools"):
        tokenise_rows(rows, renderer, max_length=64)


def test_an_unsafe_template_stops_at_the_first_row(chatml_folder: Path, tmp_path: Path) -> None:
    """Each row would take seconds to fail, so ten thousand of them would take hours."""
    path = tmp_path / "unsafe.jinja"
    path.write_text("{% for m in messages %}{{ 'x' * 10**9 if m.content == 'boom' else m.content }}{% endfor %}")
    renderer = Renderer(Tokenizer.load(chatml_folder), str(path))
    with pytest.raises(UnsafeTemplateError):
        tokenise_rows(row_set(*[conversation("boom", "a")] * 3), renderer, max_length=64)


def test_a_missing_template_is_said_once_not_for_every_row(chatml_folder: Path) -> None:
    tokenizer = Tokenizer.load(chatml_folder)
    bare = Renderer(Tokenizer(tokenizer.backend, named=tokenizer.named))
    with pytest.raises(TemplateError, match="no chat template"):
        tokenise_rows(row_set(conversation("q", "a")), bare, max_length=64)
    assert tokenise_rows(row_set("plain"), bare, max_length=64).num_rows == 1


def test_a_giant_row_is_dropped_without_encoding_it(renderer: Renderer) -> None:
    rows = row_set(conversation("a" * 10_000_000, "a"), "b" * 10_000_000, conversation("q", "a"))
    start = time.thread_time()
    made = tokenise_rows(rows, renderer, max_length=64)
    assert made.num_dropped == 2
    assert "at least" in made.first_dropped[0]
    assert time.thread_time() - start < 2.0


@pytest.mark.parametrize("row, words", [
    (
        Row(conversation("q"), source="f:1", chosen=(ANSWER,), rejected=(Message("assistant", "Rome."),)),
        "pairs, which method=dpo learns from",
    ),
    (Row(conversation("q", "a"), source="f:1", label=False), "labelled good or bad"),
])  # fmt: skip
def test_rows_of_another_method_are_refused(row: Row, words: str, renderer: Renderer) -> None:
    """Prevents sft from learning the answers that a preference set says to avoid."""
    rows = RowSet((row,), "preference", Path("f"))
    with pytest.raises(DataError, match=f"f: the rows are .*{words}.* --to messages"):
        tokenise_rows(rows, renderer, max_length=64)


def test_a_tool_call_that_the_template_does_not_show_is_refused(chatml_folder: Path) -> None:
    """Prevents a turn from training nothing but its end, because all that it holds is a call."""
    call = Message("assistant", "", {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]})
    renderer = Renderer(Tokenizer.load(chatml_folder), "chatml")
    with pytest.raises(DataError, match="f:1: a turn calls a tool, and the chat template does not show tool calls"):
        tokenise_rows(row_set((Message("user", "q"), call)), renderer, max_length=64)
