"""From a piece of code to a request: its parameters, its content hash, and the most it can cost.

The hash covers everything that decides the reply (model, prompt, parameters, code) and nothing else, so the same
question about the same code is one request however often a corpus holds it. Knows nothing of sending.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_foundry.data.code.units import CodeUnit
from model_foundry.generate.pricing import Price
from model_foundry.generate.prompts import Prompt

REQUEST_OVERHEAD_TOKENS = 1000
"""What the API may add to a prompt by itself: the frame of the messages, its words about structured output."""
REQUEST_OVERHEAD_BYTES = 64
"""What a batch's body holds around a request's parameters beside its custom_id."""


@dataclass(frozen=True)
class Recipe:
    """How requests are made. Two recipes that differ give different hashes.

    Attributes:
        effort, thinking: None leaves the parameter out, so that the model's default holds.
        structured: ask for the API's structured output; otherwise the prompt alone asks for JSON.
    """

    model: str
    max_tokens: int
    prompt: Prompt
    price: Price
    structured: bool = True
    effort: str | None = None
    thinking: str | None = None

    def parameters(self) -> dict[str, Any]:
        """What every request has in common."""
        shared: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "system": self.prompt.system}
        output: dict[str, Any] = {}
        if self.structured:
            output["format"] = {"type": "json_schema", "schema": self.prompt.schema()}
        if self.effort is not None:
            output["effort"] = self.effort
        if output:
            shared["output_config"] = output
        if self.thinking is not None:
            shared["thinking"] = {"type": self.thinking}
        return shared

    def params(self, unit: CodeUnit) -> dict[str, Any]:
        """The parameters of one request, for the Messages API and for a batch alike."""
        return {**self.parameters(), "messages": [{"role": "user", "content": self.prompt.render(unit)}]}

    def key(self, unit: CodeUnit) -> str:
        """Content hash, 64 hex digits."""
        identity = {"parameters": self.parameters(), "prompt": self.prompt.label, "unit": unit.sha256}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """What a ledger of this recipe must agree with, in words for when it doesn't."""
        return {
            "generation.model": self.model,
            "generation.max_tokens": self.max_tokens,
            "generation.effort": self.effort,
            "generation.thinking": self.thinking,
            "generation.structured": self.structured,
            "prompt (its version and words)": self.prompt.label,
        }

    def worst_case(self, params: Mapping[str, Any], *, batch: bool) -> int:
        """Nano-dollars that this request cannot exceed."""
        return self.price.worst_case(
            max_input_tokens=max_input_tokens(params), max_output_tokens=self.max_tokens, batch=batch
        )


def max_input_tokens(params: Mapping[str, Any]) -> int:
    """An upper bound of a request's prompt in tokens.

    A token of a byte-level tokenizer stands for at least one byte, so there are no more tokens than bytes of text.
    """
    texts = [str(params.get("system", "")), *(str(message["content"]) for message in params["messages"])]
    if "output_config" in params:
        texts.append(json.dumps(params["output_config"]))
    return sum(len(text.encode("utf-8", "replace")) for text in texts) + REQUEST_OVERHEAD_TOKENS


def body_bytes(params: Mapping[str, Any], custom_id: str) -> int:
    """An upper bound of a request's share of a batch's body."""
    return len(json.dumps(params)) + len(custom_id) + REQUEST_OVERHEAD_BYTES


def unit_to_json(unit: CodeUnit) -> str:
    return json.dumps(dataclasses.asdict(unit), sort_keys=True)


def unit_from_json(text: str) -> CodeUnit:
    names = {item.name for item in dataclasses.fields(CodeUnit)}
    return CodeUnit(**{name: value for name, value in json.loads(text).items() if name in names})
