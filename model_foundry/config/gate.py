"""The section of a configuration that says how strict the gate is: what data may hold before it is trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from model_foundry.config.section import Fraction, PositiveInt, Section


class GateSection(Section):
    action: Literal["refuse", "warn"] = "refuse"
    """refuse: data that fails a check is not trained on. warn: it is, loudly, and the report keeps what failed."""
    min_cases: PositiveInt = 2
    """Lost rows, and repeated ones, are judged from this many on: one odd row of a small set is only measured."""
    max_lost_share: Fraction = 0.1
    """Rows that may be dropped or truncated for their length, as a share of all."""
    max_duplicate_share: Fraction = 0.2
    """Rows that may repeat an earlier one, exactly or nearly, as a share of all."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Texts at least this much alike (Jaccard similarity) count as near-duplicates."""
    max_overlap_share: Fraction = 0.0
    """Held-out rows (validation, evaluation questions) that may stand among the training rows, exactly or nearly."""
    max_short_overlap_share: Fraction = 0.05
    """Held-out rows that may nearly stand there where they are short: there a word makes another question."""
    max_quoted_share: Fraction = 0.0
    """Held-out rows whose question or long answer may stand inside a longer training row, word for word."""
    max_empty_share: Fraction = 0.0
    """Rows that may hold a question or an answer without text, as a share of all."""
    max_mismatch_share: Fraction = 0.01
    """Answers that may begin or end with other tokens than the model would write, as a share of all."""
    max_special_share: Fraction = 0.01
    """Rows whose text may hold special tokens that the chat template does not write (<filename>, say)."""
    max_damaged_share: Fraction = 0.05
    """Rows that may hold U+FFFD, which is left where text was decoded wrongly."""
    unread_fields: tuple[str, ...] = ()
    """Fields with content that are knowingly not read, by name."""
