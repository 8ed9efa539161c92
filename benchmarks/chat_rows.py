"""The chat set every peer trains on: made here, the same for the same seed, already tokens.

Lengths are log-normal (median 140 tokens, most between 40 and 600), as chat logs are; the text is plain English built
from a small grammar. Each peer gets the same ids and the same labels, so tokenisers and masks cannot differ.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_foundry.rendering import Renderer
from model_foundry.types import Message

MEDIAN_TOKENS, SIGMA, SHORTEST, LONGEST = 140, 0.75, 40, 600
IGNORED = -100

SUBJECTS = ("the gardener", "a careful baker", "my neighbour", "the old engine", "our team", "the night train")
VERBS = ("keeps", "repairs", "measures", "remembers", "explains", "carries", "compares", "forgets")
OBJECTS = ("seven copper kettles", "the winter timetable", "a list of names", "two maps", "a letter", "the salt")
ENDINGS = ("before noon", "without a word", "for the harbour", "when it rains", "twice a week", "at low tide")
QUESTIONS = ("What happens next", "Can you say more", "Why does that matter", "How would you put it")


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One rendered conversation; `labels` repeats `input_ids` where the loss is due and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_trained_tokens(self) -> int:
        """Targets that a causal model can be asked for: the first token has none before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def make_rows(renderer: Renderer, *, num_rows: int, seed: int) -> list[ChatRow]:
    generator = random.Random(seed)
    return [_row(renderer, generator) for _ in range(num_rows)]


def fixed_rows(renderer: Renderer, *, num_rows: int, num_tokens: int, seed: int) -> list[ChatRow]:
    """Rows of exactly `num_tokens` tokens each, for memory: what is measured must not depend on padding."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        row = _conversation(renderer, generator, wanted=num_tokens + 32)
        rows.append(ChatRow(row.input_ids[:num_tokens], row.labels[:num_tokens]))
    return rows


def make_messages(renderer: Renderer, *, num_rows: int, seed: int) -> list[dict[str, Any]]:
    """The same kind of conversation before tokenisation, for tools that are timed from the file on."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        messages: list[Message] = []
        _conversation(renderer, generator, wanted=MEDIAN_TOKENS, messages=messages)
        rows.append({"messages": [message.as_dict() for message in messages]})
    return rows


def write_rows(path: Path, rows: list[ChatRow]) -> None:
    text = "".join(json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def read_rows(path: str) -> list[ChatRow]:
    records: list[dict[str, Any]] = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [ChatRow(record["input_ids"], record["labels"]) for record in records]


def _row(renderer: Renderer, generator: random.Random) -> ChatRow:
    wanted = generator.lognormvariate(math.log(MEDIAN_TOKENS), SIGMA)
    return _conversation(renderer, generator, wanted=round(min(max(wanted, SHORTEST), LONGEST)))


def _conversation(
    renderer: Renderer, generator: random.Random, *, wanted: int, messages: list[Message] | None = None
) -> ChatRow:
    """Adds turns and sentences to `messages` until the row holds at least `wanted` tokens."""
    messages = [] if messages is None else messages
    messages += [Message("user", generator.choice(QUESTIONS) + "?"), Message("assistant", _sentence(generator))]
    while True:
        rendered = renderer.render(messages)
        num_missing = wanted - len(rendered.tokens)
        if num_missing <= 0:
            ids, weights = rendered.tokens.tolist(), rendered.weights.tolist()
            return ChatRow(ids, [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)])
        num_sentences = max(1, num_missing // 16)
        if len(messages[-1].content) > 400:
            messages += [Message("user", generator.choice(QUESTIONS) + "?"), Message("assistant", _sentence(generator))]
        else:
            more = " ".join(_sentence(generator) for _ in range(min(num_sentences, 6)))
            messages[-1] = Message("assistant", f"{messages[-1].content} {more}")


def _sentence(generator: random.Random) -> str:
    words = (generator.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ENDINGS))
    return " ".join(words).capitalize() + "."
