"""Fields that nothing reads: which of them hold content that the model was meant to see.

A row may carry an id, a source or a score, and nothing is lost when these stay unread. A misspelt `system`, a second
answer, or a message's `weight` that says "not this one" is another matter. What decides: names that formats use for
content, names close to the optional ones, and prose that stands nowhere else in the row.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from model_foundry.data.rows import Row
from model_foundry.rendering.control import texts

MIN_PROSE_WORDS = 8
_CONTENT = """
    messages conversations conversation dialog dialogue turns chat instruction instructions output outputs input
    inputs response responses completion completions prompt prompts answer answers question questions query text content
    system system_prompt system_message context history chosen rejected tools functions tool_calls function_call images
    image audio video reasoning reasoning_content thinking rationale solution target
"""
CONTENT = frozenset(_CONTENT.split())
OPTIONAL = ("system", "tools", "history", "input")
_METADATA = """
    id idx index uuid guid key name title source sources dataset subset split origin url uri link href path file
    filename license licence author authors user_name date time timestamp created updated lang language languages locale
    category categories topic topics subject subjects tag tags type kind task domain difficulty level score scores
    rating ratings quality model models provider engine version revision hash sha sha1 sha256 md5 tokens num_tokens
    token_count length lengths num_turns turn_count meta metadata info provenance stats batch seed repo repository
    commit copyright citation doi isbn country region
"""
METADATA = frozenset(_METADATA.split())
_METADATA_SHAPE = re.compile(r"(_|meta).*|.*(_id|_ids|_hash|_url|_at|_time|_date|_source|_score|_name|_type|_count)")
# A turn that says whether it is trained on. Nothing here reads it, so a turn meant to be left out would be trained.
_LOSS_FLAGS = frozenset({"weight", "train", "trainable", "loss", "loss_mask", "mask", "masked", "is_trained"})
_WORDS_OF_TURNS = frozenset({"role", "from", "content", "value", "user", "human", "assistant", "gpt", "system", "tool"})


@dataclass(frozen=True, slots=True)
class Unread:
    """A field with content that nothing read: where it was first met, and with what."""

    name: str
    source: str
    value: str
    why: str


class UnreadFields:
    """Collects fields with content, by name: how many rows have each, and the first of them."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, Unread] = {}

    def look(self, value: Mapping[str, Any], read: Collection[str], row: Row) -> None:
        """Note the fields of a decoded row that are not among those `read`."""
        for name, content in value.items():
            if name not in read and (why := content_reason(name, content, row)) is not None:
                self._add(name, row.source, content, why)

    def look_at_turns(self, row: Row, *, template: str) -> None:
        """Note what the turns of a row carry and the chat template does not read."""
        found: dict[str, tuple[Any, str]] = {}
        if row.tools and not reads(template, "tools"):
            found["tools"] = (row.tools[0], "the chat template does not show tools")
        for message in (*row.messages, *row.chosen, *row.rejected):
            for name, content in message.extra.items():
                if not reads(template, name) and (why := _turn_reason(name, content, row, template)) is not None:
                    found.setdefault(f"{message.role}.{name}", (content, why))
        for name, (content, why) in found.items():
            self._add(name, row.source, content, why)

    def _add(self, name: str, source: str, content: Any, why: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        if name not in self.first:
            self.first[name] = Unread(name, source, str(content), why)


def content_reason(name: str, value: Any, row: Row) -> str | None:
    """Why an unread field of a row looks like content, or None where nothing is lost with it."""
    if value in (None, "", [], {}):
        return None
    kind = _kind_of_name(name)
    if kind == "metadata":
        return None
    written = [text for text in texts(value) if text.strip()]
    if not written:
        return None
    if kind != "other":
        return None if _stands_in(written, row) else kind
    if any(len(text.split()) >= MIN_PROSE_WORDS for text in written) and not _stands_in(written, row):
        return "it holds prose that stands nowhere else in the row"
    return None


@lru_cache(maxsize=4096)
def _kind_of_name(name: str) -> str:
    """`metadata`, `other`, or why a field of this name is content."""
    plain = name.strip().lower()
    if plain in CONTENT:
        return "a field of this name holds content"
    if plain in METADATA or _METADATA_SHAPE.fullmatch(plain):
        return "metadata"
    meant = difflib.get_close_matches(plain, OPTIONAL, n=1, cutoff=0.8)
    return f"'{meant[0]}' may be meant" if meant else "other"


def _turn_reason(name: str, value: Any, row: Row, template: str) -> str | None:
    if value in (None, "", [], {}):
        return None
    if name in _LOSS_FLAGS:
        is_default = value in (True, 1) if name not in ("mask", "masked", "loss_mask") else value in (False, 0)
        return None if is_default else "it says whether the turn is trained on, and is not read"
    if name == "tool_calls":
        return None  # a template that does not show them refuses the row
    if name in ("reasoning_content", "thinking", "reasoning"):
        known = any(reads(template, each) for each in ("reasoning_content", "thinking", "reasoning"))
        return None if known else "the chat template does not show reasoning"
    return content_reason(name, value, row)


@lru_cache(maxsize=256)
def reads(template: str, name: str) -> bool:
    """Whether a chat template mentions a name at all."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _stands_in(written: Sequence[str], row: Row) -> bool:
    """Whether every text also stands in what was read of the row, or one of them holds all that was read."""
    turns = [message.content.strip() for message in (*row.messages, *row.chosen, *row.rejected)]
    parts = turns if row.text is None else [row.text.strip()]
    whole = "\n".join(parts)
    if all(text.strip() in whole or text in _WORDS_OF_TURNS for text in written):
        return True
    return any(all(part in text for part in parts) for text in written)
