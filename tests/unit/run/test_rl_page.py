"""The page of a reinforcement-learning run."""

from __future__ import annotations

import re

from model_foundry.run.rl_page import render_rl_page

ANSWERS = [{"problem": "1 + 2", "answer": "3", "reply": "4", "reward": 0.0}]


def test_the_legend_tells_a_step_from_the_smoothed_line() -> None:
    """Both had one colour and nothing else to tell them by."""
    asked = {"kind": "held_out", "reward": 0.0, "answers": ANSWERS}
    steps = [
        {"kind": "step", "step": step, "reward": 0.1, "solved": 0.5, "sample_nats": 1.0, "clock": {"seconds": 1.0}}
        for step in range(1, 41)
    ]
    page = render_rl_page("run", [asked, *steps, asked], path="tinker://x")
    keys = re.findall(r"<span>(<i [^>]*></i>)(each step|smoothed)</span>", page)
    assert len({mark for mark, _ in keys}) == 2
    assert ".legend .faint {" in page
