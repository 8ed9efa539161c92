"""From a configuration to something that answers: the model found, loaded, and given the names that clients use."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_foundry.config.schema import ModelSection
from model_foundry.config.serve import ServeConfig
from model_foundry.engine.continuous import ContinuousBatch
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ModelError, UsageError
from model_foundry.models import llama_cpp
from model_foundry.models.config import native_obstacle
from model_foundry.models.finder import ModelSource, resolve_model
from model_foundry.models.folder import read_config
from model_foundry.models.gguf_tokenizer import context_of, tokenizer_of
from model_foundry.rendering import Renderer
from model_foundry.run.trained import run_of, trained_model_fields
from model_foundry.server.adapters import Follower, checkpoint_name, find_adapter, renderer_for
from model_foundry.server.backends.base import Backend
from model_foundry.server.backends.llama_cpp import LlamaCppBackend
from model_foundry.server.backends.one_by_one import OneByOne
from model_foundry.server.backends.torch_batch import TorchBackend
from model_foundry.server.catalog import Catalog, ServedModel
from model_foundry.server.kept_options import refuse_others
from model_foundry.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MOST_CONTEXT = 1_000_000
"""For a model that states none."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What the application is made of. `base` is the folder that adapters go on top of, None where none can."""

    backend: Backend
    catalog: Catalog
    base: Path | None
    follower: Follower | None = None


def choose_backend(config: ServeConfig) -> str:
    """`backend` with auto decided.

    Raises:
        UsageError: the back end does not go with what is to be served.
    """
    path = Path(config.model.name).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    if config.backend == "auto":
        return "llama.cpp" if is_gguf and llama_cpp.is_installed() else "torch"
    if config.backend == "llama.cpp" and not is_gguf:
        hint = "Make one with: foundry export RUN --to gguf"
        raise UsageError("llama.cpp serves GGUF files", where=config.model.name, hint=hint)
    return config.backend


def open_model(config: ServeConfig) -> Opened:
    """Find and load what `model.name` names.

    Raises:
        ModelError: it cannot be found, read or served so. UsageError: options contradict each other.
    """
    if choose_backend(config) == "llama.cpp":
        refuse_others(config, "llama.cpp")
        return _open_gguf(config)
    # OpenMP keeps helpers for every thread that computes. Those of a thread that is gone go with it; were they still
    # there beside the batch's, there would be more threads than cores, and then none waits awake for the next product.
    with ThreadPoolExecutor(1, thread_name_prefix="foundry-loading") as loading:
        return loading.submit(_open_torch, config).result()


def _open_torch(config: ServeConfig) -> Opened:
    source = resolve_model(config.model.name)
    fields, now = trained_model_fields(config.model.name)
    section = config.model.model_copy(
        update={key: value for key, value in fields.items() if key not in config.model.model_fields_set}
    )
    renderer = Renderer(Tokenizer.load(source.folder), section.template, now=now)
    engine = _engine(section)
    if native_obstacle(read_config(source.folder)) is not None or section.implementation == "transformers":
        return _open_foreign(config, source, renderer, engine)
    batch, context, facts = _load_batch(config, engine, source.folder)
    backend = TorchBackend(
        batch, renderer.tokenizer, context=context, num_slots=config.batch.max_sequences, facts=facts
    )
    catalog = Catalog(_name_models(config, source, renderer))
    own = own_name(config)
    for served in catalog:
        if served.adapter is not None:
            is_own = served.name == own and source.adapter is not None
            folder = source.adapter if is_own else find_adapter(config.adapters[served.name], source.folder, pull=True)
            assert folder is not None
            backend.add_adapter_now(served.adapter, folder)
            catalog.put(replace(served, checkpoint=checkpoint_name(folder)))
    follower = _follower(config, section, source, backend, catalog)
    return Opened(backend, catalog, source.folder, follower)


def _engine(section: ModelSection) -> TorchEngine:
    return TorchEngine(
        device=section.device,
        dtype=section.dtype,
        implementation=section.implementation,
        attention=section.attention,
        quantization=section.quantization,
    )


def _load_batch(config: ServeConfig, engine: TorchEngine, folder: Path) -> tuple[ContinuousBatch, int, dict[str, Any]]:
    """A native model in a batch of its own, its context in tokens, and what computes it."""
    model_id = engine.create_model(folder, lora=None, trainable=False)
    model = engine.language_model(model_id)
    batch = ContinuousBatch(
        model,
        device=engine.device,
        max_sequences=config.batch.max_sequences,
        max_cache_tokens=config.batch.max_cache_tokens,
        invariant=config.batch.invariant,
    )
    context = min(model.max_position_embeddings or MOST_CONTEXT, config.batch.max_cache_tokens)
    return batch, context, _facts(engine, model_id) | {"invariant": batch.invariant}


def _open_foreign(config: ServeConfig, source: ModelSource, renderer: Renderer, engine: TorchEngine) -> Opened:
    """A model that transformers runs: with its own adapter and no other, one answer after another."""
    if config.adapters or config.follow:
        what = "this model runs through transformers, which takes no adapters beside each other"
        raise UsageError(what, where="adapters" if config.adapters else "follow")
    logger.warning("this model runs through transformers: one answer after another")
    model_id = engine.create_model(source.folder, lora=None, adapter=source.adapter, trainable=False)
    context = engine.language_model(model_id).max_position_embeddings or MOST_CONTEXT
    batch = OneByOne(engine, model_id)
    backend = TorchBackend(batch, renderer.tokenizer, context=context, num_slots=1, facts=_facts(engine, model_id))
    return Opened(backend, Catalog([ServedModel(own_name(config), renderer)]), None)


def _facts(engine: TorchEngine, model_id: str) -> dict[str, Any]:
    described = engine.describe(model_id)
    return {key: described[key] for key in ("device", "dtype", "implementation", "num_threads")}


def _name_models(config: ServeConfig, source: ModelSource, renderer: Renderer) -> list[ServedModel]:
    own = own_name(config)
    if source.adapter is None:
        base, models = own, [ServedModel(own, renderer, checkpoint=checkpoint_name(source.folder))]
    else:
        # The run's own template for the base as well: side by side, only the adapter makes the difference.
        base = base_name(config, source)
        models = [ServedModel(own, renderer, adapter=own, parent=base), ServedModel(base, renderer)]
    for name, folder in config.adapters.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UsageError(
                f"{name!r} cannot be a model's name", where="adapters", hint="Use letters, digits, - and _."
            )
        models.append(ServedModel(name, renderer_for(folder, renderer.tokenizer, renderer), adapter=name, parent=base))
    return models


def _follower(
    config: ServeConfig, section: ModelSection, source: ModelSource, backend: TorchBackend, catalog: Catalog
) -> Follower | None:
    if not config.follow:
        return None
    run = run_of(config.model.name)
    if run is None:
        what = "only a run can be followed"
        raise UsageError(what, where=config.model.name, hint="Name a run directory, or leave follow out.")
    go_over = None
    if source.adapter is None:
        if config.adapters or config.access.adapter_folder is not None:
            what = "this run trains every weight, and adapters go on top of weights that stay"
            raise UsageError(what, where="adapters" if config.adapters else "access.adapter_folder")
        go_over = functools.partial(_go_over, config, section, backend)
    return Follower(run, own_name(config), backend, catalog, every_seconds=config.follow_seconds, go_over=go_over)


async def _go_over(config: ServeConfig, section: ModelSection, backend: TorchBackend, folder: Path) -> None:
    """Load a model beside the one that answers, and let it take the next requests."""
    loading = ThreadPoolExecutor(1, thread_name_prefix="foundry-loading")  # see open_model
    load = functools.partial(_load_batch, config, _engine(section), folder)
    try:
        batch, _, _ = await asyncio.get_running_loop().run_in_executor(loading, load)
    finally:
        loading.shutdown(wait=False, cancel_futures=True)  # waiting for a load here would stop the event loop
    await backend.go_over(batch)


def _open_gguf(config: ServeConfig) -> Opened:
    path = Path(config.model.name).expanduser()
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path))
    tokenizer_folder = tokenizer_of(path)
    renderer = Renderer(Tokenizer.load(tokenizer_folder), config.model.template)
    context = context_of(path, most=config.batch.max_cache_tokens // config.batch.max_sequences)
    backend = LlamaCppBackend(path, context=context, num_slots=config.batch.max_sequences)
    return Opened(backend, Catalog([ServedModel(own_name(config), renderer)]), None)


def base_name(config: ServeConfig, source: ModelSource) -> str:
    """What clients call the base under an adapter."""
    base = _label(str(source.provenance.get("base", source.folder.name)))
    return "base" if base in (own_name(config), *config.adapters) else base


def own_name(config: ServeConfig) -> str:
    """What clients call the model that was named."""
    if config.served_name is not None:
        return config.served_name
    run = run_of(config.model.name)
    return _label(config.model.name if run is None else str(run.resolve()))


def _label(name: str) -> str:
    """A name that clients can type, from a path or a hub id: its last part."""
    last = Path(name.rstrip("/")).name
    last = last[:-5] if last.lower().endswith(".gguf") else last
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).strip(".-")[:64] or "model"
