"""Charts as inline SVG: lines over steps, and stacked bars. Text in, text out, no files, no scripts.

Colours are CSS variables (`--series-1` …) of the page around them, so that a chart follows light and dark. Every chart
has a title and a description for those who do not see it, and every text is escaped.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 520, 290
LEFT, RIGHT, TOP, BOTTOM = 70, 22, 14, 46
MAX_POINTS = 600
NUM_COLOURS = 8
_UNSHOWABLE = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True)
class Series:
    """One line: finite (x, y) pairs in the order of x. `is_faint` draws it thin behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    is_faint: bool = False
    has_dots: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One stacked bar: a label and its (name, value) parts from left to right."""

    label: str
    parts: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Columns:
    """One kind of a histogram's columns: what it counts, and the name of its colour (`series-1`, `fail`)."""

    name: str
    counts: Sequence[int]
    colour: str = "series-1"


def escape(text: Any) -> str:
    """Safe as element text and inside quoted attributes; what no page may hold is shown as U+FFFD."""
    return html.escape(_UNSHOWABLE.sub("\ufffd", str(text)), quote=True)


def line_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str, is_log: bool = False) -> str:
    """An SVG with axes, ticks, a legend and, for readers of the page's text, what it shows.

    Args:
        is_log: a logarithmic y axis; falls back to a linear one, and says so on the axis, when a value is not positive.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return f'<p class="empty">{escape(title)}: nothing was recorded.</p>'
    values = [y for one in drawn for _, y in one.points]
    if is_log and min(values) <= 0:
        is_log, y_label = False, f"{y_label} (linear: not all positive)"
    if is_log:
        y_label = f"{y_label}, log scale"
    x_axis = _Axis.linear([x for one in drawn for x, _ in one.points], pixels=(LEFT, WIDTH - RIGHT), is_integer=True)
    make = _Axis.logarithmic if is_log else _Axis.linear
    y_axis = make(values, pixels=(HEIGHT - BOTTOM, TOP))
    body = [*_grid(x_axis, y_axis), *_labels(x_label, y_label), *(_line(one, x_axis, y_axis) for one in drawn)]
    legend = [(one.name, one.colour, one.is_faint) for one in drawn] if len(drawn) > 1 else []
    return _figure(title, _description(title, drawn), body, HEIGHT, legend=legend)


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str, scale: float = 1.0) -> str:
    """Stacked horizontal bars on one axis; the values are divided by `scale` for the axis."""
    drawn = [bar for bar in bars if bar.parts]
    if not drawn:
        return f'<p class="empty">{escape(title)}: nothing was recorded.</p>'
    longest = max(sum(value for _, value in bar.parts) for bar in drawn)
    height = TOP + BOTTOM + 46 * len(drawn)
    axis = _Axis.linear([0.0, longest / scale], pixels=(LEFT + 56, WIDTH - RIGHT))
    colours = {name: index % NUM_COLOURS + 1 for index, name in enumerate(_part_names(drawn))}
    body = [_tick(axis.place(tick), None, axis.text(tick), bottom=height - BOTTOM) for tick in axis.ticks]
    body.append(_text(WIDTH / 2, height - 8, x_label, "middle", "label"))
    for row, bar in enumerate(drawn):
        y = TOP + 46 * row + 8
        body.append(_text(LEFT + 48, y + 19, bar.label, "end", "label"))
        start = 0.0
        for name, value in bar.parts:
            x0, x1 = axis.place(start / scale), axis.place((start + value) / scale)
            fill = f'fill="var(--series-{colours[name]})"'
            tip = f"<title>{escape(f'{bar.label}, {name}: {value / scale:,.1f}')}</title>"
            body.append(f'<rect x="{x0:.1f}" y="{y}" width="{max(0.0, x1 - x0):.1f}" height="30" {fill}>{tip}</rect>')
            start += value
    parts = "; ".join(
        f"{bar.label}: " + ", ".join(f"{name} {value / scale:,.1f}" for name, value in bar.parts) for bar in drawn
    )
    return _figure(
        title, f"{title}. {x_label}. {parts}.", body, height, legend=[(*each, False) for each in colours.items()]
    )


def column_chart(
    edges: Sequence[int],
    columns: Sequence[Columns],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marker: tuple[float, str] | None = None,
) -> str:
    """A histogram: stacked columns between ascending `edges`, one fewer than those; the last holds all that is higher.

    Args:
        marker: a place on the x axis to draw a line at, and what to call it.
    """
    drawn = [column for column in columns if any(column.counts)]
    if not drawn:
        return f'<p class="empty">{escape(title)}: nothing was recorded.</p>'
    x_axis = _Axis.linear([edges[0], edges[-1]], pixels=(LEFT, WIDTH - RIGHT), is_integer=True)
    totals = [sum(column.counts[index] for column in drawn) for index in range(len(edges) - 1)]
    y_axis = _Axis.linear([0, max(totals)], pixels=(HEIGHT - BOTTOM, TOP))
    body = [_tick(None, y_axis.place(tick), y_axis.text(tick)) for tick in y_axis.ticks if tick == int(tick)]
    bottom = HEIGHT - BOTTOM
    body += [_text(x_axis.place(tick), bottom + 17, x_axis.text(tick), "middle", "tick") for tick in x_axis.ticks]
    for index in range(len(totals)):
        body += _stack(drawn, index, edges, x_axis, y_axis, unit=x_label)
    if marker is not None and edges[0] <= marker[0] <= edges[-1]:
        x = x_axis.place(marker[0])
        anchor, shift = ("end", -6) if x > WIDTH * 0.6 else ("start", 6)
        body.append(f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        body.append(_text(x + shift, TOP + 12, marker[1], anchor, "label"))
    body += _labels(x_label, y_label)
    said = "; ".join(f"{column.name}: {sum(column.counts):,}" for column in drawn)
    keys = "".join(f'<span><i style="background:var(--{one.colour})"></i>{escape(one.name)}</span>' for one in drawn)
    return _framed(title, f"{title}. {said}.", body, HEIGHT, keys=keys if len(drawn) > 1 else "")


def _stack(
    columns: Sequence[Columns], index: int, edges: Sequence[int], x_axis: _Axis, y_axis: _Axis, *, unit: str
) -> list[str]:
    """One column of a histogram, its parts on top of each other."""
    left, right = edges[index], edges[index + 1]
    x0, x1 = x_axis.place(left), x_axis.place(right)
    span = f"{left:,} and more" if index == len(edges) - 2 else f"{left:,} to {right - 1:,}"
    parts, low = [], 0
    for column in columns:
        count = column.counts[index]
        if count:
            top, bottom = y_axis.place(low + count), y_axis.place(low)
            tip = f"<title>{escape(f'{span} {unit}, {column.name}: {count:,}')}</title>"
            parts.append(
                f'<rect x="{x0 + 0.5:.1f}" y="{top:.1f}" width="{max(1.0, x1 - x0 - 1):.1f}" '
                f'height="{max(1.0, bottom - top):.1f}" fill="var(--{column.colour})">{tip}</rect>'
            )
            low += count
    return parts


def smoothed(points: Sequence[tuple[float, float]], *, share: float = 0.05) -> list[tuple[float, float]]:
    """Moving mean over about `share` of the points around each, fewer at both ends; [] for fewer than 8 points."""
    if len(points) < 8:
        return []
    reach = max(1, round(len(points) * share / 2))
    result = []
    for index, (x, _) in enumerate(points):
        window = points[max(0, index - reach) : index + reach + 1]
        result.append((x, sum(y for _, y in window) / len(window)))
    return result


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to pixels, and round ticks."""

    low: float
    high: float
    pixels: tuple[float, float]
    ticks: tuple[float, ...]
    is_log: bool = False

    @classmethod
    def linear(cls, values: Sequence[float], *, pixels: tuple[float, float], is_integer: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if not is_integer and 0 < low < high * 0.5:
            low = 0.0
        if low == high:
            pad = abs(low) * 0.5 or 1.0
            low, high = (low, high + 1) if is_integer else (low - pad, high + pad)
        step = _round_step((high - low) / 5)
        if is_integer:
            step = max(1.0, math.ceil(step))
            first = math.ceil(low / step)
            last = math.floor(high / step)
        else:
            first, last = math.floor(low / step), math.ceil(high / step)
            low, high = first * step, last * step
        return cls(low, high, pixels, tuple(index * step for index in range(first, last + 1)))

    @classmethod
    def logarithmic(cls, values: Sequence[float], *, pixels: tuple[float, float]) -> _Axis:
        low, high = min(values), max(values)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        grids = [
            [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
            for factors in ((1, 2, 5), (1, 3), (1,))
        ]
        grid = next((each for each in grids if sum(low <= tick <= high for tick in each) <= 6), grids[-1])
        below = [tick for tick in grid if tick <= low]
        above = [tick for tick in grid if tick >= high]
        low, high = (below[-1] if below else low), (above[0] if above else high)
        if low == high:
            high = low * 10
        ticks = [tick for tick in grid if low <= tick <= high]
        every = math.ceil(len(ticks) / 9)
        return cls(low, high, pixels, tuple(ticks[::every]), is_log=True)

    def place(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        share = ((math.log10(value) if self.is_log else value) - low) / (high - low)
        return self.pixels[0] + share * (self.pixels[1] - self.pixels[0])

    def text(self, tick: float) -> str:
        largest = max(abs(value) for value in self.ticks)
        if tick == 0:
            return "0"
        if largest < 1e-2 or largest >= 1e6 or (self.is_log and tick < 1e-3):
            digits, _, power = f"{tick:.1e}".partition("e")
            return f"{digits.removesuffix('.0')}e{int(power)}"
        return f"{tick:,.10g}" if self.is_log else f"{round(tick, 9):,.6g}"


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 or 10 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most about MAX_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS / 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        low, high = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted({low, high})
    return sorted({points[0], *kept, points[-1]})


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    rows = [_tick(None, y_axis.place(tick), y_axis.text(tick)) for tick in y_axis.ticks]
    return rows + [_tick(x_axis.place(tick), None, x_axis.text(tick)) for tick in x_axis.ticks]


def _tick(x: float | None, y: float | None, text: str, *, bottom: float = HEIGHT - BOTTOM) -> str:
    if y is not None:
        line = f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        return line + _text(LEFT - 8, y + 4, text, "end", "tick")
    x = 0.0 if x is None else x
    line = f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}"/>'
    return line + _text(x, bottom + 17, text, "middle", "tick")


def _labels(x_label: str, y_label: str) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
    return [
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", "label"),
        f"{turned}{escape(y_label)}</text>",
    ]


def _line(one: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in _thinned(one.points)]
    colour = f"var(--series-{one.colour})"
    shape = f"<title>{escape(one.name)}</title>"
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        kind = "faint" if one.is_faint else "line"
        shape += f'<polyline class="{kind}" stroke="{colour}" points="{path}"/>'
    if one.has_dots or len(places) == 1:
        shape += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places)
    return f"<g>{shape}</g>"


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _description(title: str, series: Sequence[Series]) -> str:
    lines = []
    for one in series:
        (x0, y0), (x1, y1) = one.points[0], one.points[-1]
        lines.append(f"{one.name}: from {y0:.4g} at {x0:g} to {y1:.4g} at {x1:g}")
    return f"{title}. {'; '.join(lines)}."


def _figure(
    title: str, description: str, body: Sequence[str], height: float, *, legend: list[tuple[str, int, bool]]
) -> str:
    """The legend: names, colours, and whether the line is faint."""
    keys = "".join(
        f'<span><i class="{"faint" if is_faint else "line"}" style="background:var(--series-{colour})"></i>'
        f"{escape(name)}</span>"
        for name, colour, is_faint in legend
    )
    return _framed(title, description, body, height, keys=keys)


def _framed(title: str, description: str, body: Sequence[str], height: float, *, keys: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg></figure>"
    )


def _part_names(bars: Sequence[Bar]) -> list[str]:
    return list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
