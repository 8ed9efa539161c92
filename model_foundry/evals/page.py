"""evaluation.html: the verdict, every metric with its interval, and the answers side by side, filtered by which way
they changed. One file with a small script of its own; it loads nothing.

Made from evaluation.json alone. Every text that came from outside goes through `escape`.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from model_foundry.evals.measures import value_text
from model_foundry.run.charts import escape
from model_foundry.run.page_style import STYLE

MAX_SHOWN_CHARS = 2000
_OWN_STYLE = """
.metrics td, .metrics th { vertical-align: middle; } .metrics svg { width: 220px; height: 26px; }
.metrics .rule { stroke: var(--rule); } .zero { stroke: var(--soft); stroke-dasharray: 3 3; }
.bar { stroke-width: 4; stroke-linecap: round; } b.better { color: var(--pass); } b.worse { color: var(--fail); }
.metrics td:first-child { white-space: nowrap; }
@media (max-width: 640px) { .metrics { display: block; overflow-x: auto; } }
.bar.better { stroke: var(--pass); } .bar.worse { stroke: var(--fail); }
.bar.unclear, .bar.same, .bar.alone { stroke: var(--none); }
.dot { fill: var(--ink); } .noise { fill: var(--none); opacity: .25; }
.filter { display: flex; flex-wrap: wrap; gap: 8px 14px; margin: 12px 0; align-items: center; }
.filter button { font: inherit; font-size: .875rem; padding: 3px 12px; border-radius: 14px;
  border: 1px solid var(--rule); background: var(--panel); color: var(--ink); cursor: pointer; }
.filter button[aria-pressed=true] { background: var(--ink); color: var(--paper); }
.filter select, .filter input { font: inherit; font-size: .875rem; padding: 3px 8px; background: var(--panel);
  color: var(--ink); border: 1px solid var(--rule); border-radius: 6px; }
.row { border: 1px solid var(--rule); border-left: 5px solid var(--none); border-radius: 8px; padding: 10px 14px;
  margin: 10px 0; } .row.better { border-left-color: var(--pass); } .row.worse { border-left-color: var(--fail); }
.row[hidden] { display: none; }
.row p { margin: 0 0 6px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px; }
.side { background: var(--panel); border-radius: 6px; padding: 8px 12px; white-space: pre-wrap; unicode-bidi: isolate; }
.side b, .row .src { display: block; font-size: .75rem; color: var(--soft); font-weight: 600; }
.scores { font-size: .8125rem; color: var(--soft); margin-top: 6px; } .empty { color: var(--soft); font-style: italic; }
.reasons li { margin: 4px 0; }
"""
_SCRIPT = """
for (const part of document.querySelectorAll('section.suite')) {
  const rows = [...part.querySelectorAll('.row')], metric = part.querySelector('select'),
    words = part.querySelector('input'), buttons = [...part.querySelectorAll('.filter button')],
    count = part.querySelector('.count');
  let way = 'all';
  const show = () => {
    const text = words.value.toLowerCase();
    let seen = 0;
    for (const row of rows) {
      const own = metric ? row.dataset[metric.value] : 'same';
      row.classList.remove('better', 'worse', 'same');
      row.classList.add(own);
      row.hidden = (way !== 'all' && own !== way) || !row.textContent.toLowerCase().includes(text);
      seen += !row.hidden;
    }
    count.textContent = seen + ' of ' + rows.length + ' rows';
    for (const button of buttons) button.setAttribute('aria-pressed', button.value === way);
  };
  for (const button of buttons) button.onclick = () => { way = button.value; show(); };
  if (metric) metric.onchange = show;
  words.oninput = show;
  show();
}
"""
_KINDS = {True: "pass", False: "fail", None: "none"}


def render_evaluation(values: Mapping[str, Any]) -> str:
    """The whole page from what evaluation.json holds."""
    beside = values.get("against")
    about = f"{values['model']} beside {beside}" if beside else str(values["model"])
    suites = "".join(_suite(name, suite) for name, suite in values["suites"].items())
    body = f"{_header(values, about)}{_checks(values['checks'])}{suites}"
    return page_of(f"{values['verdict']}: {about}", body)


def page_of(title: str, body: str) -> str:
    """A page in the report's style. Its own script and nothing else runs, and nothing is loaded, whatever texts hold.

    Args:
        body: HTML in which every text from outside is escaped.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}{_OWN_STYLE}</style></head><body>"
        f"<main>\n{body}<footer>Written by Model Foundry.</footer>\n</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _header(values: Mapping[str, Any], about: str) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in values["reasons"])
    return (
        f'<header class="{_KINDS[values["ship"]]}"><p class="run">{escape(about)}</p>'
        f'<h1>{escape(values["verdict"])}</h1></header><ul class="notes reasons">{reasons}</ul>'
    )


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    rows = "".join(
        f'<tr><td data-label="Check"><span class="badge {"pass" if check["passed"] else "fail"}">'
        f"{'pass' if check['passed'] else 'FAIL'}</span> {escape(check['name'])}</td>"
        f'<td data-label="Bound">{escape(check["bound"])}</td>'
        f'<td data-label="Evidence">{escape(check["evidence"])}</td></tr>'
        for check in sorted(checks, key=lambda check: bool(check["passed"]))
    )
    head = "<thead><tr><th>Check</th><th>Bound</th><th>Evidence</th></tr></thead>"
    return f'<section><h2>Checks</h2><table class="checks">{head}<tbody>{rows}</tbody></table></section>'


def _suite(name: str, suite: Mapping[str, Any]) -> str:
    after, before, changes = suite["after"], suite["before"], suite["changes"]
    left_out = f" {after['num_left_out']} further rows were left out." if after["num_left_out"] else ""
    missing = "".join(
        f"<li>{escape(metric)} was not measured: {escape(reason)}.</li>" for metric, reason in after["missing"].items()
    )
    return (
        f'<section class="suite"><h2>{escape(name)}</h2><p>{escape(after["about"])}{escape(left_out)}</p>'
        f"{_metrics(after, before, changes)}{f'<ul class=notes>{missing}</ul>' if missing else ''}"
        f"{_rows(suite)}</section>\n"
    )


def _metrics(after: Mapping[str, Any], before: Mapping[str, Any] | None, changes: Mapping[str, Any]) -> str:
    if not after["metrics"]:
        return ""
    rows = "".join(
        _changed(metric, changes[metric]) if metric in changes else _alone(metric, found)
        for metric, found in after["metrics"].items()
    )
    if before is None:
        head = "<th>Metric</th><th>Value</th><th>95 % interval</th><th></th><th>Rows</th>"
    else:
        head = "<th>Metric</th><th>Before → after</th><th>Change, 95 % interval</th><th></th><th>Rows</th>"
    return f'<table class="metrics"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _alone(metric: str, found: Mapping[str, Any]) -> str:
    unit, interval = found["unit"], found["interval"]
    drawn = (
        "" if interval is None or found["value"] is None else interval_drawing(found["value"], interval, 0.0, "alone")
    )
    spread = _interval_text(interval, unit, found["why"])
    return (
        f'<tr><td>{escape(metric)}</td><td class="num">{escape(value_text(found["value"], unit))}</td>'
        f"<td>{escape(spread)}</td><td>{drawn}</td><td>{found['num_rows']}</td></tr>"
    )


def _changed(metric: str, change: Mapping[str, Any]) -> str:
    unit, interval, verdict = change["unit"], change["interval"], change["verdict"]
    values = f"{value_text(change['before'], unit)} → {value_text(change['after'], unit)}"
    drawn = ""
    if interval is not None and change["delta"] is not None:
        drawn = interval_drawing(change["delta"], interval, change["noise"], verdict)
    delta = f"{value_text(change['delta'], unit, signed=True)}: {_interval_text(interval, unit, change['why'], True)}"
    counts = ", ".join(f"{number} {way}" for way, number in change["counts"].items() if number)
    noise = f"<br><small>asked again it moves by {escape(value_text(change['noise'], unit))}</small>"
    return (
        f'<tr><td>{escape(metric)}<br><b class="{escape(verdict)}">{escape(verdict)}</b></td>'
        f'<td class="num">{escape(values)}</td><td>{escape(delta)}{noise if change["noise"] else ""}</td>'
        f"<td>{drawn}</td><td>{escape(counts)}</td></tr>"
    )


def _interval_text(interval: Sequence[float] | None, unit: str, why: str, signed: bool = False) -> str:
    if interval is None:
        return f"no interval: {why}"
    low, high = (value_text(end, unit, signed=signed) for end in interval)
    return f"{low} to {high}"


def interval_drawing(value: float, interval: Sequence[float], noise: float, verdict: str) -> str:
    """The interval as a bar with a dot, zero as a dashed line, and the noise as a band around it."""
    low, high = (float(end) for end in interval)
    ends = [end for end in (low, high, value, 0.0, noise, -noise) if math.isfinite(end)]
    left, right = min(ends), max(ends)
    span = (right - left) or 1.0

    def x(number: float) -> float:
        return 8 + 204 * (number - left) / span

    band = f'<rect class="noise" x="{x(-noise):.1f}" y="2" width="{x(noise) - x(-noise):.1f}" height="22"/>'
    return (
        f'<svg viewBox="0 0 220 26" role="img" aria-label="from {low:.4g} to {high:.4g}">'
        f'<line class="rule" x1="4" x2="216" y1="13" y2="13"/>{band if noise else ""}'
        f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="2" y2="24"/>'
        f'<line class="bar {escape(verdict)}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="13" y2="13"/>'
        f'<circle class="dot" cx="{x(value):.1f}" cy="13" r="4"/></svg>'
    )


def _rows(suite: Mapping[str, Any]) -> str:
    after, before, ways = suite["after"], suite["before"], suite["row_changes"]
    if not after["rows"]:
        return ""
    others = [None] * len(after["rows"]) if before is None else before["rows"]
    names = list(ways)
    rows = "".join(
        _row(own, other, [(f"m{n}", ways[name][place]) for n, name in enumerate(names)])
        for place, (own, other) in enumerate(zip(after["rows"], others, strict=True))
    )
    return f"<details open><summary>Answers</summary>{_filter(names)}<div>{rows}</div></details>"


def _filter(names: Sequence[str]) -> str:
    search = '<input type="search" placeholder="words" aria-label="Rows with these words"><span class="count"></span>'
    if not names:
        return f'<div class="filter">{search}</div>'
    options = "".join(f'<option value="m{n}">{escape(name)}</option>' for n, name in enumerate(names))
    buttons = "".join(
        f'<button type="button" value="{way}" aria-pressed="{"true" if way == "all" else "false"}">{way}</button>'
        for way in ("all", "better", "worse", "same")
    )
    return f'<div class="filter">{buttons}<label>by <select>{options}</select></label>{search}</div>'


def _row(own: Mapping[str, Any], other: Mapping[str, Any] | None, ways: Sequence[tuple[str, str]]) -> str:
    data = "".join(f' data-{key}="{escape(way)}"' for key, way in ways)
    expected = f'<div class="side"><b>expected</b>{_text(own["expected"])}</div>' if own["expected"] else ""
    sides = (
        (_side(other, "before, ") + expected + _side(own, "after, "))
        if other is not None
        else expected + _side(own, "")
    )
    return (
        f'<div class="row same"{data}><p class="src">{escape(own["source"])}</p>'
        f'<p dir="auto">{_text(own["prompt"]) if own["prompt"] else ""}</p><div class="sides">{sides}</div></div>'
    )


def _side(row: Mapping[str, Any], when: str) -> str:
    scores = " · ".join(f"{name} {_score(value)}" for name, value in row["scores"].items() if value is not None)
    texts = "".join(
        f'<div class="side" dir="auto"><b>{escape(when + each["what"])}</b>{_text(each["text"])}'
        f'<div class="scores">{escape(scores) if place == 0 else ""}</div></div>'
        for place, each in enumerate(row["answers"])
    )
    return texts or f'<div class="side"><b>{escape(when.strip(", ") or "scores")}</b>{escape(scores)}</div>'


def _text(text: str) -> str:
    if not text.strip():
        return '<span class="empty">(empty)</span>'
    if len(text) <= MAX_SHOWN_CHARS:
        return escape(text)
    left = f"… ({len(text) - MAX_SHOWN_CHARS:,} more characters in evaluation.json)"
    return f'{escape(text[:MAX_SHOWN_CHARS])}<span class="empty">{left}</span>'


def _score(value: float) -> str:
    return f"{value:.3g}"
