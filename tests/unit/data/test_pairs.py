"""From preference rows to pairs: what counts, what is shared, what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_foundry.data.formats import parse_preference
from model_foundry.data.pairs import ALIKE, SEVERAL_TURNS, PairedSet, tokenise_pairs
from model_foundry.data.rows import RowSet, row_of
from model_foundry.errors import DataError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Datum


@pytest.fixture(scope="session")
def renderer(chatml_folder: Path) -> Renderer:
    return Renderer(Tokenizer.load(chatml_folder))


def row_set(*rows: Mapping[str, Any]) -> RowSet:
    made = [row_of(parse_preference(row), source=f"f:{number}") for number, row in enumerate(rows, start=1)]
    return RowSet(tuple(made), "preference", Path("f"))


def paired(renderer: Renderer, *rows: Mapping[str, Any], **options: Any) -> PairedSet:
    given: dict[str, Any] = {"max_length": 256} | options
    return tokenise_pairs(row_set(*rows), renderer, **given)


def counted(datum: Datum, renderer: Renderer) -> list[str]:
    """What bears weight of each branch, as text."""
    weights, targets = (datum.loss_inputs[name][datum.num_shared :] for name in ("weights", "target_tokens"))
    ends = np.cumsum(datum.branches)[:-1]
    branches = zip(np.split(targets, ends), np.split(weights, ends), strict=True)
    return [renderer.tokenizer.decode(part[due != 0].tolist()) for part, due in branches]


def test_only_the_answers_count_with_their_end_of_turn(renderer: Renderer) -> None:
    """Prevents earlier answers of the talk, which both halves have, from being taken for what is compared."""
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sum of 1 and 1?"},
    ]
    made = paired(renderer, {"prompt": prompt, "chosen": "2", "rejected": "It is 3."})
    (datum,) = made.pairs.datums
    assert counted(datum, renderer) == ["2<|im_end|>", "It is 3.<|im_end|>"]
    assert not datum.loss_inputs["weights"][: datum.num_shared].any()
    shown = renderer.tokenizer.decode(datum.tokens[: datum.num_shared].tolist())
    assert shown.endswith("<|im_start|>assistant")  # the line break after it begins both branches: it is what answers
    assert made.num_shared == datum.num_shared


def test_answers_that_begin_alike_count_from_their_beginning(renderer: Renderer) -> None:
    """Prevents the words that both answers begin with from being lost to the prompt."""
    made = paired(renderer, {"prompt": "q", "chosen": "The sea is blue.", "rejected": "The sea is green."})
    assert counted(made.pairs.datums[0], renderer) == ["The sea is blue.<|im_end|>", "The sea is green.<|im_end|>"]


def test_what_cannot_be_compared_is_counted_by_reason(renderer: Renderer) -> None:
    talk = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    made = paired(
        renderer,
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": talk, "rejected": "a"},
        {"prompt": "q " * 60, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b " * 60},
        max_length=60,
    )
    pairs = made.pairs
    assert (pairs.num_rows, len(pairs.datums), pairs.num_dropped) == (5, 1, 4)
    assert pairs.reasons == {ALIKE: 1, SEVERAL_TURNS: 1, "longer than 60 tokens": 2}
    assert pairs.first_dropped[0].startswith("f:2: two answers of the same tokens")
    assert pairs.indices.tolist() == [0]
    assert sum(row.reason == SEVERAL_TURNS for row in made.answers.lost) == 1, "the gate has to see it"


def test_answers_that_are_cut_are_counted_once_a_pair(renderer: Renderer) -> None:
    made = paired(
        renderer, {"prompt": "q", "chosen": "a " * 80, "rejected": "b " * 80}, max_length=60, overlength="truncate"
    )
    assert made.pairs.num_truncated == 1
    assert made.pairs.datums[0].num_positions == 59
    with pytest.raises(DataError, match=r"over data\.max_length 60"):
        paired(renderer, {"prompt": "q", "chosen": "a " * 80, "rejected": "b"}, max_length=60, overlength="error")


def test_nothing_left_is_an_error(renderer: Renderer) -> None:
    with pytest.raises(DataError, match=r"no pair is left to train on: two answers of the same tokens \(1\)") as caught:
        paired(renderer, {"prompt": "q", "chosen": "a", "rejected": "a"})
    assert "the first is f:1: two answers" in (caught.value.hint or "")
