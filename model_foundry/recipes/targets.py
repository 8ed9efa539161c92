"""From a name to something that can be asked: a model of ours, a GGUF file run by llama.cpp, or a server."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from model_foundry.config.schema import ModelSection
from model_foundry.engine.base import Engine, LocalEngine
from model_foundry.engine.choose import EngineName
from model_foundry.evals.gguf_target import GgufTarget
from model_foundry.evals.targets import EngineTarget, Target
from model_foundry.models import llama_cpp
from model_foundry.models.finder import resolve_model
from model_foundry.models.gguf_tokenizer import context_of, tokenizer_of
from model_foundry.recipes.conversation import Reader, run_of, stored_section
from model_foundry.rendering import Renderer
from model_foundry.run.directory import RunDirectory
from model_foundry.run.trained import trained_model_fields
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Datum, ForwardBackwardOutput, SampledSequence, SamplingParams

logger = logging.getLogger(__name__)
GGUF_CONTEXT, GGUF_SLOTS = 2048, 4


def is_url(name: str) -> bool:
    """Whether a name is a server's address."""
    return name.startswith(("http://", "https://"))


class EngineModel:
    """One model of an engine, as a target needs it."""

    def __init__(self, engine: Engine, model_id: str) -> None:
        self._engine, self._model_id = engine, model_id

    def sample(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Sequence[SampledSequence]:
        return self._engine.sample(self._model_id, prompts, params)

    def forward(self, data: Sequence[Datum]) -> ForwardBackwardOutput:
        return self._engine.forward(self._model_id, data)


def open_target(section: ModelSection, *, engine: EngineName = "auto", now: datetime | None = None) -> Target:
    """Open what `section.name` names. `now` is the date that a template may print; default as trained, else today.

    Raises:
        ModelError: it cannot be found or read. ServerAnswerError: nobody answers at the address.
    """
    name = section.name
    if is_url(name):
        from model_foundry.evals.served_target import KEY_VARIABLE, ServedTarget

        return ServedTarget(name, key=os.environ.get(KEY_VARIABLE, "").strip() or None)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        if llama_cpp.is_installed():
            renderer = Renderer(Tokenizer.load(tokenizer_of(path)), section.template)
            context = context_of(path, most=GGUF_CONTEXT)
            return GgufTarget(path, renderer, context=context, num_slots=GGUF_SLOTS)
        logger.warning("llama.cpp is not installed (extra gguf): %s is read into our own engine instead", name)
    reader = Reader(section, engine=engine, now=now)
    return engine_target(name, reader.engine, reader.model_id, reader.renderer)


def engine_target(name: str, engine: LocalEngine, model_id: str, renderer: Renderer) -> EngineTarget:
    facts = engine.describe(model_id)
    said = {key: facts[key] for key in ("implementation", "device", "dtype") if key in facts}
    return EngineTarget(name, EngineModel(engine, model_id), renderer, context=facts["context"], facts=said)


def base_of(section: ModelSection) -> tuple[ModelSection, datetime | None] | None:
    """What the named run or adapter was trained from, to be asked as that was, and the date that its template saw.

    None where nothing says what it was trained from.
    """
    name = section.name
    if is_url(name):
        return None
    run = run_of(name)
    if run is not None:
        stored, started_in = stored_section(RunDirectory.read(run).facts, "model")
        base = stored.get("name")
        if not isinstance(base, str):  # pretraining starts from nothing
            return None
        fields, now = trained_model_fields(name)
        update = {key: value for key, value in fields.items() if key not in section.model_fields_set}
        found = str(started_in / base) if (started_in / base).exists() else base
        return section.model_copy(update=update | {"name": found}), now
    if name.endswith(".gguf"):
        return None
    source = resolve_model(name)
    return None if source.adapter is None else (section.model_copy(update={"name": str(source.folder)}), None)
