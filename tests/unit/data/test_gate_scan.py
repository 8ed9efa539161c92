"""The pass over all datums, held against the same questions asked of one row after the other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.data.gate.scan import scan
from model_foundry.types import Datum

BOS, STOP, OTHER_STOP, BLANK, PROMPT_END = 1, 2, 3, 4, (7, 5)

rows = st.lists(
    st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=2, max_size=14), min_size=0, max_size=6
)  # fmt: skip


def naive(ids: list[int], trained: list[bool], *, is_cut: bool) -> tuple[int, bool, bool, int, bool, bool]:
    """What `Scan` says of one row, by plain loops; nothing says whether its first token is trained."""
    trained = [False, *trained[1:]]
    places = [place for place in range(len(ids)) if trained[place]]
    starts = [place for place in places if place == 1 or not trained[place - 1]]
    ends = [place for place in places if place + 1 == len(ids) or not trained[place + 1]]
    doubled = any(
        place >= 2 and trained[place] and ids[place] in (STOP, OTHER_STOP)
        and ((trained[place - 1] and ids[place - 1] == ids[place])
             or (place >= 3 and trained[place - 2] and ids[place - 2] == ids[place] and ids[place - 1] == BLANK))
        for place in places
    )  # fmt: skip
    return (
        len(starts),
        all(place >= 2 and tuple(ids[place - 2 : place]) == PROMPT_END for place in starts),
        all(ids[place] in (STOP, OTHER_STOP) or (is_cut and place + 1 == len(ids)) for place in ends),
        sum(ids[place] in (STOP, OTHER_STOP) for place in places),
        ids[:2] == [BOS, BOS] or ids[:3] == [BOS, BLANK, BOS],
        doubled,
    )


@given(rows, st.integers(1, 4), st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_scan_says_what_plain_loops_say(
    sets: list[list[tuple[int, bool]]], rows_at_once: int, cuts: list[bool]
) -> None:
    """Prevents a row's end from being read as the next one's beginning, and a piece's border from being missed."""
    datums = [
        Datum.from_row(np.array([token for token, _ in row]), np.array([float(trained) for _, trained in row]))
        for row in sets
    ]
    found = scan(
        datums, is_truncated=np.array(cuts[: len(sets)], dtype=bool), stops=[STOP, OTHER_STOP], bos=BOS,
        blanks=[BLANK], prompt_end=PROMPT_END, rows_at_once=rows_at_once,
    )  # fmt: skip
    expected = [
        naive([token for token, _ in row], [trained for _, trained in row], is_cut=cut)
        for row, cut in zip(sets, cuts, strict=False)
    ]
    columns = (
        found.num_runs, found.starts_as_expected, found.ends_in_stop, found.num_stops, found.is_bos_doubled,
        found.is_stop_doubled,
    )  # fmt: skip
    assert [tuple(column[index] for column in columns) for index in range(len(sets))] == expected


def test_without_a_known_prompt_no_beginning_is_as_expected() -> None:
    """Nothing known must not read as nothing wrong."""
    datum = Datum.from_row(np.array([7, 5, 9, STOP]), np.array([0.0, 0.0, 1.0, 1.0]))
    found = scan([datum], is_truncated=np.zeros(1, bool), stops=[STOP], bos=None, blanks=[], prompt_end=[])
    assert found.starts_as_expected.tolist() == [False]
    assert found.ends_in_stop.tolist() == [True]
