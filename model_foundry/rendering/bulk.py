"""The tokens and weights of `Renderer`, for whole data sets: what rows have in common is worked out once.

Two things make it fast, each only where it is proved to change nothing: templates that never look into a content are
run once for each sequence of roles (`skeleton.py`), and pieces of text that were met before are not encoded again
(`pieces.py`). Everything else goes through the renderer, row by row. Some rows go both ways, and a difference is an
error. Knows no files and no policies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.errors import FoundryError
from model_foundry.rendering.control import texts
from model_foundry.rendering.opaque import prove_opaque
from model_foundry.rendering.pieces import PieceEncoder, Span, cut_place, find_cuts
from model_foundry.rendering.renderer import Rendered, Renderer, Tools, TrainOn
from model_foundry.rendering.skeleton import MAX_SKELETONS, Skeleton, build_skeleton
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message

_CHECKED_FIRST, _CHECK_EVERY = 8, 1000
_REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest little-endian type that holds every id: uint16 or uint32."""
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=0)
    return np.dtype("<u2") if largest < 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as bytes.

    Attributes:
        ids: little-endian ids, `token_dtype` each.
        num_tokens: how many.
        trained: the tokens [first, end) that carry the loss, ascending and apart from each other.
        escaped: as `Rendered.escaped`.
    """

    ids: bytes
    num_tokens: int
    trained: tuple[Span, ...]
    escaped: bool = False


class BulkRenderer:
    """Renders many rows under one renderer.

    Args:
        renderer: template and tokenizer.
        train_on: whose tokens carry the loss.
    """

    def __init__(self, renderer: Renderer, *, train_on: TrainOn = "assistant") -> None:
        self.renderer = renderer
        self.dtype = token_dtype(renderer.tokenizer)
        self._train_on: TrainOn = train_on
        self._opacity = prove_opaque(renderer.template_text) if renderer.template_text else None
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        self._of_template, self._of_text = _piece_encoders(renderer.tokenizer, self.dtype)
        self._num_rows = self._num_texts = 0

    def render(self, messages: Sequence[Message], *, tools: Tools | None = None) -> EncodedRow:
        """Tokens and trained spans of a conversation, as `Renderer.render` gives them.

        Raises:
            TemplateError: as `Renderer.render`.
        """
        row = self._fast_row(messages, tools)
        if row is None:
            return self._packed(self.renderer.render(messages, train_on=self._train_on, tools=tools))
        self._num_rows += 1
        if _is_checked(self._num_rows):
            slow = self._packed(self.renderer.render(messages, train_on=self._train_on, tools=tools))
            self._require_same(row, slow)
        return row

    def text_row(self, text: str) -> EncodedRow:
        """A plain text as a row, as `Renderer.text_row` gives it.

        Raises:
            DataError: as `Tokenizer.encode`.
        """
        tokenizer = self.renderer.tokenizer
        ids = self.text(text)
        if tokenizer.adds_bos and tokenizer.bos_id is not None:
            ids = self.id_bytes(tokenizer.bos_id) + ids
        if tokenizer.eos_id is not None:
            ids += self.id_bytes(tokenizer.eos_id)
        num_tokens = len(ids) // self.dtype.itemsize
        escaped = self.renderer.control_of("user").occurs(text)
        return EncodedRow(ids, num_tokens, ((0, num_tokens),) if num_tokens else (), escaped)

    def text(self, text: str) -> bytes:
        """Ids of a text alone, control tokens as plain text, as `Tokenizer.encode` gives them.

        Raises:
            DataError: as `Tokenizer.encode`.
        """
        ids = None if self._of_text is None else self._of_text.encode(text)
        if ids is None:
            return self._bytes(self.renderer.tokenizer.encode(text))
        self._num_texts += 1
        if _is_checked(self._num_texts) and ids != self._bytes(self.renderer.tokenizer.encode(text)):
            raise self._difference("a text")
        return ids

    def cut_place(self, text: str) -> int:
        """The last place where a text may be cut so that its parts have the ids of the whole; 0 where none is known."""
        return 0 if self._of_text is None else cut_place(text)

    def id_bytes(self, token_id: int) -> bytes:
        return self._bytes([token_id])

    def _fast_row(self, messages: Sequence[Message], tools: Tools | None) -> EncodedRow | None:
        if self._opacity is None or tools is not None:
            return None
        for message in messages:
            control = self.renderer.control_of(message.role)
            if control.concerns(message.content) or (message.extra and self._reads_extra(message)):
                return None
        skeleton = self._skeleton(tuple(message.role for message in messages))
        if skeleton is None:
            return None
        text, spans = skeleton.fill(messages)
        found = None if self._of_template is None else self._of_template.encode_spans(text, spans)
        if found is None:
            return self._packed(self.renderer.encode(text, spans))
        ids, trained = found
        num_tokens = len(ids) // self.dtype.itemsize
        if spans == [(0, len(text))]:  # the renderer's own rule for all of it
            trained = [(0, num_tokens)]
        return EncodedRow(ids, num_tokens, _joined(trained))

    def _reads_extra(self, message: Message) -> bool:
        """Whether the template may read a field beside role and content, or one holds a control token."""
        names = self._opacity.names if self._opacity is not None else frozenset()
        fields = set(message.extra)
        if fields & _REASONING:
            fields |= _REASONING
        control = self.renderer.control_of(message.role)
        return not names.isdisjoint(fields) or any(control.concerns(text) for text in texts(message.extra))

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        if roles not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[roles] = build_skeleton(self.renderer, roles, train_on=self._train_on)
        return self._skeletons[roles]

    def _packed(self, row: Rendered) -> EncodedRow:
        edges = np.flatnonzero(np.diff(row.weights, prepend=0.0, append=0.0)).tolist()
        trained = list(zip(edges[::2], edges[1::2], strict=True))
        return EncodedRow(self._bytes(row.tokens), len(row.tokens), tuple(trained), row.escaped)

    def _bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return np.asarray(ids).astype(self.dtype).tobytes()

    def _require_same(self, fast: EncodedRow, slow: EncodedRow) -> None:
        if fast != slow:
            raise self._difference("a conversation")

    def _difference(self, what: str) -> FoundryError:
        return FoundryError(
            f"two ways of encoding {what} give different tokens",
            where=self.renderer.name,
            hint="This is a fault of ours; please report the model and its chat template",
        )


def _piece_encoders(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> tuple[PieceEncoder | None, PieceEncoder | None]:
    """For what a template writes, where control tokens are read; and for people's text, where they are text."""
    cuts = find_cuts(json.loads(tokenizer.backend.to_str())) if tokenizer.sentencepiece is None else None
    if cuts is None:
        return None, None
    control = tokenizer.control_tokens()
    plain = tokenizer.plain(control)

    def encode_plain(text: str) -> tuple[list[int], list[Span]]:
        return plain.encode(text, first=True)

    added = sorted(tokenizer.special_tokens)
    return (
        PieceEncoder(cuts, atoms=added, encode=tokenizer.scan, dtype=dtype),
        PieceEncoder(cuts, atoms=[t for t in added if t not in control], encode=encode_plain, dtype=dtype),
    )


def _is_checked(number: int) -> bool:
    return number <= _CHECKED_FIRST or number % _CHECK_EVERY == 0


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Ascending spans without the empty ones, those that touch as one: two turns may share a token."""
    joined: list[Span] = []
    for first, end in spans:
        if first >= end:
            continue
        if joined and joined[-1][1] >= first:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((first, end))
    return tuple(joined)
