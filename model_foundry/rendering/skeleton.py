"""What a template writes for one sequence of roles, with a gap for each content: a conversation is filled in.

Only for templates that provably never look into a content (`opaque.py`): then one rendering with marks in place of the
contents serves every conversation with these roles. Text and trained spans are those of the renderer. Where the spans
do not follow from the roles alone there is no skeleton, and the renderer is asked row by row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from model_foundry.errors import TemplateError, UnsafeTemplateError
from model_foundry.rendering.renderer import Renderer, Span, TrainOn, marked_spans
from model_foundry.types import Message

_FIRST_MARK = 0xF0000
MAX_SKELETONS = 4096
_MAX_MARKS = 4096
# White space that str.strip takes away and no template writes: a mark without it has been trimmed.
_PAD = "\u2003"
_MARK = re.compile(f"{_PAD}?[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _MAX_MARKS - 1)}]{_PAD}?")
_MAX_REPEATS = 4


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The text around the contents, and where training begins and ends.

    Attributes:
        parts: the text in order; empty where a content goes.
        slots: (place in `parts`, index of the message, whether it is trimmed).
        borders: (place in `parts`, characters into it): start and end of each trained span in turn.
    """

    parts: tuple[str, ...]
    slots: tuple[tuple[int, int, bool], ...]
    borders: tuple[tuple[int, int], ...]

    def fill(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation's text and its trained spans, in characters."""
        parts = list(self.parts)
        for place, index, is_trimmed in self.slots:
            content = messages[index].content
            parts[place] = content.strip() if is_trimmed else content
        starts = list(accumulate(map(len, parts), initial=0))
        places = [starts[place] + chars for place, chars in self.borders]
        return "".join(parts), list(zip(places[::2], places[1::2], strict=True))


def build_skeleton(renderer: Renderer, roles: Sequence[str], *, train_on: TrainOn) -> Skeleton | None:
    """The skeleton of conversations with these roles, whose template must be proved opaque; None where there is none.

    Raises:
        UnsafeTemplateError: the template does what it must not.
    """
    template = renderer.template_text
    if len(roles) > _MAX_MARKS or _PAD in template or _MARK.search(template):
        return None
    messages = [Message(role, f"{_PAD}{chr(_FIRST_MARK + index)}{_PAD}") for index, role in enumerate(roles)]
    try:
        text, spans = _rendered(renderer, messages, train_on)
    except UnsafeTemplateError:
        raise
    except (TemplateError, _HiddenTurnError):
        return None  # the renderer says of each row what is wrong
    return _split(text, [place for span in spans for place in span])


class _HiddenTurnError(Exception):
    pass


def _rendered(renderer: Renderer, messages: Sequence[Message], train_on: TrainOn) -> tuple[str, list[Span]]:
    row = renderer.prepare(messages, None)
    if row.escapes is not None:
        raise _HiddenTurnError
    marked = renderer.run(row, len(messages), False)
    full = renderer.unmarked(marked)
    if train_on == "all":
        return full, [(0, len(full))]
    if renderer.marks_generation:
        spans = marked_spans(marked)
        return full, spans[-1:] if train_on == "last_assistant" else spans
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    spans = []
    for index in turns[-1:] if train_on == "last_assistant" else turns:
        prefix = renderer.run(row, index, True)
        upto = full if index == len(messages) - 1 else renderer.run(row, index + 1, False)
        ended = upto.rstrip()
        # The renderer has more ways to find a turn; those depend on what the contents are.
        is_shown = full.startswith(prefix) and full.startswith(upto) and len(prefix) <= len(ended)
        if not is_shown or not ended.endswith(renderer.control_of("assistant").tokens):
            raise _HiddenTurnError
        spans.append((len(prefix), len(ended)))
    return full, spans


def _split(text: str, borders: list[int]) -> Skeleton | None:
    """The skeleton of a text with marks; None where a mark came out other than whole or trimmed."""
    parts: list[str] = []
    slots: list[tuple[int, int, bool]] = []
    starts: list[int] = []  # of each part, in the marked text
    place = 0
    for match in _MARK.finditer(text):
        mark = match.group()
        if len(mark) == 2:
            return None
        starts += [place, match.start()]
        parts += [text[place : match.start()], ""]
        slots.append((len(parts) - 1, ord(mark.strip(_PAD)) - _FIRST_MARK, len(mark) == 1))
        place = match.end()
    starts.append(place)
    parts.append(text[place:])
    used = [index for _, index, _ in slots]
    # Writing a content many times over is for the renderer, which bounds what templates write.
    if any(_PAD in part for part in parts) or any(used.count(index) > _MAX_REPEATS for index in set(used)):
        return None
    found: list[Any] = []
    for border in borders:
        index = max(index for index, start in enumerate(starts) if start <= border)
        inside = border - starts[index]
        if index % 2 and inside:  # within a content
            return None
        found.append((index, inside))
    return Skeleton(tuple(parts), tuple(slots), tuple(found))
