"""What pretraining adds to the report: bits per byte beside simpler ways, and what the model wrote on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model_foundry.run.charts import Bar, Series, bar_chart, escape, line_chart
from model_foundry.run.figures import bytes_text

_ABOUT = (
    "What the held-out text costs when each way foretells it. gzip and xz see that text alone and have learned nothing "
    "before; the model has, and its own size is not counted."
)


def held_out_text(text: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """A chart of bits per byte, their course over the run, and the samples of each measurement."""
    parts = []
    if bits := text.get("bits_per_byte"):
        bars = [Bar(f"{name} {value:.3f}", [("bits a byte", value)]) for name, value in bits.items()]
        size = f" {bytes_text(text['bytes'])} of text." if "bytes" in text else ""
        charts = bar_chart(bars, title="Bits a byte of held-out text", x_label="bits a byte") + _course(records)
        parts.append(f'<p>{escape(_ABOUT + size)}</p><div class="charts">{charts}</div>')
    samples = [record for record in records if record.get("kind") == "sample"]
    if samples:
        parts.append(_samples(samples))
    return "".join(parts)


def _course(records: Sequence[Mapping[str, Any]]) -> str:
    points = [(each["step"], each["bits_per_byte"]) for each in records if each.get("bits_per_byte") is not None]
    if len(points) < 2:
        return ""
    series = [Series("held-out text", points, colour=3, has_dots=True)]
    return line_chart(series, title="Bits a byte while training", x_label="step", y_label="bits a byte")


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last samples open, those between them folded."""
    steps = sorted({sample["step"] for sample in samples})
    blocks = []
    for step in steps:
        lines = "".join(
            f"<li><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</li>"
            for sample in samples
            if sample["step"] == step
        )
        is_open = " open" if step in (steps[0], steps[-1]) else ""
        blocks.append(f"<details{is_open}><summary>Written after step {step}</summary><ul>{lines}</ul></details>")
    return "".join(blocks)
