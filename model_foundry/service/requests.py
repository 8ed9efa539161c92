"""The JSON bodies of operations, checked to the last key: what is not known is refused, never ignored."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from model_foundry.errors import DataError

MAX_RANK = 512
MIN_TTL_SECONDS, MAX_TTL_SECONDS = 3600, 10 * 366 * 86400
_CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def _as_checkpoint_name(value: str) -> str:
    if not _CHECKPOINT_NAME.fullmatch(value):
        what = "must be 1 to 200 letters, digits, '.', '_' and '-', a letter or digit first"
        raise ValueError(f"{what} (it is {value!r})")
    return value


CheckpointName = Annotated[str, AfterValidator(_as_checkpoint_name)]
TtlSeconds = Annotated[int, Field(ge=MIN_TTL_SECONDS, le=MAX_TTL_SECONDS)]


def _as_texts(value: Any) -> Any:
    """The SDK lets any JSON stand for a value; it is kept as the text that a number or a list is written as."""
    if not isinstance(value, dict):
        return value
    try:
        return {key: each if isinstance(each, str) else json.dumps(each) for key, each in value.items()}
    except RecursionError:
        raise ValueError("it is nested too deep") from None


Metadata = Annotated[dict[str, str] | None, BeforeValidator(_as_texts)]
CLONE_BLOCK = 1_000_000_000
"""A cloned sampler's numbers begin at its own multiple of this."""
MAX_CLONES = 2**53 // CLONE_BLOCK
ClientNumber = Annotated[int, Field(ge=0, lt=2**53)]


class Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class LoraBody(Body):
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerBody(Body):
    type: Literal["adamw"] = "adamw"


class CreateSession(Body):
    tags: list[str] | None = None
    user_metadata: Metadata = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None
    type: Literal["create_session"] = "create_session"


class CreateModel(Body):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: Metadata = None
    lora_config: LoraBody | None = None
    optimizer_config: OptimizerBody = OptimizerBody()
    """Other optimizers of the protocol are not published."""
    type: Literal["create_model"] = "create_model"


class LoadWeights(Body):
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: Metadata = None
    path: str
    optimizer: bool
    optimizer_config: OptimizerBody | None = None
    weights_access_token: None = None
    type: Literal["load_weights"] = "load_weights"

    @model_validator(mode="after")
    def _has_one_address(self) -> Self:
        if self.model_id is None:
            return self
        for name in ("session_id", "model_seq_id", "user_metadata", "optimizer_config"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for a new model, and model_id names one that is there")
        return self


class CreateSamplingSession(Body):
    session_id: str
    sampling_session_seq_id: ClientNumber
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class MoveSession(Body):
    project_id: str | None


class SetTtl(Body):
    ttl_seconds: TtlSeconds | None


class FuturesTarget(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Field(ge=0, le=MAX_CLONES)] = 0


class RetrieveFutures(Body):
    target: FuturesTarget
    prev_cursor: ClientNumber = 0
    timeout: Annotated[float, Field(ge=0)] | None = None
    retrieved_request_ids: list[str] = []
    """Whose results need not be kept for this client; they are kept for as long as all others."""


class AdamBody(Body):
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class OptimStep(Body):
    adam_params: AdamBody
    model_id: str
    seq_id: int | None = None
    type: Literal["optim_step"] = "optim_step"


class SaveWeights(Body):
    model_id: str
    path: CheckpointName | None = None
    seq_id: int | None = None
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: Metadata = None
    type: Literal["save_weights"] = "save_weights"


class SaveForSampler(Body):
    model_id: str
    path: CheckpointName | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: int | None = None
    ttl_seconds: TtlSeconds | None = None
    user_metadata: Metadata = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class SaveExternal(Body):
    model_id: str
    path: CheckpointName
    seq_id: int | None = None
    ttl_seconds: TtlSeconds | None = None
    age_encryption_recipients: Annotated[list[str], Field(max_length=0)] | None = None
    """Files are not encrypted here."""
    user_metadata: Metadata = None
    type: Literal["save_weights_external"] = "save_weights_external"


class UnloadModel(Body):
    model_id: str
    seq_id: int | None = None
    type: Literal["unload_model"] = "unload_model"


class SamplingBody(Body):
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: int = -1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


Alternatives = Annotated[int, Field(ge=0, le=1024)]


class Sample(Body):
    num_samples: Annotated[int, Field(ge=1, le=1024)] = 1
    prompt: dict[str, Any]
    sampling_params: SamplingBody
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    topk_prompt_logprobs: Alternatives = 0
    topk_sample_logprobs: Alternatives = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Alternatives = 0
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


class CopyWeights(Body):
    """Into a session and under a number of its own, or into a session that is made for the copy."""

    session_id: str | None = None
    model_seq_id: ClientNumber | None = None
    destination_project_id: str | None = None
    source_path: str
    ttl_seconds: TtlSeconds | None = None
    weights_access_token: None = None

    @model_validator(mode="after")
    def _has_one_destination(self) -> Self:
        if self.session_id is None and self.model_seq_id is not None:
            raise ValueError("model_seq_id needs session_id")
        if self.session_id is not None and self.model_seq_id is None:
            raise ValueError("session_id needs model_seq_id")
        if self.session_id is not None and self.destination_project_id is not None:
            raise ValueError("destination_project_id is for a copy without session_id")
        return self


class SearchOwner(Body):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: Annotated[list[str], Field(min_length=1, max_length=10)] | None = None


class SearchCursor(Body):
    last_created_at: AwareDatetime
    last_session_id: str


FinishReason = Literal["success", "errored", "interrupted"]


class FinishBody(Body):
    type: FinishReason


class FinishSession(Body):
    reason: FinishBody | None = None
    detail: str | None = None


class StatusQuery(Body):
    type: Literal["active", "cancelled", "failed"]


class FinishedQuery(Body):
    type: Literal["client_finished"]
    reasons: Annotated[list[FinishReason], Field(min_length=1)] | None = None


class SessionSearch(Body):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: Annotated[str, Field(min_length=1)] | None = None
    owner: SearchOwner = SearchOwner()
    statuses: (
        Annotated[list[Annotated[StatusQuery | FinishedQuery, Field(discriminator="type")]], Field(min_length=1)] | None
    ) = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: SearchCursor | None = None


REQUESTS: dict[str, type[Body]] = {
    "create_model": CreateModel,
    "load_weights": LoadWeights,
    "optim_step": OptimStep,
    "save_weights": SaveWeights,
    "save_weights_for_sampler": SaveForSampler,
    "save_weights_external": SaveExternal,
    "unload_model": UnloadModel,
    "asample": Sample,
}
"""Operation -> its body in JSON; passes are `tensors`' affair."""

_SENTENCES = {
    "extra_forbidden": "is not known to this service, and nothing is ignored",
    "missing": "is missing",
}


def read_request(kind: str, values: dict[str, Any]) -> Any:
    """The checked body of an operation.

    Raises:
        DataError: with every problem, by field.
    """
    try:
        return REQUESTS[kind].model_validate(values)
    except ValidationError as error:
        told = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            got = "" if isinstance(problem["input"], dict | list) else f" (it is {problem['input']!r})"
            told.append(f"{where} {_SENTENCES.get(problem['type']) or _sentence(problem['msg'], got)}")
        raise DataError("; ".join(dict.fromkeys(told)), where=kind) from error


def _sentence(message: str, got: str) -> str:
    """A validator's own sentence as it is; one of pydantic's, and what it is about."""
    own = message.removeprefix("Value error, ")
    return own if own != message else message[0].lower() + message[1:] + got
