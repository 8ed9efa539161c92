"""The inspector's page: a set of rows as the model will see them, in one file that loads nothing.

Takes an `Inspection` and returns HTML. Every text that came from outside goes through `escape`. Knows nothing of files,
tokenizers or the gate's reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model_foundry.data.inspection import Histogram, Inspection, ShownRow, ShownToken
from model_foundry.run.charts import Columns, column_chart, escape
from model_foundry.run.figures import MISSING, share_text
from model_foundry.run.page import gate_table
from model_foundry.run.page_style import STYLE

_STYLE = """
:root { --trained: #c9ecd7; --trained-ink: #0b4a2b; --special: #6b3fb5; --special-bg: #ece4fa; }
@media (prefers-color-scheme: dark) {
  :root { --trained: #17452c; --trained-ink: #b8f0d0; --special: #c9aef5; --special-bg: #33264d; } }
.key { display: flex; flex-wrap: wrap; gap: 6px 18px; color: var(--soft); font-size: .875rem; margin: 0 0 14px; }
.row { border: 1px solid var(--rule); border-radius: 8px; margin: 0 0 14px; overflow: hidden; }
.row > p { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin: 0; padding: 8px 14px;
  background: var(--panel); font-size: .875rem; color: var(--soft); }
.row > p b { color: var(--ink); font-weight: 600; } .row .note { color: var(--fail); }
.tokens { padding: 10px 14px 12px; white-space: pre-wrap; unicode-bidi: plaintext; line-height: 1.75;
  max-height: 26em; overflow-y: auto;
  font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", "Noto Sans Mono", monospace;
  font-size: .8125rem; }
.t { position: relative; border-radius: 3px; padding: 1px 0; color: var(--soft);
  box-shadow: inset -1px 0 0 var(--rule); box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.t.y { background: var(--trained); color: var(--trained-ink); box-shadow: inset -1px 0 0 var(--paper); }
.t.s { color: var(--special); font-weight: 600; } .t.s:not(.y) { background: var(--special-bg); }
.t.s.y { box-shadow: inset 0 -2px 0 var(--special); }
.t i { font-style: normal; opacity: .45; }
.t:hover { outline: 2px solid var(--series-1); outline-offset: 0; z-index: 1; }
.t:hover::after { content: "id " attr(data-id); position: absolute; left: 0; bottom: calc(100% + 4px); z-index: 2;
  background: var(--ink); color: var(--paper); border-radius: 4px; padding: 1px 7px; font-size: .75rem;
  line-height: 1.5; font-weight: 400; white-space: nowrap; pointer-events: none; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 4px 28px; }
.columns h3 { margin-top: 14px; }
.columns table.narrow { width: 100%; min-width: 0; }
table.checks.repeats td:nth-child(3) { min-width: 0; } table.repeats code { overflow-wrap: normal; }
ul.plain { margin: 4px 0 12px; padding-left: 20px; font-size: .9375rem; } ul.plain code { color: var(--soft); }
h3 { text-transform: none; } .tile { flex-basis: 120px; } .tile b { font-size: 1.125rem; }
table.narrow td.num { text-align: end; }
"""
MAX_COUNTS = 12
_SPACES = str.maketrans({"\n": "<i>↵</i>\n", "\t": "<i>⇥</i>\t", "\r": "<i>␍</i>"})
_NAMES = {"p5": "5 %", "p25": "25 %", "p50": "median", "p75": "75 %", "p95": "95 %", "p99": "99 %", "min": "shortest",
          "max": "longest"}  # fmt: skip


def render_inspection(inspection: Inspection) -> str:
    """The whole page."""
    facts = inspection.gate.facts
    folder = f"{Path(facts['file']).parent}/"
    sections = [
        _section("Checks", gate_table(inspection.gate.as_dict())),
        _section("Lengths", _lengths(inspection.histogram)),
        _section("Rows", _rows(inspection, folder)),
        _section("Left out", _left_out(inspection, folder)),
        _section("Repeats", _repeats(inspection, folder)),
        _section("What the rows are made of", _statistics(inspection.statistics)),
        _section("Read as", _facts(facts)),
    ]
    title = f"{'Passed' if inspection.gate.passed else 'Refused'}: {facts['file']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head><body><main>\n"
        f"{_header(inspection)}\n{''.join(sections)}"
        "<footer>Written by Model Foundry: <code>foundry data inspect</code>.</footer>\n</main></body></html>\n"
    )


def _header(inspection: Inspection) -> str:
    gate = inspection.gate
    kind, word = ("pass", "Passed") if gate.passed else ("fail", "Refused")
    num_passed = len(gate.checks) - len(gate.failed)
    count = f"{num_passed} of {len(gate.checks)} checks passed"
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in _tiles(inspection)
    )
    return (
        f'<header class="{kind}"><p class="run">{escape(gate.facts["file"])}</p>'
        f"<h1>{word}<small>{escape(count)}</small></h1></header>"
        f'<div class="tiles">{tiles}</div>'
    )


def _tiles(inspection: Inspection) -> Iterator[tuple[str, str]]:
    facts, rows = inspection.gate.facts, inspection.statistics["num_rows"]
    yield "rows", f"{facts['rows']:,}"
    yield "tokens", f"{facts['tokens']:,}"
    yield "trained", share_text(facts["trained_tokens"] / max(1, facts["tokens"]))
    if inspection.histogram is not None:
        found = inspection.histogram.percentiles
        yield "median row", f"{found['p50']:,.0f} tokens"
        yield "longest row", f"{found['max']:,.0f} tokens"
    yield "rows left out", f"{sum(each.count for each in inspection.left_out):,}"
    yield "repeats", share_text((inspection.num_exact + inspection.num_near) / max(1, rows))


def _lengths(histogram: Histogram | None) -> str:
    if histogram is None:
        return ""
    columns = [Columns("kept", histogram.kept), Columns("left out", histogram.lost, "fail")]
    limit = f"data.max_length {histogram.limit:,}"
    chart = column_chart(
        histogram.edges, columns, title="Rows by length", x_label="tokens", y_label="rows",
        marker=(histogram.limit, limit),
    )  # fmt: skip
    table = _counts({_NAMES.get(name, name): value for name, value in histogram.percentiles.items()}, "Tokens a row")
    return f'<div class="charts">{chart}<div>{table}</div></div>'


def _rows(inspection: Inspection, folder: str) -> str:
    if not inspection.rows:
        return "<p>No row is trained on.</p>"
    shown, total = len(inspection.rows), inspection.num_rows
    said = f"All {total:,} rows." if shown == total else f"{shown:,} of {total:,} rows, spread evenly over the file."
    key = (
        f'<p class="key"><span>{said}</span><span><span class="t y">trained</span></span>'
        '<span><span class="t">not trained</span></span><span><span class="t s">control token</span></span>'
        '<span><span class="t s y">trained control token</span></span>'
        "<span>↵ newline, ⇥ tab, · part of a character; a token's id shows under the pointer</span></p>"
    )
    return key + "".join(_row(row, folder) for row in inspection.rows)


def _row(row: ShownRow, folder: str) -> str:
    notes = "".join(f'<span class="note">{escape(note.replace(folder, ""))}</span>' for note in row.notes)
    left = row.num_tokens - len(row.tokens)
    rest = f"\n<i>… {left:,} more tokens</i>" if left else ""
    share = share_text(row.num_trained / max(1, row.num_tokens))
    return (
        f'<div class="row"><p><b>{escape(row.source.removeprefix(folder))}</b><span>{row.num_tokens:,} tokens</span>'
        f"<span>{row.num_trained:,} trained ({share})</span>{notes}</p>"
        f'<div class="tokens">{"".join(map(_token, row.tokens))}{rest}</div></div>'
    )


def _token(token: ShownToken) -> str:
    kind = "t" + " y" * token.is_trained + " s" * token.is_special
    text = escape(token.text).translate(_SPACES) if token.text else "<i>·</i>"
    return f'<span class="{kind}" data-id="{token.id}">{text}</span>'


def _left_out(inspection: Inspection, folder: str) -> str:
    if not inspection.left_out:
        return "<p>Every row is trained on.</p>"
    parts = []
    for each in inspection.left_out:
        rows = "".join(f"<li><code>{escape(example.removeprefix(folder))}</code></li>" for example in each.examples)
        more = each.count - len(each.examples)
        rest = f"<li>and {more:,} more</li>" if more > 0 else ""
        parts.append(
            f"<details open><summary>{escape(each.reason.capitalize())}: {_num_rows(each.count)}</summary>"
            f'<ul class="plain">{rows}{rest}</ul></details>'
        )
    return "".join(parts)


def _repeats(inspection: Inspection, folder: str) -> str:
    total = inspection.num_exact + inspection.num_near
    if not total:
        return "<p>No row repeats another.</p>"
    rows = "".join(
        f'<tr><td data-label="Row"><code>{escape(each.source.removeprefix(folder))}</code></td>'
        f'<td data-label="Repeats"><code>{escape(each.first.removeprefix(folder))}</code></td>'
        f'<td data-label="Likeness" class="num">{"exact" if each.similarity >= 1 else f"{each.similarity:.2f}"}</td>'
        f'<td data-label="Text">{escape(each.excerpt)}</td></tr>'
        for each in inspection.repeats
    )
    more = total - len(inspection.repeats)
    rest = f"<p>and {more:,} more</p>" if more > 0 else ""
    head = "<tr><th scope=col>Row</th><th scope=col>Repeats</th><th scope=col>Likeness</th><th scope=col>Text</th></tr>"
    return (
        f"<p>Rows that repeat an earlier one: {inspection.num_exact:,}; that nearly do: {inspection.num_near:,}.</p>"
        f'<table class="checks repeats"><thead>{head}</thead><tbody>{rows}</tbody></table>{rest}'
    )


def _statistics(statistics: Mapping[str, Any]) -> str:
    tables = [
        _counts(statistics["formats"], "Rows by format"),
        _counts(statistics["kinds"], "Rows by kind"),
        _counts(statistics["roles"], "Turns by role"),
        _counts(statistics["code_languages"], "Code by language (fences)"),
        _counts(statistics["labels"], "Rows by label"),
        _counts(statistics["ignored_fields"], "Fields not read, by rows"),
    ]
    spreads = {
        "turns a row": statistics["turns"],
        "characters a row": statistics["characters"],
        "words a row": statistics["words"],
        "characters of answers a row": statistics["answer_characters"],
    }
    medians = {name: spread["percentiles"]["p50"] for name, spread in spreads.items()}
    return f'<div class="columns">{_counts(medians, "Medians")}{"".join(tables)}</div>'


def _facts(facts: Mapping[str, Any]) -> str:
    shown = {
        "Template": facts["template"],
        "Trained on": facts["train_on"],
        "Longest row": f"{facts['max_length']:,} tokens",
        "Files": f"{facts['files']:,}, {facts['bytes']:,} bytes",
        "Byte order marks": ", ".join(f"{name} in {count:,}" for name, count in facts["byte_order_marks"].items()),
        "Line endings": ", ".join(f"{name} in {count:,}" for name, count in facts["line_endings"].items()),
        "Files not read": ", ".join(f"{count:,} {reason}" for reason, count in facts["skipped_files"].items()),
    }
    rows = "".join(
        f"<tr><th scope=row>{name}</th><td>{escape(value or MISSING)}</td></tr>" for name, value in shown.items()
    )
    return f'<table class="facts">{rows}</table>'


def _counts(counts: Mapping[str, float], title: str) -> str:
    if not counts:
        return ""
    first = list(counts.items())[:MAX_COUNTS]
    rows = "".join(f'<tr><td>{escape(name)}</td><td class="num">{value:,.0f}</td></tr>' for name, value in first)
    if more := len(counts) - len(first):
        rows += f'<tr><td>and {more:,} more</td><td class="num"></td></tr>'
    return f'<div><h3>{escape(title)}</h3><table class="narrow"><tbody>{rows}</tbody></table></div>'


def _num_rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n" if body else ""
