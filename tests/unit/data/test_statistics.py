"""What rows are made of, counted against figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from model_foundry.data.rows import Row, RowSet
from model_foundry.data.statistics import code_languages, describe_rows, lengths
from model_foundry.types import Message

CALL = Message("assistant", "", {"tool_calls": [{"function": {"name": "f"}}]})


def test_every_figure_of_a_small_set() -> None:
    rows = RowSet(
        (
            Row((Message("system", "be brief"), Message("user", "one two"), Message("assistant", "```lua\nx\n```"))),
            Row((Message("user", ""), CALL, Message("tool", "3"), Message("assistant", "yes")), tools=({"name": "f"},)),
        ),
        "messages",
        ignored_fields={"id": 2},
    )
    others = RowSet((Row(text="plain words here"),), "text")
    found = describe_rows(rows, others, count_tokens=lambda row: 10 if row.text else 20)
    assert found.num_rows == 3
    assert found.kinds == {"conversation": 2, "text": 1}
    assert found.formats == {"messages": 2, "text": 1}
    assert found.roles == {"assistant": 3, "user": 2, "system": 1, "tool": 1}
    expected = {"min": 0, "p5": 0.3, "p25": 1.5, "p50": 3, "p75": 3.5, "p95": 3.9, "p99": 3.98, "max": 4}
    assert found.turns.percentiles == pytest.approx(expected)
    assert (found.characters.total, found.words.total) == (8 + 7 + 12 + 1 + 3 + 16, 2 + 2 + 3 + 1 + 1 + 3)
    assert found.answer_characters.total == 12 + 3
    assert found.tokens is not None
    assert (found.tokens.total, found.tokens.mean) == (50, pytest.approx(50 / 3))
    assert (found.num_system, found.num_tools, found.num_calls, found.num_empty_turns) == (1, 1, 1, 1)
    assert found.code_languages == {"lua": 1}
    assert found.ignored_fields == {"id": 2}
    assert json.loads(json.dumps(found.as_dict()))["roles"]["user"] == 2


def test_pairs_and_labels() -> None:
    answer = (Message("assistant", "a"),)
    rows = [Row((Message("user", "q"),), chosen=answer, rejected=answer), Row(answer, label=True)]
    found = describe_rows(RowSet((*rows, Row(answer, label=False)), "kto"))
    assert found.kinds == {"labelled answer": 2, "pair": 1}
    assert found.labels == {"bad": 1, "good": 1}
    assert found.roles == {"assistant": 4, "user": 1}
    assert found.tokens is None


def test_no_rows_and_no_division_by_zero() -> None:
    assert lengths([]).mean == 0
    assert describe_rows().num_rows == 0


def test_fences_name_their_language() -> None:
    """Prevents the end of one fence from being counted as the beginning of another."""
    text = "```py\nx\n```\n\n  ~~~\n```lua\n~~~\n````GDScript\n```\ninside\n````\n```\nopen"
    assert list(code_languages(text)) == ["python", "unnamed", "gdscript", "unnamed"]
