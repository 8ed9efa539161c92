"""The one renderer: messages to tokens and loss weights, replies back to text.

Ids equal those of transformers' `apply_chat_template` wherever no text holds a control token; where one does, it is
encoded as plain text. Knows templates and tokenizers; does not know files, models or training.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np

from model_foundry.errors import TemplateError, UnsafeTemplateError
from model_foundry.rendering.builtin_templates import find_template, no_template_error
from model_foundry.rendering.control import ControlText, Escapes, texts
from model_foundry.rendering.pieces import Span, offset_end, offset_start
from model_foundry.rendering.sandbox import GENERATION_END, GENERATION_START, CompiledTemplate
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message

TrainOn = Literal["assistant", "last_assistant", "all"]
Tools = Sequence[Mapping[str, Any]]

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as tokens.

    Attributes:
        tokens: int32 [T].
        weights: float32 [T], 1.0 where the token is trained and 0.0 elsewhere.
        text: what was encoded.
        escaped: whether people's text held control tokens, which were encoded as plain text.
    """

    tokens: np.ndarray
    weights: np.ndarray
    text: str
    escaped: bool


class Renderer:
    """Messages under one chat template and tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        template: `auto` (the model's own), a built-in name (chatml, llama3, alpaca) or the path of a .jinja file.
        now: the time a template may ask for; default the present, fixed for the life of the renderer. `uses_clock`
            says whether the template does ask: a run that must be repeatable then keeps this time.

    Raises:
        TemplateError: the template cannot be found, compiled, or made to render a question and an answer.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "auto", *, now: datetime | None = None) -> None:
        self.tokenizer = tokenizer
        self.now = now or datetime.now()
        found = find_template(template, tokenizer)
        self.template_text = found.source if found else ""
        self.fingerprint = hashlib.sha256(f"{tokenizer.fingerprint}\n{self.template_text}".encode()).hexdigest()
        self.name = f"{found.name if found else 'none'}:{self.fingerprint[:12]}"
        self.uses_clock = "strftime_now" in self.template_text
        self._compiled = CompiledTemplate(found.source, name=found.name, now=self.now) if found else None
        self.marks_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.template_text) is not None
        control = tokenizer.control_tokens(self.template_text)
        marks = (GENERATION_START, GENERATION_END) if self.marks_generation else ()
        self._control = ControlText({*control, *marks})
        # The assistant may write control tokens that the tokenizer does not call special: <think>, <tool_call>.
        self._control_of_assistant = ControlText({*(t for t in control if tokenizer.is_special(t)), *marks})
        self._control_tokens = control
        self._control_ids = frozenset(tokenizer.special_tokens[token] for token in control)
        if self._compiled is not None:
            _ = self.stop_token_ids

    # -- what others call ------------------------------------------------------------------------------------------

    def require_template(self) -> CompiledTemplate:
        """Raises: TemplateError when the model has no chat template and none was chosen."""
        if self._compiled is None:
            raise no_template_error()
        return self._compiled

    def text(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        """The conversation as the template writes it."""
        row = self.prepare(messages, tools)
        return row.undo(self.unmarked(self.run(row, len(row.messages), add_generation_prompt)))

    def render(
        self, messages: Sequence[Message], *, train_on: TrainOn = "assistant", tools: Tools | None = None
    ) -> Rendered:
        """Tokens and loss weights of a conversation.

        With `assistant` the weights cover every assistant turn, its end-of-turn token included, and nothing else; with
        `last_assistant` the last one; with `all` everything. A token that straddles the beginning of a turn counts as
        the turn's.

        Raises:
            TemplateError: the template refuses the row, or does not show where an assistant turn begins.
        """
        row = self.prepare(messages, tools)
        marked = self.run(row, len(row.messages), False)
        full = self.unmarked(marked)
        if train_on == "all":
            spans = [(0, len(full))]
        elif self.marks_generation:
            spans = marked_spans(marked)
            spans = spans[-1:] if train_on == "last_assistant" else spans
        else:
            spans = self._assistant_spans(row, full, only_last=train_on == "last_assistant")
        return self.encode(full, spans, row.escapes)

    def prompt(self, messages: Sequence[Message], *, tools: Tools | None = None) -> np.ndarray:
        """int32 [T]: the conversation and the beginning of the assistant's turn."""
        row = self.prepare(messages, tools)
        text = self.unmarked(self.run(row, len(row.messages), True))
        return self.encode(text, [], row.escapes).tokens

    def text_row(self, text: str) -> Rendered:
        """A plain text as a row: all of it trained, end-of-text appended; BOS first where the tokenizer adds it."""
        ids = self.tokenizer.encode(text)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if self.tokenizer.adds_bos and bos is not None:
            ids = [bos, *ids]
        if eos is not None:
            ids = [*ids, eos]
        weights = np.ones(len(ids), dtype=np.float32)
        return Rendered(np.array(ids, dtype=np.int32), weights, text, self._control.occurs(text))

    def control_tokens_in(self, text: str, *, role: str = "user") -> tuple[str, ...]:
        """The control tokens that people wrote into a text of this role; each is encoded as plain text."""
        own = self._control_of_assistant if role == "assistant" else self._control
        return own.find(text)

    def min_tokens(self, text: str) -> int:
        """At least so many tokens has `text`, told without encoding it; 0 where the tokenizer does not allow it."""
        most = self.tokenizer.max_chars_per_token
        return 0 if most is None else -(-len(text) // most)

    def reply(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of what the model wrote, up to its end-of-turn token."""
        ids = [int(token) for token in tokens]
        stop = next((index for index, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        return self.tokenizer.decode(ids[:stop], skip_special=True)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The control tokens that end an assistant turn under this template, and end-of-text."""
        return self._stop_token_ids

    @cached_property
    def _stop_token_ids(self) -> tuple[int, ...]:
        stops: list[int] = []
        if self._compiled is not None:
            stops = [self.tokenizer.special_tokens[token] for token in self._end_of_turn]
        eos = self.tokenizer.eos_id
        return tuple(dict.fromkeys([*stops, *([] if eos is None else [eos])]))

    # -- one row, step by step (BulkRenderer takes some of them once for many rows) ----------------------------------

    @cached_property
    def _end_of_turn(self) -> tuple[str, ...]:
        """Control tokens after the answer in a probe conversation."""
        probe = [Message("user", "Question"), Message("assistant", "Answer")]
        try:
            text = self.text(probe)
        except UnsafeTemplateError:
            raise
        except TemplateError:  # some templates insist on a system message
            text = self.text([Message("system", "System"), *probe])
        return self._control_of_assistant.ending(text)

    def control_of(self, role: str) -> ControlText:
        """The control tokens that a message of this role may not write."""
        return self._control_of_assistant if role == "assistant" else self._control

    def prepare(self, messages: Sequence[Message], tools: Tools | None) -> PreparedRow:
        """What the template gets to see."""
        dicts = [_alias_reasoning(message) for message in messages]
        num_chars = 0
        concerned = False
        for message in dicts:
            own = self.control_of(message["role"])
            for value in message.values():
                for text in (value,) if isinstance(value, str) else texts(value):
                    num_chars += 100 + len(text)
                    concerned = concerned or own.concerns(text)
        for text in texts(tools or ()):
            num_chars += 100 + len(text)
            concerned = concerned or self._control.concerns(text)
        plain_tools: Any = None if tools is None else list(tools)
        if not concerned:
            return PreparedRow(dicts, plain_tools, num_chars, None)
        escapes = Escapes(self.template_text + "".join(texts(dicts)) + "".join(texts(plain_tools or ())))
        escaped = [{k: self.control_of(m["role"]).escape_value(v, escapes) for k, v in m.items()} for m in dicts]
        return PreparedRow(escaped, self._control.escape_value(plain_tools, escapes), num_chars, escapes)

    def run(self, row: PreparedRow, num_messages: int, add_generation_prompt: bool) -> str:
        """What the template writes of the first messages, escaped, with marks where it generates."""
        variables = {
            **self.tokenizer.named,
            "messages": row.messages[:num_messages],
            "tools": row.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "tokenizer_adds_bos": self.tokenizer.adds_bos,
        }
        return self.require_template().render(variables, num_input_chars=row.num_chars)

    def unmarked(self, text: str) -> str:
        """The text without the marks of `{% generation %}` blocks."""
        return _MARKS.sub("", text) if self.marks_generation else text

    def _assistant_spans(self, row: PreparedRow, full: str, *, only_last: bool) -> list[Span]:
        """Character spans of the assistant turns in `full`, from where a generation prompt ends to the end of turn."""
        turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        if only_last:
            turns = turns[-1:]
        return [self._assistant_span(row, full, index) for index in turns]

    def _assistant_span(self, row: PreparedRow, full: str, index: int) -> Span:
        prefix = self.run(row, index, True)
        if not full.startswith(prefix):
            raise self._no_span_error(index, "what it writes before the turn depends on what comes after")
        start = len(prefix)
        upto = full if index == len(row.messages) - 1 else self.run(row, index + 1, False)
        if full.startswith(upto):
            turn = upto[start:]
            ended = turn.rstrip()
            return start, start + len(ended if ended.endswith(self._control_of_assistant.tokens) else turn)
        # Some templates write an earlier turn otherwise than a last one (Qwen3 leaves its thinking out). It still
        # ends at the first end-of-turn token, which people's text cannot hold.
        ends = [(full.find(token, start), token) for token in self._end_of_turn]
        ends = [(place, token) for place, token in ends if place >= 0]
        if not ends:
            raise self._no_span_error(index, "it writes an earlier turn otherwise than a last one")
        end, _ = min(ends)
        for token in self._end_of_turn:
            if full.startswith(token, end):
                end += len(token)
        return start, end

    def _no_span_error(self, index: int, reason: str) -> TemplateError:
        return TemplateError(
            f"the chat template does not show where the assistant turn messages[{index}] begins and ends: {reason}",
            where=self.name,
            hint="Mark turns with {% generation %} in the template, or set another model.template or data.train_on=all",
        )

    def encode(self, text: str, spans: Sequence[Span], escapes: Escapes | None = None) -> Rendered:
        """Tokens of what the template wrote, and weights of one where they overlap the spans of characters."""
        if escapes is None:
            ids, offsets = self.tokenizer.scan(text)
        else:
            ids, offsets = self._encode_escaped(text, escapes)
            position = escapes.positions(text)
            spans = [(position(start), position(end)) for start, end in spans]
            text = escapes.undo(text)
        escaped = escapes is not None and any(escapes.table.values())
        return Rendered(np.array(ids, dtype=np.int32), _weights(offsets, spans, len(text)), text, escaped)

    def _encode_escaped(self, text: str, escapes: Escapes) -> tuple[list[int], list[Span]]:
        """Ids and offsets (in the text with the escapes undone) where only the template's control tokens are parsed."""
        plain = self.tokenizer.plain(self._control_tokens)
        scanned = self.tokenizer.scan(text)
        ids: list[int] = []
        offsets: list[Span] = []
        done = shift = 0  # in the escaped text; how much longer it has become so far

        def add_plain(end: int) -> None:
            nonlocal shift
            if end > done:
                run = escapes.undo(text[done:end])
                run_ids, run_offsets = plain.encode(run, first=done == 0)
                ids.extend(run_ids)
                offsets.extend((start + done + shift, stop + done + shift) for start, stop in run_offsets)
                shift += len(run) - (end - done)

        for token_id, (start, end) in zip(*scanned, strict=True):
            if token_id in self._control_ids and not plain.is_unknown(token_id, text[start:end]):
                if escapes.holds(text[start:end]):
                    raise TemplateError("a control token of the template runs into a text", where=self.name)
                add_plain(start)
                ids.append(token_id)
                offsets.append((start + shift, end + shift))
                done = end
        add_plain(len(text))
        return ids, offsets


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """What a template gets to see of a conversation, escaped where needed."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    num_chars: int
    escapes: Escapes | None

    def undo(self, text: str) -> str:
        return text if self.escapes is None else self.escapes.undo(text)


def _alias_reasoning(message: Message) -> dict[str, Any]:
    """The message as transformers hands it to a template: reasoning under each name that templates read it by."""
    fields = {key: value for key, value in message.as_dict().items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING_FIELDS if key in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def marked_spans(marked: str) -> list[Span]:
    """Spans between generation marks, in the text without the marks."""
    spans: list[Span] = []
    starts: list[int] = []
    for count, match in enumerate(_MARKS.finditer(marked)):
        place = match.start() - count
        if match.group() == GENERATION_START:
            starts.append(place)
        elif starts:
            spans.append((starts.pop(), place))
    return sorted(spans)


def _weights(offsets: Sequence[Span], spans: Sequence[Span], num_chars: int) -> np.ndarray:
    """float32 [T]: 1.0 for tokens that overlap a span. Offsets ascend, which makes a span's tokens a slice."""
    weights = np.zeros(len(offsets), dtype=np.float32)
    if list(spans) == [(0, num_chars)]:
        weights[:] = 1.0
        return weights
    for start, end in spans:
        first = bisect_right(offsets, start, key=offset_end)
        weights[first : bisect_left(offsets, end, lo=first, key=offset_start)] = 1.0
    return weights
