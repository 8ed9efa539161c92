"""The page of a reinforcement-learning run: rewards, and answers before and after. It loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model_foundry.run.charts import Series, escape, line_chart, smoothed
from model_foundry.run.page_style import STYLE


def render_rl_page(run_id: str, records: Sequence[Mapping[str, Any]], *, path: str) -> str:
    """The whole page.

    Args:
        records: metrics.jsonl.
        path: of the last checkpoint.
    """
    steps = [record for record in records if record["kind"] == "step"]
    asked = [record for record in records if record["kind"] == "held_out"]
    before, after = asked[0], asked[-1]
    tiles = {
        "held-out reward before": f"{before['reward']:.0%}",
        "held-out reward after": f"{after['reward']:.0%}",
        "steps": f"{len(steps)}",
        "seconds": f"{sum(record['clock']['seconds'] for record in steps):.0f}",
    }
    charts = (
        _chart(steps, "reward", title="Mean reward of the samples, by step", y_label="reward")
        + _chart(steps, "solved", title="Problems that some sample solved", y_label="share")
        + _chart(steps, "sample_nats", title="How unsure the samples are", y_label="nats a token")
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(run_id)}</title><style>{STYLE}</style></head><body><main>\n"
        f'<header><p class="run">{escape(run_id)}</p><h1>Reward {before["reward"]:.0%} → {after["reward"]:.0%}'
        "<small>on problems that were never trained on</small></h1></header>"
        f'<div class="tiles">{"".join(_tile(name, value) for name, value in tiles.items())}</div>\n'
        f'<section><h2>Training</h2><div class="charts">{charts}</div></section>\n'
        f"<section><h2>Before and after</h2>{_answers(before, after)}</section>\n"
        "<footer>Written by Model Foundry: <code>foundry rl</code>. "
        f"The model is <code>{escape(path)}</code>.</footer>\n"
        "</main></body></html>\n"
    )


def _tile(name: str, value: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _chart(steps: Sequence[Mapping[str, Any]], name: str, *, title: str, y_label: str) -> str:
    points = [(float(record["step"]), float(record[name])) for record in steps]
    lines = [Series("each step", points, is_faint=True), Series("smoothed", smoothed(points, share=0.15))]
    return line_chart(lines, title=title, x_label="step", y_label=y_label)


def _answers(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(old['problem'])}</td><td>{escape(old['answer'])}</td>"
        f"<td>{_reply(old)}</td><td>{_reply(new)}</td></tr>"
        for old, new in zip(before["answers"], after["answers"], strict=True)
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("problem", "right", "before", "after"))
    return f'<table class="checks"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _reply(answer: Mapping[str, Any]) -> str:
    mark = "✓" if answer["reward"] > 0 else "✗"
    return f"{mark} {escape(answer['reply'])}"
