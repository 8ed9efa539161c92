"""A service from a configuration, without an address: its parts put together, watched over, and put away again.

`serve` gives it one; a client in the same process talks to its application as it is.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.config.service import ServiceConfig
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import RunError
from model_foundry.models.finder import KNOWN_MODELS, ModelSource, resolve_model
from model_foundry.service.books import Books
from model_foundry.service.curves import Curves
from model_foundry.service.execute import Executor
from model_foundry.service.front import Front, Limits
from model_foundry.service.host import Host
from model_foundry.service.janitor import Janitor
from model_foundry.service.journal import Journal
from model_foundry.service.keys import Keys
from model_foundry.service.sampling import Texts
from model_foundry.service.sampling_batch import SamplingBatch
from model_foundry.service.signing import Signer
from model_foundry.service.worker import Worker

logger = logging.getLogger(__name__)


@asynccontextmanager
async def running(config: ServiceConfig, *, every_key: bool) -> AsyncIterator[Front]:
    """A service at work in this event loop, until the block is left; then every model is written down.

    Args:
        every_key: take any `tml-` key as long as none was minted.

    Raises:
        RunError: the state folder is another service's, in use, or not to be read.
        ModelError: the base cannot be loaded.
    """
    lock = _lock(config.state_dir)
    try:
        journal = Journal(config.state_dir, url=config.journal_url, exclusive=True)
        try:
            async with _at_work(config, journal, every_key) as front:
                yield front
        finally:
            journal.close()
    finally:
        lock.release()


@asynccontextmanager
async def _at_work(config: ServiceConfig, journal: Journal, every_key: bool) -> AsyncIterator[Front]:
    books = Books(journal)
    source = resolve_model(config.base_model)
    host = _host(config, books, source)
    journal.claim("base", host.fingerprint, what="models trained over another base")
    texts = Texts(source.folder)
    samples = SamplingBatch(
        host, texts, max_sequences=config.max_samples_at_once, cache_tokens=config.sampling_cache_tokens
    )
    curves = Curves(books.training_so_far())
    executor = Executor(
        books, host, texts, samples, _names(config, source), curves, _bytes(config.max_checkpoint_mb_per_key)
    )
    host.forget_unloaded()
    worker = Worker(executor, books, asyncio.get_running_loop())
    unfinished = books.unfinished()
    signer = Signer(journal)
    front = Front(
        books, worker, executor, Keys(journal, is_open=every_key, signer=signer),
        Limits(
            config.max_body_bytes, config.max_waiting_per_key, config.max_models_per_key,
            silent_seconds=config.session_timeout_seconds,
        ),
        signer,
        open={operation.request_id: operation for operation in unfinished},
    )  # fmt: skip
    if unfinished:
        logger.info("%s operations were accepted before and not done; doing them now", len(unfinished))
    worker.start(unfinished)
    janitor = Janitor(front, result_seconds=config.result_hours * 3600)
    watching = asyncio.create_task(janitor.run())
    try:
        yield front
    finally:
        watching.cancel()
        # Not in the loop's pool of threads: at the end of the process there is none any more.
        worker.stop()


def _host(config: ServiceConfig, books: Books, source: ModelSource) -> Host:
    engine = TorchEngine(
        device=config.device,
        dtype=config.dtype,
        num_threads=config.num_threads,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    return Host(
        books, engine, source, folder=config.state_dir,
        max_models=config.max_resident_models, snapshot_seconds=config.snapshot_seconds,
        max_bytes=_bytes(config.max_resident_mb),
        shares_passes=config.co_batching == "invariant",
    )  # fmt: skip


def _bytes(megabytes: int | None) -> float:
    return math.inf if megabytes is None else megabytes * 1e6


def _names(config: ServiceConfig, source: ModelSource) -> tuple[str, ...]:
    """Every name the base may be asked for by; the one to tell first."""
    known = KNOWN_MODELS.get(config.base_model.lower())
    names = [*config.model_names, config.base_model, str(source.folder), str(source.folder.resolve())]
    return tuple(dict.fromkeys([*names, *([known.repository] if known else [])]))


def _lock(state_dir: Path) -> FileLock:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        return FileLock.acquire(state_dir / ".lock", wait_seconds=5.0)
    except LockHeldError as error:
        hint = "Stop it, or choose another state_dir."
        raise RunError(f"{error.holder} serves from here", where=str(state_dir), hint=hint) from None
    except OSError as error:
        raise RunError(f"cannot be written ({error.strerror})", where=str(state_dir)) from error
