"""The schemas of the verbs under `foundry data` that take a configuration."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.section import NonNegativeInt, RowsPath, Section, TemplateName, broken_rule


class PackModelSection(Section):
    name: str = "smollm2-135m-instruct"
    """Whose tokenizer: a known name, a Hugging Face folder, a GGUF file, a run directory or a hub id."""
    template: TemplateName = "auto"
    """Chat template: auto (the model's own), chatml, llama3, alpaca, or the path of a .jinja file."""


class PackConfig(Section):
    """Everything `foundry data pack` reads."""

    source: RowsPath | None = None
    """Rows or text: JSONL, JSON, CSV, Parquet or text, a folder of these, or hf://datasets/ORG/NAME. Required."""
    model: PackModelSection = PackModelSection()
    """The model that the shards are for."""
    kind: Literal["rows", "text"] = "rows"
    """rows: each row is kept whole in a bin. text: documents become one stream, which is cut into chunks when read."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens of a bin or chunk."""
    overlength: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to a longer row: dropped and counted, cut at the end, split into several, or an error."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Whose tokens carry the loss in conversations. Text is trained on throughout."""
    bad_records: Literal["error", "drop"] = "error"
    """Whether records that cannot be used stop the work, or are left out and counted."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "input_output", "prompt_completion", "text"] = "auto"
    """Row format; auto detects it from the first row."""
    text_field: str = "text"
    """For kind=text: the field with a document's text, in JSON Lines, CSV or Parquet."""
    separator: str | None = None
    """For kind=text: the special token that ends each document; null takes the tokenizer's end-of-text token."""
    part: Literal["all", "train", "validation"] = "all"
    """For kind=text: pack all documents or one side of a split by content hash."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For kind=text: the share of the documents that is on the side of validation."""
    shard_tokens: Annotated[int, Field(ge=1024)] = 1 << 24
    """A shard is written when so many tokens have come together; as many wait in memory."""
    processes: NonNegativeInt = 0
    """Processes that encode; 0 chooses by the size of the input. The result is the same."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.part != "all" and self.kind != "text":
            raise broken_rule("part", "part is for kind=text: rows are split before they are packed")
        if self.part != "all" and not self.validation_share:
            raise broken_rule("validation_share", f"part={self.part} needs validation_share")
        return self
