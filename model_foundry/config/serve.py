"""The schema of `foundry serve`: what is served, where, to whom, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model_foundry.config.schema import ModelSection
from model_foundry.config.section import NonNegativeInt, PositiveInt, Section

Seconds = Annotated[float, Field(gt=0)]


class AccessSection(Section):
    keys_file: Path | None = None
    """Keys by name, hashed (foundry serve keys add NAME); null: FOUNDRY_API_KEY where it is set, else no key."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """What a key without a rate of its own may ask, and an address where there are no keys; null does not limit."""
    burst: PositiveInt = 20
    """Requests that may come at once before that rate counts."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the server from a browser; none may until one is named."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that a Host header may hold where no key protects the server, beside those of this machine."""
    adapter_folder: Path | None = None
    """Adapters in this folder may be added by name while the server runs, by a key with admin rights."""


class LimitsSection(Section):
    body_bytes: PositiveInt = 2_000_000
    """Longest request body."""
    header_bytes: Annotated[int, Field(ge=1024)] = 16_384
    """Longest request line with headers."""
    header_seconds: Seconds = 10.0
    """A connection that has not sent its headers by then is closed."""
    body_seconds: Seconds = 30.0
    """A request whose body has not come by then is closed."""
    connections: PositiveInt = 900
    """Most open connections; the one that waits longest without a request makes room for the next."""
    prompt_tokens: PositiveInt | None = None
    """Longest prompt; null: what the model's context leaves."""
    max_tokens: PositiveInt = 2048
    """Longest answer that may be asked for."""
    n: PositiveInt = 8
    """Most answers of one request: n times its prompts."""
    request_seconds: Seconds = 300.0
    """A request that is not answered by then ends with an error."""
    waiting: NonNegativeInt = 256
    """Answers that may wait for a place in the batch; more get 503 and Retry-After."""
    waiting_per_client: PositiveInt = 64
    """Of these for one key, or one address where there are no keys; more get 429 and Retry-After."""
    drain_seconds: Seconds = 30.0
    """How long running requests may go on after SIGTERM."""


class BatchSection(Section):
    max_sequences: PositiveInt = 16
    """Answers that are computed together."""
    max_cache_tokens: PositiveInt = 65_536
    """Tokens that the key/value cache holds, of all answers together."""
    invariant: bool | None = None
    """The same answer whatever else is in the batch (torch); null: on a CPU yes, elsewhere no."""


class ServeConfig(Section):
    """Everything `foundry serve` reads."""

    model: ModelSection = ModelSection()
    """The model, run, checkpoint, adapter or GGUF file to serve."""
    backend: Literal["auto", "torch", "llama.cpp", "vllm", "mlx"] = "auto"
    """What computes. auto: llama.cpp for a GGUF file where it is installed, else torch. vllm and mlx are started."""
    engine_python: Path | None = None
    """The Python that has vllm or mlx_lm installed; null: this one."""
    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs a key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and says which."""
    served_name: str | None = None
    """What clients call the model; null: the last part of its name."""
    adapters: Mapping[str, str] = Field(default_factory=dict)
    """Further adapters over the same base: name -> run, checkpoint or adapter folder."""
    follow: bool = False
    """Go over to the run's newest checkpoint while it is being trained."""
    follow_seconds: Seconds = 5.0
    """Seconds between looks for a newer checkpoint."""
    default_max_tokens: PositiveInt = 256
    """Length of an answer where a request to /generate names none."""
    access: AccessSection = AccessSection()
    """Who may ask, and how often."""
    limits: LimitsSection = LimitsSection()
    """Bounds on what one request and all of them may take."""
    batch: BatchSection = BatchSection()
    """How answers share the model (torch and llama.cpp)."""
