"""The schema of `foundry service`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from model_foundry.config.section import PositiveInt, Section

Seconds = Annotated[float, Field(gt=0)]


class ServiceConfig(Section):
    """Everything `foundry service` reads."""

    base_model: str = "smollm2-135m-instruct"
    """What every model is an adapter over: a known name, a Hugging Face folder, a GGUF file or a hub id."""
    model_names: tuple[str, ...] = ()
    """Other names that clients may ask for it by; the first is the one that clients are told."""
    host: str = "127.0.0.1"
    """Address to listen on. On a loopback address every tml- key is taken until one was minted; elsewhere none is."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and says it."""
    state_dir: Path = Path("runs/service")
    """Where the journal, snapshots and checkpoints live. It can be copied to another machine and started there."""
    journal_url: str | None = None
    """postgresql://USER@HOST:PORT/NAME, to keep the journal there; default a SQLite file in state_dir. The password
    comes from PGPASSWORD or ~/.pgpass. Snapshots and checkpoints stay in state_dir."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: CUDA, then MPS, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the base. auto: bfloat16 where the device multiplies it natively, else float32."""
    num_threads: PositiveInt | None = None
    """CPU threads; default every core. Part of what makes a restart go on bit for bit."""
    micro_batch_tokens: PositiveInt = 512
    """Split passes into pieces of at most this many tokens. Samples of other clients go on between two pieces. Part of
    what makes a restart go on bit for bit."""
    co_batching: Literal["invariant", "off"] = "invariant"
    """Do short passes of several models as one, up to micro_batch_tokens. invariant: where each gets the same bits as
    alone, which is said at the start where it is not so; in bfloat16 the layers are kept twice more for it. off: never.
    Part of what makes a restart go on bit for bit."""
    max_samples_at_once: PositiveInt = 64
    """Samples that are computed together; one key has at most half of these places. More wait."""
    sampling_cache_tokens: Annotated[int, Field(ge=256)] = 65536
    """Keys and values kept for samples, in tokens; the memory is taken when it is first needed. No text, prompt and
    answer together, can be longer."""
    max_resident_models: PositiveInt = 16
    """Models being trained that are in memory at once, and as many samplers; the others wait on the disk."""
    max_resident_mb: PositiveInt | None = None
    """Memory for adapters being trained, with gradients and moments, in MB; with more, those not used for longest wait
    on the disk. Default: as much as max_resident_models of them take."""
    max_models_per_key: PositiveInt = 64
    """Models that one key may have; with more, creating one is answered with 429. Those of finished and of silent
    sessions do not count, and beyond this number they are unloaded, longest silent first."""
    max_waiting_per_key: PositiveInt = 4096
    """Operations of one key that may wait; with more, another is answered with 429."""
    max_checkpoint_mb_per_key: PositiveInt | None = None
    """Checkpoints of one key on the disk, in MB; with as many or more, another save fails. Default: no limit."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64_000_000
    """Largest request body, unpacked."""
    snapshot_seconds: Seconds = 10.0
    """Work on a model after which it is written down; what was done since is done again after a crash."""
    session_timeout_seconds: Seconds = 600.0
    """A session that was not heard of for so long gives up its memory; it goes on when it is heard of again. So
    long after a session was finished, its models are unloaded."""
    result_hours: Annotated[float, Field(gt=0)] = 24.0
    """Hours for which the result of an operation can be asked for again."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged on the console."""
