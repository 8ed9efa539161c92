"""A model with its renderer, ready to be asked: loaded from a name, a run or a checkpoint, as it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import numpy as np

from model_foundry.config.schema import ChatConfig, ModelSection
from model_foundry.engine.base import LocalEngine
from model_foundry.engine.choose import EngineName, choose_engine, open_engine
from model_foundry.models.finder import resolve_model
from model_foundry.rendering import Renderer
from model_foundry.run.trained import run_of as run_of
from model_foundry.run.trained import stored_section as stored_section
from model_foundry.run.trained import trained_model_fields
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message, SampledSequence, SamplingParams

USUAL_ANSWER_TOKENS = 256
_ENGINE_OPTIONS = ("device", "dtype", "implementation", "attention", "quantization")


class Conversation:
    """One talk; every turn sees the turns before it."""

    def __init__(self, engine: LocalEngine, model_id: str, renderer: Renderer, config: ChatConfig) -> None:
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
            max_tokens=self.config.max_new_tokens or self._room(len(prompt)),
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

    def _room(self, num_prompt_tokens: int) -> int:
        """Tokens of an answer where nobody has said how many."""
        context = self._engine.describe(self._model_id)["context"]
        return USUAL_ANSWER_TOKENS if context is None else max(1, min(USUAL_ANSWER_TOKENS, context - num_prompt_tokens))


class Reader:
    """A loaded model that is asked and not trained. `now`: the date for its template; default as it was trained."""

    def __init__(self, section: ModelSection, *, engine: EngineName = "auto", now: datetime | None = None) -> None:
        self.source = resolve_model(section.name)
        section, trained_now = as_trained(section)
        self.renderer = Renderer(Tokenizer.load(self.source.folder), section.template, now=now or trained_now)
        options = {name: getattr(section, name) for name in _ENGINE_OPTIONS}
        self.engine = open_engine(choose_engine(engine, folder=self.source.folder, options=options).name, options)
        self.model_id = self.engine.create_model(
            self.source.folder, lora=None, adapter=self.source.adapter, trainable=False
        )

    def sample(self, prompts: list[np.ndarray], params: SamplingParams) -> tuple[SampledSequence, ...]:
        return self.engine.sample(self.model_id, prompts, params)


def open_conversation(config: ChatConfig) -> Conversation:
    """Load what `model.name` names, with the template that it was trained with."""
    reader = Reader(config.model, engine=config.engine)
    return Conversation(reader.engine, reader.model_id, reader.renderer, config)


def as_trained(section: ModelSection) -> tuple[ModelSection, datetime]:
    """The section with what it leaves open as the run that it names was trained, and the date that run's template saw.

    The same compute type as in training gives the answers that its report shows.
    """
    fields, now = trained_model_fields(section.name)
    return section.model_copy(update={k: v for k, v in fields.items() if k not in section.model_fields_set}), now
