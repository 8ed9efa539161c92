"""The tokens and weights of `Renderer`, for whole data sets: what rows have in common is worked out once.

Three things make it fast, each only where it is proved to change nothing: templates that never look into a content are
run once for each sequence of roles (`skeleton.py`), pieces of text that were met before are not encoded again
(`pieces.py`), and blocks of ASCII are cut and looked up all at once (`word_table.py`). Everything else goes through the
renderer, row by row. Some rows go both ways, and a difference is an error. Knows no files and no policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.errors import DataError, FoundryError, UnsafeTemplateError
from model_foundry.rendering.control import texts
from model_foundry.rendering.opaque import prove_opaque
from model_foundry.rendering.pieces import PieceEncoder, Span, cut_place, find_cuts
from model_foundry.rendering.renderer import Rendered, Renderer, Tools, TrainOn
from model_foundry.rendering.skeleton import MAX_SKELETONS, Skeleton, build_skeleton
from model_foundry.rendering.text_blocks import TextBlocks
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.plain import PlainEncoder
from model_foundry.types import Message

_CHECKED_FIRST, _CHECK_EVERY = 8, 1000
_REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})
Conversation = tuple[Sequence[Message], Tools | None]


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
        self._skeletons: dict[tuple[str, ...], _Roles] = {}
        self._of_template, self._of_text = _piece_encoders(renderer.tokenizer, self.dtype)
        self._template_blocks = TextBlocks.made(renderer.tokenizer, self._of_template, self.dtype)
        self._text_blocks = TextBlocks.made(renderer.tokenizer, self._of_text, self.dtype)
        self._num_rows = self._num_texts = 0

    # -- conversations -----------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, tools: Tools | None = None) -> EncodedRow:
        """Tokens and trained spans of a conversation, as `Renderer.render` gives them.

        Raises:
            TemplateError: as `Renderer.render`.
        """
        roles = self._roles(messages, tools)
        row = None if roles is None else self._filled(messages, roles.skeleton)
        if row is None:
            return self._packed(self.renderer.render(messages, train_on=self._train_on, tools=tools))
        return self._checked(row, messages)

    def render_all(self, conversations: Sequence[Conversation]) -> list[EncodedRow | DataError]:
        """`render` of each; in the place of a row that cannot be rendered, why.

        Raises:
            UnsafeTemplateError: the template does what it must not; each row would take seconds to fail.
        """
        rows: list[EncodedRow | DataError | None] = [None] * len(conversations)
        marked: list[tuple[int, str, list[Span]]] = []
        for index, (messages, tools) in enumerate(conversations):
            roles = self._roles(messages, tools)
            if roles is not None and roles.marked is not None and self._is_plain(messages):
                marked.append((index, *roles.marked.fill(messages)))
                continue
            try:
                rows[index] = self.render(messages, tools=tools)
            except UnsafeTemplateError:
                raise
            except DataError as error:
                rows[index] = error
        if marked and self._template_blocks is not None:
            found = self._template_blocks.encode([(text, spans) for _, text, spans in marked])
            for (index, _, _), (ids, num_tokens, trained) in zip(marked, found, strict=True):
                row = EncodedRow(ids, num_tokens, _joined(trained))
                rows[index] = self._checked(row, conversations[index][0])
        return [row for row in rows if row is not None]

    # -- texts -------------------------------------------------------------------------------------------------------

    def text_row(self, text: str) -> EncodedRow:
        """A plain text as a row, as `Renderer.text_row` gives it.

        Raises:
            DataError: as `Tokenizer.encode`.
        """
        return self.framed(text, self.text(text))

    def framed(self, text: str, ids: bytes) -> EncodedRow:
        """A text whose ids are known as a row, with what comes before and after it."""
        tokenizer = self.renderer.tokenizer
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
        return self._checked_text(ids, text)

    def text_all(self, texts: Sequence[str]) -> list[bytes | DataError]:
        """`text` of each; in the place of a text that cannot be encoded, why."""
        found: list[bytes | DataError] = [b""] * len(texts)
        blocks = self._text_blocks
        plain = [] if blocks is None else [index for index, text in enumerate(texts) if blocks.takes(text)]
        if blocks is not None and plain:
            encoded = blocks.encode([(texts[index], []) for index in plain])
            for index, (ids, _, _) in zip(plain, encoded, strict=True):
                found[index] = self._checked_text(ids, texts[index])
        for index in sorted(set(range(len(texts))) - set(plain)):
            try:
                found[index] = self.text(texts[index])
            except DataError as error:
                found[index] = error
        return found

    def cut_place(self, text: str) -> int:
        """The last place where a text may be cut so that its parts have the ids of the whole; 0 where none is known."""
        return 0 if self._of_text is None else cut_place(text)

    def id_bytes(self, token_id: int) -> bytes:
        return self._bytes([token_id])

    # -- one row -----------------------------------------------------------------------------------------------------

    def _roles(self, messages: Sequence[Message], tools: Tools | None) -> _Roles | None:
        """What is known of conversations with these roles; None where this one must go through the template."""
        if self._opacity is None or tools is not None:
            return None
        for message in messages:
            control = self.renderer.control_of(message.role)
            if control.concerns(message.content) or (message.extra and self._reads_extra(message)):
                return None
        key = tuple([message.role for message in messages])
        roles = self._skeletons.get(key)
        if roles is None:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            skeleton, blocks = build_skeleton(self.renderer, key, train_on=self._train_on), self._template_blocks
            marked = None if skeleton is None or blocks is None else blocks.with_marks(skeleton)
            roles = self._skeletons[key] = _Roles(skeleton, marked)
        return roles if roles.skeleton is not None else None

    def _reads_extra(self, message: Message) -> bool:
        """Whether the template may read a field beside role and content, or one holds a control token."""
        names = self._opacity.names if self._opacity is not None else frozenset()
        fields = set(message.extra)
        if fields & _REASONING:
            fields |= _REASONING
        control = self.renderer.control_of(message.role)
        return not names.isdisjoint(fields) or any(control.concerns(text) for text in texts(message.extra))

    def _is_plain(self, messages: Sequence[Message]) -> bool:
        blocks = self._template_blocks
        return blocks is not None and blocks.takes("".join([message.content for message in messages]))

    def _filled(self, messages: Sequence[Message], skeleton: Skeleton | None) -> EncodedRow | None:
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

    def _packed(self, row: Rendered) -> EncodedRow:
        edges = np.flatnonzero(np.diff(row.weights, prepend=0.0, append=0.0)).tolist()
        trained = list(zip(edges[::2], edges[1::2], strict=True))
        return EncodedRow(self._bytes(row.tokens), len(row.tokens), tuple(trained), row.escaped)

    def _bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return np.asarray(ids).astype(self.dtype).tobytes()

    def _checked(self, row: EncodedRow, messages: Sequence[Message]) -> EncodedRow:
        """The row, held against the renderer's now and then."""
        self._num_rows += 1
        if not _is_checked(self._num_rows):
            return row
        if row != self._packed(self.renderer.render(messages, train_on=self._train_on)):
            raise self._difference("a conversation")
        return row

    def _checked_text(self, ids: bytes, text: str) -> bytes:
        self._num_texts += 1
        if _is_checked(self._num_texts) and ids != self._bytes(self.renderer.tokenizer.encode(text)):
            raise self._difference("a text")
        return ids

    def _difference(self, what: str) -> FoundryError:
        return FoundryError(
            f"two ways of encoding {what} give different tokens",
            where=self.renderer.name,
            hint="This is a fault of ours; please report the model and its chat template",
        )


@dataclass(frozen=True, slots=True)
class _Roles:
    """How conversations with one sequence of roles are filled in; `marked` with a byte for each control token."""

    skeleton: Skeleton | None
    marked: Skeleton | None


def _piece_encoders(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> tuple[PieceEncoder | None, PieceEncoder | None]:
    """For what a template writes, where control tokens are read; and for people's text, where they are text."""
    cuts = find_cuts(tokenizer.backend) if tokenizer.sentencepiece is None else None
    if cuts is None:
        return None, None
    control = tokenizer.control_tokens()
    added = sorted(tokenizer.special_tokens)

    # Not made before it is needed: it is a tokenizer of its own.
    def encode_plain(text: str) -> tuple[list[int], list[Span]]:
        return tokenizer.plain(control).encode(text, first=True)

    def plain_model() -> Any:
        plain = tokenizer.plain(control)
        return plain.model if isinstance(plain, PlainEncoder) else None

    def model() -> Any:
        return tokenizer.backend.model

    ordinary = [token for token in added if token not in control]
    of_text = PieceEncoder(cuts, atoms=ordinary, encode=encode_plain, model=plain_model, dtype=dtype)
    processor = tokenizer.backend.post_processor
    if processor is not None and b'"trim_offsets":true' in processor.__getstate__():
        return None, of_text  # where a token begins then depends on where its piece stands
    return PieceEncoder(cuts, atoms=added, encode=tokenizer.scan, model=model, dtype=dtype), of_text


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
