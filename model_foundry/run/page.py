"""report.html: one page that needs no network, no script and no second file.

Takes the report's dict and the metric records and returns HTML. Every text that came from outside goes through
`escape`. Knows nothing of files or of how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from model_foundry.run.charts import Bar, Series, bar_chart, escape, line_chart, smoothed
from model_foundry.run.figures import (
    SHIPPING,
    bytes_text,
    check_value,
    duration_text,
    flattened,
    label,
    share_text,
    value_text,
)
from model_foundry.run.page_preference import preference_charts
from model_foundry.run.page_style import STYLE
from model_foundry.run.page_text import held_out_text

NUM_OPEN_CASES = 12
MAX_CASES_PER_GROUP = 500
_MIB = 2**20
_VERDICTS = {
    "passed": ("pass", "Passed", "every check held"),
    "failed": ("fail", "Failed", "not every check held"),
    "unchecked": ("none", "Not checked", "no criterion was asked for"),
}
_GROUPS = (
    ("worse", "Got worse", "worse by score"),
    ("same", "Unchanged", "same score"),
    ("improved", "Improved", "better by score"),
)
_PLACED_MEMORY = ("parts", "predicted_bytes", "measured_bytes", "lora_bytes", "full_bytes")


def render_page(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        report: as `Report.as_dict()`.
        records: metrics.jsonl.
    """
    sections = [
        _section("Checks", _checks(report["checks"])),
        _section("Before and after", _evaluation(report["evaluation"])),
        _section("Held-out text", held_out_text(report.get("text") or {}, records)),
        _section("Training", _training(records, report["training"])),
        _section("Memory", _memory(report["memory"])),
        _section("Data gate", gate_table(report["gate"])),
        _section("Data", _data(report["data"])),
        _section("Run it again", _reproduce(report["reproduce"])),
        _section("Machine", _facts(report["machine"])),
    ]
    title = f"{_VERDICTS[report['verdict']][1]}: {report['run_id']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # A page that can load nothing cannot leak anything either, whatever the texts in it hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        f"{_header(report)}\n{''.join(sections)}"
        "<footer>Written by Model Foundry from report.json and metrics.jsonl; "
        "<code>foundry report</code> writes it again.</footer>\n</main></body></html>\n"
    )


def _header(report: Mapping[str, Any]) -> str:
    kind, word, meaning = _VERDICTS[report["verdict"]]
    checks = report["checks"]
    num_passed = sum(check["passed"] for check in checks)
    count = f"{num_passed} of {len(checks)} checks passed: {SHIPPING[report['verdict']]}" if checks else meaning
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in _tiles(report)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return (
        f'<header class="{kind}"><p class="run">{escape(report["run_id"])}</p>'
        f"<h1>{word}<small>{escape(count)}</small></h1></header>"
        f'<div class="tiles">{tiles}</div>{f"<ul class=notes>{notes}</ul>" if notes else ""}'
    )


def _tiles(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The few numbers that a reader looks for first."""
    evaluation, training, memory = report["evaluation"], report["training"], report["memory"]
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    if "exact" in before and "exact" in after:
        yield "exact answers", f"{share_text(before['exact'])} → {share_text(after['exact'])}"
    bits = ((report.get("text") or {}).get("bits_per_byte") or {}).get("this model")
    if _is_number(bits):
        yield "bits a byte, held out", f"{bits:.3f}"
    if _is_number(training.get("first_loss")) and _is_number(training.get("last_loss")):
        yield "training loss", f"{training['first_loss']:.3g} → {training['last_loss']:.3g}"
    if _is_number(training.get("seconds")):
        yield "training time", duration_text(training["seconds"])
    if _is_number(training.get("tokens_per_second")):
        yield "tokens a second", f"{training['tokens_per_second']:,.0f}"
    if _is_number(memory.get("measured_bytes")):
        yield "peak memory", bytes_text(memory["measured_bytes"])


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    rows = "".join(
        f'<tr><td data-label="Check"><span class="badge {"pass" if check["passed"] else "fail"}">'
        f"{'pass' if check['passed'] else 'FAIL'}</span> {escape(label(check['name']))}</td>"
        f'<td data-label="Value" class="num">{escape(check_value(check["value"], check["bound"]))}</td>'
        f'<td data-label="Bound">{_prose(check["bound"])}</td>'
        f'<td data-label="Evidence">{_prose(check["evidence"])}</td></tr>'
        for check in checks
    )
    return _table(("Check", "Value", "Bound", "Evidence"), rows, kind="checks")


def gate_table(gate: Mapping[str, Any]) -> str:
    """The checks of the data gate, each with the rows that it found; those that failed come first."""
    checks = gate.get("checks") or []
    if not checks:
        return ""
    failed = [check for check in checks if not check["passed"]]
    passed = [check for check in checks if check["passed"]]
    said = f"{len(failed)} of {len(checks)} checks failed."
    if gate.get("action") == "warn":
        said += " The rows were trained on all the same, as gate.action=warn asks."
    found = f"<p>{_prose(said)}</p>{_gate_rows(failed)}" if failed else ""
    if not passed:
        return found
    count = f"All {len(checks)}" if not failed else f"The other {len(passed)}"
    return f"{found}<details><summary>{count} checks passed</summary>{_gate_rows(passed)}</details>"


def _gate_rows(checks: Sequence[Mapping[str, Any]]) -> str:
    return _table(("Check", "Value", "Bound", "Evidence"), "".join(map(_gate_row, checks)), kind="checks gate")


def _gate_row(check: Mapping[str, Any]) -> str:
    examples = "".join(
        f"<li><code>{escape(example['where'])}</code> {escape(example['problem'])}"
        + (f" <q>{escape(example['excerpt'])}</q></li>" if example.get("excerpt") else "</li>")
        for example in check.get("examples") or ()
    )
    found = f'<ul class="examples">{examples}</ul>' if examples else ""
    return (
        f'<tr><td data-label="Check"><span class="badge {"pass" if check["passed"] else "fail"}">'
        f"{'pass' if check['passed'] else 'FAIL'}</span> {escape(label(check['name']))}</td>"
        f'<td data-label="Value" class="num">{escape(check_value(check["value"], check["bound"]))}</td>'
        f'<td data-label="Bound">{_prose(check["bound"])}</td>'
        f'<td data-label="Evidence">{_prose(check["evidence"])}{found}</td></tr>'
    )


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    cases = evaluation.get("cases") or []
    if not cases:
        return ""
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    scores = "".join(
        f'<tr><td data-label="Score">{escape(label(name))}</td>'
        f'<td data-label="Before" class="num">{share_text(before[name])}</td>'
        f'<td data-label="After" class="num">{share_text(after[name])}</td></tr>'
        for name in before
        if name in after
    )
    groups = "".join(
        _case_group(title, meaning, [case for case in cases if case["change"] == change], total=len(cases))
        for change, title, meaning in _GROUPS
    )
    return (
        _change_bar(cases)
        + _table(("Mean score", "Before", "After"), scores, kind="narrow")
        + _noise(evaluation)
        + groups
    )


def _change_bar(cases: Sequence[Mapping[str, Any]]) -> str:
    counts = {change: sum(case["change"] == change for case in cases) for change in ("improved", "same", "worse")}
    parts = "".join(
        f'<i class="{change}" style="flex-grow:{count}"></i>' for change, count in counts.items() if count > 0
    )
    words = ", ".join(f"{count} {change}" for change, count in counts.items())
    return f'<div class="changes" role="img" aria-label="{words}">{parts}</div><p>{len(cases)} questions: {words}.</p>'


def _noise(evaluation: Mapping[str, Any]) -> str:
    noise, interval = evaluation.get("noise"), evaluation.get("interval")
    if not noise or not interval:
        return ""
    parts = ", ".join(f"{label(str(name))} {share_text(share)}" for name, share in noise.items())
    text = (
        f"Improved: {share_text(evaluation['improved'])} (95 % interval {share_text(interval[0])} to "
        f"{share_text(interval[1])}). Noise floor, the share that luck alone would improve: "
        f"{share_text(evaluation['noise_floor'])} ({parts}). Verdict: {evaluation['verdict']}."
    )
    return f"<p>{_prose(text)}</p>"


def _case_group(title: str, meaning: str, cases: Sequence[Mapping[str, Any]], *, total: int) -> str:
    if not cases:
        return ""
    shown = cases[:MAX_CASES_PER_GROUP]
    left = len(cases) - len(shown)
    first, others = shown[:NUM_OPEN_CASES], shown[NUM_OPEN_CASES:]
    more = f"<details><summary>{len(others):,} more</summary>{_case_table(others)}</details>" if others else ""
    rest = f"<p>{left:,} more are in report.json.</p>" if left else ""
    return (
        f"<details open><summary>{title}: {len(cases)} of {total} <small>({meaning})</small></summary>"
        f"{_case_table(first)}{more}{rest}</details>"
    )


def _case_table(cases: Sequence[Mapping[str, Any]]) -> str:
    return _table(("Question", "Expected", "Before", "After"), "".join(map(_case, cases)), kind="cases")


def _case(case: Mapping[str, Any]) -> str:
    marks = [_mark(case.get(f"{side}_scores") or {}) for side in ("before", "after")]
    return (
        f'<tr class="{escape(case["change"])}"><td data-label="Question" dir="auto">{escape(case["prompt"])}</td>'
        f'<td data-label="Expected" dir="auto">{escape(case["expected"])}</td>'
        f'<td data-label="Before" dir="auto">{marks[0]}{escape(case["before"])}</td>'
        f'<td data-label="After" dir="auto">{marks[1]}{escape(case["after"])}</td></tr>'
    )


def _mark(scores: Mapping[str, float]) -> str:
    if scores.get("exact") == 1:
        return '<span class="mark good" title="exact">✓</span> '
    f1 = scores.get("f1")
    return f'<span class="mark" title="word F1">{f1:.2f}</span> ' if f1 is not None else ""


def _training(records: Sequence[Mapping[str, Any]], training: Mapping[str, Any]) -> str:
    steps = [record for record in records if record.get("kind") == "step"]
    validation = _points([record for record in records if record.get("kind") == "validation"], "loss")
    if not steps:
        return _facts(training)
    loss = _points(steps, "loss")
    curve = smoothed(loss)
    raw = Series("training", loss, colour=1, is_faint=bool(curve))
    losses = [
        raw,
        Series("training, smoothed", curve, colour=2),
        Series("validation", validation, colour=3, has_dots=True),
    ]
    charts = [
        line_chart(losses, title="Loss", x_label="step", y_label=_unit(training), is_log=_spans_decades(loss)),
        *preference_charts(records),
        _curve(steps, "learning_rate", title="Learning rate", y_label="learning rate"),
        _curve(steps, "grad_norm", title="Gradient norm before clipping", y_label="L2 norm"),
    ]
    skipped = [record for record in steps if record.get("skipped")]
    note = f"<p>{len(skipped)} steps were skipped: their gradients were not finite.</p>" if skipped else ""
    return f'<div class="charts">{"".join(charts)}<div>{_facts(training)}{note}</div></div>'


def _unit(training: Mapping[str, Any]) -> str:
    """Of the loss."""
    return "loss of a pair" if training.get("method") == "dpo" else "nats a token"


def _curve(steps: Sequence[Mapping[str, Any]], name: str, *, title: str, y_label: str) -> str:
    points = _points(steps, name)
    is_log = name == "grad_norm" and _spans_decades(points)
    return line_chart([Series(title.lower(), points)], title=title, x_label="step", y_label=y_label, is_log=is_log)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if _is_number(record.get(name))]


def _spans_decades(points: Sequence[tuple[float, float]]) -> bool:
    values = [y for _, y in points if y > 0]
    return len(values) == len(points) > 0 and max(values) > 30 * min(values)


def _memory(memory: Mapping[str, Any]) -> str:
    if not memory:
        return ""
    bars = [Bar("predicted", list((memory.get("parts") or {}).items()))]
    for name, key in (("measured", "measured_bytes"), ("LoRA", "lora_bytes"), ("full", "full_bytes")):
        if _is_number(memory.get(key)):
            bars.append(Bar(name, [("measured peak", memory[key])]))
    chart = bar_chart(bars, title="Peak memory", x_label="MiB", scale=_MIB)
    parts = "".join(
        f'<tr><td data-label="Part">{escape(label(str(name)))}</td>'
        f'<td data-label="Predicted" class="num">{bytes_text(size)}</td></tr>'
        for name, size in (memory.get("parts") or {}).items()
    )
    table = _table(("Part", "Predicted"), parts, kind="narrow") if parts else ""
    rest = {key: value for key, value in memory.items() if key not in _PLACED_MEMORY}
    return f'<div class="charts">{chart}<div>{_prediction(memory)}{table}{_facts(rest)}</div></div>'


def _prediction(memory: Mapping[str, Any]) -> str:
    predicted, measured = memory.get("predicted_bytes"), memory.get("measured_bytes")
    if not _is_number(predicted) or not _is_number(measured) or not measured:
        return ""
    error = predicted / measured - 1
    return f"<p>Predicted {bytes_text(predicted)}, measured {bytes_text(measured)}: off by {error * 100:+.0f} %.</p>"


def _data(data: Mapping[str, Any]) -> str:
    parts = [
        f"<h3>{escape(label(str(name)))}</h3>{_facts(facts)}"
        for name, facts in data.items()
        if isinstance(facts, Mapping)
    ]
    rest = {name: facts for name, facts in data.items() if not isinstance(facts, Mapping)}
    return "".join(parts) + _facts(rest)


def _reproduce(reproduce: Mapping[str, Any]) -> str:
    commands = reproduce.get("commands") or []
    block = f"<pre><code>{escape(chr(10).join(map(str, commands)))}</code></pre>" if commands else ""
    return block + _facts({key: value for key, value in reproduce.items() if key != "commands"})


def _facts(section: Mapping[str, Any]) -> str:
    rows = []
    for words, name, value in flattened(section):
        kind = ' class="mono"' if isinstance(value, str) and len(value) >= 32 and " " not in value else ""
        values = value if isinstance(value, list | tuple) else [value]
        text = "<br>".join(escape(value_text(each, name)) for each in values)
        rows.append(f"<tr><th scope=row>{escape(words)}</th><td{kind}>{text}</td></tr>")
    return f'<table class="facts">{"".join(rows)}</table>' if rows else ""


def _section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{title}</h2>{body}</section>\n" if body else ""


def _table(columns: Sequence[str], rows: str, *, kind: str) -> str:
    head = "".join(f"<th scope=col>{column}</th>" for column in columns)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _prose(text: str) -> str:
    """Escaped, and no line begins with a percent sign."""
    return escape(text).replace(" %", "\u00a0%")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
