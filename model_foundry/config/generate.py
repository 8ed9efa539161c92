"""The schema of `foundry generate`: which code, which words, which model, at what price, up to what sum, where to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model_foundry.config.corpus import CorpusSection
from model_foundry.config.section import Fraction, NonNegativeInt, PositiveInt, Section

Dollars = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


class PromptSection(Section):
    version: str = "reverse-1"
    """Which of the built-in templates; part of every request's identity."""
    template: str | None = None
    """Own template with {code} and other placeholders in the place of the built-in one; give it its own version."""
    system: str | None = None
    """Own system prompt; null takes the built-in one."""
    voices: Mapping[str, str] = Field(default_factory=dict)
    """Who asks -> how they ask; none: beginner, developer, modder and issue."""
    questions_per_voice: PositiveInt = 1
    """Questions that each voice asks about one piece of code."""


class GenerationSection(Section):
    mode: Literal["batch", "messages"] = "batch"
    """batch: Message Batches, at half the price within a day. messages: one by one, at once."""
    model: str = "claude-haiku-5-5"
    """The API's name of the model."""
    max_tokens: PositiveInt = 2000
    """Longest reply in tokens, thought included; the ceiling reckons with all of it."""
    effort: Literal["default", "low", "medium", "high", "xhigh", "max"] = "low"
    """How much the model thinks about it. default leaves it out, for models that do not know it."""
    thinking: Literal["default", "adaptive", "disabled"] = "default"
    """default leaves it out: the model's own way holds."""
    structured: bool = True
    """Have the API hold replies to a JSON schema; false only asks for JSON."""
    max_requests: PositiveInt | None = None
    """Ask about the first so many pieces of code only; null asks about all."""
    batch_requests: Annotated[int, Field(ge=1, le=100_000)] = 100_000
    """Most requests of one batch; the API takes 100,000."""
    batch_bytes: Annotated[int, Field(ge=1000, le=256_000_000)] = 100_000_000
    """Most bytes of one batch; the API takes 256 MB, and memory holds a batch three times while it is sent."""
    tries: PositiveInt = 3
    """How often in one run a request may be sent that expires, or fails through no fault of its own."""
    poll_seconds: Seconds = 60.0
    """Seconds between looks at the batches that are under way."""
    settle_seconds: Seconds = 300.0
    """How long a batch is looked for when the answer to its creation was lost."""
    timeout_seconds: Seconds = 600.0
    """Longest that one call may take; a creation uploads the whole batch."""
    max_wait_seconds: Seconds = 300.0
    """Longest wait between two tries of a call, whatever Retry-After says."""
    max_failures: PositiveInt = 8
    """Failures of a call in a row after which the run stops (and can be gone on with)."""
    count_sample: NonNegativeInt = 20
    """Requests whose tokens the API counts, without a cost, for the estimate; 0 only reckons by bytes."""


class PriceSection(Section):
    input: Dollars | None = None
    """Dollars a million input tokens, one by one; null takes the built-in table."""
    output: Dollars | None = None
    """Dollars a million output tokens, one by one; null takes the built-in table."""
    cache_write: Dollars | None = None
    """Dollars a million tokens written to the prompt cache; null takes the table, or twice input."""
    cache_read: Dollars | None = None
    """Dollars a million tokens read from the prompt cache; null takes the table, or input."""
    batch_share: Fraction | None = None
    """What a batch costs of that; null: half."""
    date: str | None = None
    """The day these prices were read."""


class RowsSection(Section):
    min_question_chars: NonNegativeInt = 12
    """Shortest question."""
    max_question_chars: PositiveInt = 1000
    """Longest question."""
    refusals: bool = True
    """Leave out questions that are a refusal."""
    syntax: bool = True
    """Leave out code that the language's grammar cannot read."""
    near_duplicates: Annotated[float, Field(ge=0.1, le=1)] | None = 0.8
    """Jaccard similarity from which two questions are one; null keeps them all."""


class OutputSection(Section):
    file: Path = Path("data/generated.jsonl")
    """The rows, JSONL of messages with their provenance under meta. A report lies beside it."""
    ledger: Path | None = None
    """What was sent, answered and paid, SQLite; null: beside the file, with .ledger.sqlite for its ending."""


class GenerateConfig(Section):
    """Everything `foundry generate` reads."""

    corpus: CorpusSection = CorpusSection()
    """The code that is asked about."""
    prompt: PromptSection = PromptSection()
    """The words that ask."""
    generation: GenerationSection = GenerationSection()
    """The model and how it is asked."""
    price: PriceSection = PriceSection()
    """What it costs, where the built-in table does not say or is out of date."""
    rows: RowsSection = RowsSection()
    """Which questions become rows. Changing these costs nothing: the replies are kept."""
    output: OutputSection = OutputSection()
    """Where the rows and the ledger are."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Dollars that nothing may pass, for this ledger from its beginning; nothing is sent without it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the search for near-duplicates."""
