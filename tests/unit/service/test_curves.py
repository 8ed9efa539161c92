"""A curve is a loss a token for each step, however long it grows and whatever came before a restart."""

from __future__ import annotations

import pytest

from model_foundry.service.curves import MOST_POINTS, Curves


def test_passes_of_a_step_make_one_point_also_when_read_from_the_journal() -> None:
    """Two chunks of one batch are one step; a step without a pass is none of the loss's."""
    so_far = [("m", "forward_backward", 6.0, 3), ("m", "forward_backward", 2.0, 1), ("m", "optim_step", None, None),
              ("m", "optim_step", None, None), ("other", "forward_backward", 1.0, 1)]  # fmt: skip
    curves = Curves(so_far)
    curves.of("m").note_pass(5.0, 5)
    curves.of("m").note_step()
    assert curves.of("m").points == [(1, 2.0), (3, 1.0)]
    assert curves.of("other").points == []


def test_a_long_curve_stays_small_and_keeps_its_steps() -> None:
    curve = Curves().of("m")
    for step in range(1, 5001):
        curve.note_pass(float(step), 1)
        curve.note_step()
    assert len(curve.points) <= MOST_POINTS
    assert all(loss == pytest.approx(step) for step, loss in curve.points)
    assert curve.points[-1][0] > 4900
