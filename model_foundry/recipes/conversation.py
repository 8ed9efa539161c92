"""A model with its renderer, ready to be asked: loaded from a name, a run or a checkpoint, as it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from model_foundry.config.schema import ChatConfig, ModelSection
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.models.finder import ModelSource, resolve_model
from model_foundry.rendering import Renderer
from model_foundry.run.directory import RunDirectory, is_run, utc_now
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message, SampledSequence, SamplingParams


class Conversation:
    """One talk; every turn sees the turns before it."""

    def __init__(self, engine: TorchEngine, model_id: str, renderer: Renderer, config: ChatConfig) -> None:
        self._engine, self._model_id, self._renderer, self.config = engine, model_id, renderer, config
        self.messages: list[Message] = []
        if config.system is not None:
            self.messages.append(Message("system", config.system))

    def say(self, text: str) -> Iterator[str]:
        """Add a user turn and stream the answer, which becomes a turn itself.

        Raises:
            EngineError: the talk no longer fits the model's context.
        """
        self.messages.append(Message("user", text))
        prompt = self._renderer.prompt(self.messages)
        params = SamplingParams(
            max_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            seed=self.config.seed,
            stop_token_ids=self._renderer.stop_token_ids,
        )
        tokens: list[int] = []
        shown = ""
        for _, token, _ in self._engine.stream(self._model_id, [prompt], params):
            tokens.append(token)
            reply = self._renderer.reply(tokens)
            # A character that is still missing bytes, or a word that the next token changes, waits.
            if reply.startswith(shown) and not reply.endswith("\ufffd"):
                yield reply[len(shown) :]
                shown = reply
        reply = self._renderer.reply(tokens)
        yield reply[len(shown) :]
        self.messages.append(Message("assistant", reply))


class Reader:
    """A loaded model that is asked and not trained."""

    def __init__(self, section: ModelSection) -> None:
        self.source = resolve_model(section.name)
        template, now = _trained_template(section)
        self.renderer = Renderer(Tokenizer.load(self.source.folder), template, now=now)
        self.engine = TorchEngine(device=section.device, dtype=section.dtype, implementation=section.implementation)
        self.model_id = self.engine.create_model(
            self.source.folder, lora=None, adapter=self.source.adapter, trainable=False
        )

    def sample(self, prompts: list[np.ndarray], params: SamplingParams) -> tuple[SampledSequence, ...]:
        return self.engine.sample(self.model_id, prompts, params)


def open_conversation(config: ChatConfig) -> Conversation:
    """Load what `model.name` names, with the template that it was trained with."""
    reader = Reader(config.model)
    return Conversation(reader.engine, reader.model_id, reader.renderer, config)


def run_of(source: ModelSource, name: str) -> Path | None:
    """The run that a name or its adapter lies in, or None."""
    candidates = [Path(name), *Path(name).parents[:3]]
    if source.adapter is not None:
        candidates += list(source.adapter.parents[:3])
    return next((path for path in candidates if is_run(path)), None)


def _trained_template(section: ModelSection) -> tuple[str, datetime]:
    """The template and date of the run that `section` names, unless another template is asked for."""
    path = Path(section.name)
    run = next((each for each in (path, *path.parents[:3]) if is_run(each)), None)
    if run is None:
        return section.template, utc_now()
    facts = RunDirectory.read(run).facts
    now = datetime.fromisoformat(facts["now"]) if "now" in facts else utc_now()
    if section.template != "auto":
        return section.template, now
    stored = str(facts["config"]["model"]["template"])
    started_in = Path(str(facts["receipt"]["working_directory"]))
    return str(started_in / stored) if stored.endswith(".jinja") else stored, now
