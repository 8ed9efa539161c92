"""What clients send and get: /generate, and the parts of OpenAI's API that are here.

What is not done here is refused by name: an option that changes nothing would be a lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_SEED = 2**63 - 1
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=1_000_000)]
Seed = Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]
Stops = StopString | Annotated[list[StopString], Field(max_length=4)]
Count = Annotated[int, Field(ge=1, le=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "store": (None, False),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None,),
    "audio": (None,),
    "prediction": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Parameters of OpenAI's that are not done here, with the values under which they would do nothing."""


class Body(BaseModel):
    """A request: nothing is converted, nothing unknown is let through."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class GenerateRequest(Body):
    prompt: Annotated[str, Field(min_length=1, pattern=r"\S")]
    """What is asked, as a user's turn; with raw, the text to continue."""
    model: ModelName | None = None
    """One of /v1/models; null takes the first."""
    system: str | None = None
    """System message before it."""
    raw: bool | None = None
    """true: continue the text as it stands; null: only where the model has no chat template."""
    max_tokens: Tokens | None = None
    """Longest answer in tokens."""
    temperature: Temperature = 0.0
    """0 is greedy."""
    top_p: TopP = 1.0
    """Nucleus to sample from."""
    top_k: TopK = 0
    """Likeliest tokens to sample from; 0 takes all."""
    seed: Seed | None = None
    """The same seed gives the same answer; null draws one."""
    stop: Stops | None = None
    """The answer ends before any of these."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class GenerateResponse(BaseModel):
    text: str
    model: str
    finish_reason: Literal["stop", "length"]
    usage: Usage


class OpenAIBody(Body):
    """Refuses, by name, what OpenAI's API has and this server has not."""

    model: ModelName
    temperature: Temperature | None = None
    """Default 1; 0 is greedy."""
    top_p: TopP | None = None
    top_k: TopK | None = None
    """Not OpenAI's: likeliest tokens to sample from; 0 takes all."""
    n: Count | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    """Taken, and not used for anything."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        kept = dict(values)
        for name, neutral in NEUTRAL.items():
            if name not in kept:
                continue
            value = kept.pop(name)
            if not any((type(value) is not bool and value == each) or value is each for each in neutral):
                raise PydanticCustomError(
                    "unsupported_parameter", "{param} is not supported by this server", {"param": name}
                )
        return kept

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> OpenAIBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_stream_options", "{param} is for stream=true", {"param": "stream_options"}
            )
        return self


class StreamOptions(Body):
    include_usage: bool | None = None
    """Send the usage in a chunk of its own before the end."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    """developer is read as system."""
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=100)]
    name: Annotated[str, Field(max_length=100)] | None = None
    """Shown to the chat template, which may use it or not."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(OpenAIBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _rules(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid_logprobs", "{param} needs logprobs=true", {"param": "top_logprobs"})
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise PydanticCustomError(
                "contradiction",
                "max_tokens and {param} are two names of one number",
                {"param": "max_completion_tokens"},
            )
        return self


class CompletionRequest(OpenAIBody):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    """Text, whose control tokens count as plain text, or token ids."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class AdapterRequest(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """What clients will call it."""
    folder: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] | None = None
    """A folder in access.adapter_folder, by its name alone; null: the one called as the adapter."""


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: ErrorBody


class Detail(BaseModel):
    detail: str | list[dict[str, Any]]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "model-foundry"
    parent: str | None = None
    """The base model, for an adapter."""
    checkpoint: str | None = None
    """The checkpoint that answers, for a run: `follow` goes over to newer ones."""
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


OpenAIBody.model_rebuild()
ChatRequest.model_rebuild()
CompletionRequest.model_rebuild()
