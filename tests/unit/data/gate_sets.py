"""Sets of rows made for the gate: clean ones of every format, and the means to spoil them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from model_foundry.data.gate.judge import judge, make_subject
from model_foundry.data.gate.reading import read_attentively
from model_foundry.data.gate.subject import HeldOut
from model_foundry.data.gate.verdict import GatePolicy, GateReport
from model_foundry.data.rows import read_rows
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

_WORDS = """
    amber anchor basket beacon bramble candle cedar cobalt comet copper coral cricket dagger dahlia ember falcon fern
    flint garnet glacier hazel heron indigo ivory jasper juniper kelp lantern lichen linen lotus magnet maple marble
    meadow nectar nickel oak opal orchid otter pebble pepper pine plum quartz raven reed saffron sage slate sparrow
    spruce tallow thistle thyme topaz tulip umber velvet walnut willow wren yarrow zephyr
"""

TAIL = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}" + TAIL
)


def sentence(number: int, num_words: int = 9) -> str:
    """Words that no other number gives."""
    return " ".join(random.Random(number).choices(_WORDS.split(), k=num_words))


def conversation(number: int, *, turns: int = 1, system: str | None = None) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in range(turns):
        asked, answered = sentence(1000 * turn + 2 * number), sentence(1000 * turn + 2 * number + 1)
        messages += [{"role": "user", "content": f"{asked}?"}, {"role": "assistant", "content": f"The {answered}."}]
    return {"messages": messages}


def conversations(count: int = 30, *, turns: int = 1) -> list[dict[str, Any]]:
    return [conversation(number, turns=turns) for number in range(count)]


def write_rows(path: Path, rows: list[Any] | bytes) -> Path:
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Gate:
    """The gate with one tokenizer, in a folder of its own."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer

    def renderer(self, template: str | None = None) -> Renderer:
        if template is None or template == "alpaca":
            return Renderer(self.tokenizer, template or "auto")
        path = self.folder / "template.jinja"
        path.write_text(template, encoding="utf-8")
        return Renderer(self.tokenizer, str(path))

    def judge(
        self,
        rows: list[Any] | bytes,
        *,
        template: str | None = None,
        validation: list[Any] | None = None,
        evaluation: list[Any] | None = None,
        policy: GatePolicy | None = None,
        max_length: int = 2048,
        **options: Any,
    ) -> GateReport:
        reading = read_attentively(write_rows(self.folder / "rows.jsonl", rows))
        held_out = [
            HeldOut(name, f"{name}.jsonl", read_rows(write_rows(self.folder / f"{name}.jsonl", each)).rows, by_question)
            for name, each, by_question in (("validation", validation, False), ("evaluation", evaluation, True))
            if each is not None
        ]
        subject = make_subject(
            reading, self.renderer(template), policy=policy, held_out=tuple(held_out), max_length=max_length, **options
        )
        return judge(subject)


def names(report: GateReport) -> list[str]:
    """The checks that failed."""
    return [check.name for check in report.failed]
