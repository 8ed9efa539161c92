"""What shards are made from and how: enough to tell whether a build that was cut short may go on.

Two builds with equal plans write equal bytes, whenever, wherever and by however many processes. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from model_foundry.data.files import find_inputs
from model_foundry.data.shards.format import FileEntry, files_as_json, files_from_json, hash_of
from model_foundry.data.shards.split import Part
from model_foundry.data.tokenise import TrainOn
from model_foundry.errors import DataError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

Kind = Literal["rows", "text"]
Overlength = Literal["drop", "truncate", "split", "error"]
BadRecords = Literal["error", "drop"]
SHARD_TOKENS = 1 << 24
_WINDOW_BINS = 64


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How records become shards.

    Attributes:
        kind: `rows` (conversations and texts, each kept apart and whole in a bin) or `text` (one stream of documents).
        max_length: tokens of a bin or chunk.
        overlength: what happens to a longer row: dropped, truncated (its beginning stays), split, or an error.
        train_on: whose tokens carry the loss, in conversations.
        bad_records: whether records that cannot be used are errors, or left out and counted.
        format: format of the rows, `auto` to detect it from the first.
        text_field: the field that holds a document's text, for `text` from JSON Lines, CSV or Parquet.
        separator: the special token that ends each document; default the tokenizer's end-of-text token.
        shard_tokens: a shard is written when so many tokens have come together.
        part: of `text`, the side of the corpus to pack, by content hash.
        validation_share: of the documents, that are on the side of `validation`.
    """

    kind: Kind = "rows"
    max_length: int = 2048
    overlength: Overlength = "drop"
    train_on: TrainOn = "assistant"
    bad_records: BadRecords = "error"
    format: str = "auto"
    text_field: str = "text"
    separator: str | None = None
    shard_tokens: int = SHARD_TOKENS
    part: Part = "all"
    validation_share: float = 0.0

    @property
    def window_tokens(self) -> int:
        """Tokens that wait before they are packed: few bins at a time would leave gaps."""
        return max(self.shard_tokens, _WINDOW_BINS * self.max_length)


@dataclass(frozen=True, slots=True)
class RendererSource:
    """Where a renderer comes from, so that every process can make the same one.

    Attributes:
        folder: a model folder with its tokenizer.
        template: as `Renderer` takes it.
        now: the time a template may ask for.
    """

    folder: Path
    template: str = "auto"
    now: datetime | None = None

    def load(self) -> Renderer:
        return Renderer(Tokenizer.load(self.folder), self.template, now=self.now)


@dataclass(frozen=True, slots=True)
class Plan:
    """Parameters and inputs by name; what is in here is in the index."""

    parameters: Mapping[str, Any]
    inputs: Mapping[str, FileEntry]

    def as_json(self) -> dict[str, Any]:
        return {"parameters": dict(self.parameters), "inputs": files_as_json(self.inputs)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Plan:
        return Plan(dict(values["parameters"]), files_from_json(values["inputs"]))

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.inputs.values())

    def changes(self, earlier: Plan) -> list[str]:
        """What is otherwise than in an earlier plan, in words; empty when the two mean the same shards."""
        changes = []
        for name in sorted({*self.parameters, *earlier.parameters}):
            before, now = earlier.parameters.get(name), self.parameters.get(name)
            if before != now:
                changes.append(f"{name} was {before!r} and is {now!r}")
        for name in sorted({*self.inputs, *earlier.inputs}):
            if name not in self.inputs:
                changes.append(f"the input {name} is gone")
            elif name not in earlier.inputs:
                changes.append(f"the input {name} is new")
            elif self.inputs[name] != earlier.inputs[name]:
                changes.append(f"the input {name} has other bytes")
        return changes


def make_plan(source: Path, files: Sequence[Path], options: PackOptions, renderer: Renderer) -> Plan:
    """The plan for the input `files` of `source`; reads each file once, for its hash.

    Raises:
        DataError: an unknown separator.
    """
    entries = {input_name(file, source): FileEntry(file.stat().st_size, hash_of(file)) for file in files}
    is_rows = options.kind == "rows"
    parameters = {
        **asdict(options),
        "tokenizer": renderer.tokenizer.fingerprint,
        "renderer": renderer.fingerprint if is_rows else None,
        "clock": renderer.now.isoformat() if is_rows and renderer.uses_clock else None,
    }
    if not is_rows:
        parameters["separator"] = separator_of(renderer.tokenizer, options.separator)
    return Plan(parameters, entries)


def list_inputs(source: Path) -> list[Path]:
    """The files of `source`.

    Raises:
        DataError: there is no such file, or a folder holds none that can be read.
    """
    if not source.exists():
        raise DataError("there is no such file or folder", where=str(source), hint="Check the path")
    inputs = find_inputs(source)
    if not inputs.files:
        skipped = "; ".join(f"{count:,} {reason}" for reason, count in inputs.skipped.items())
        what = f"the folder holds no file of rows or text{f' ({skipped})' if skipped else ''}"
        raise DataError(what, where=str(source))
    return list(inputs.files)


def input_name(file: Path, source: Path) -> str:
    return file.relative_to(source).as_posix() if file != source else file.name


def separator_of(tokenizer: Tokenizer, wanted: str | None) -> str:
    """The token that ends a document.

    Raises:
        DataError: it is not a special token, or the tokenizer names no end-of-text token.
    """
    separator = wanted if wanted is not None else tokenizer.named.get("eos_token")
    choices = ", ".join(sorted(tokenizer.special_tokens)[:12])
    if separator is None:
        hint = f"Set separator to one of {choices}"
        raise DataError("the tokenizer names no end-of-text token to put between documents", hint=hint)
    if separator not in tokenizer.special_tokens:
        hint = f"The tokenizer has {choices}"
        raise DataError(f"the separator {separator!r} is not a token of its own", hint=hint)
    return separator
