"""A GGUF file as a target, run by llama.cpp in this process: what people will serve is what is measured.

Prompts are given as tokens of the file's own tokenizer and template. llama.cpp batches by itself; threads wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model_foundry.errors import EngineError
from model_foundry.evals.suite import Decoding
from model_foundry.evals.targets import (
    Continuation,
    Likelihood,
    Messages,
    OnProgress,
    Reply,
    by_length,
    ending_tokens,
    num_bytes_of,
    require_room,
)
from model_foundry.models.llama_cpp import LlamaServer, refusal
from model_foundry.rendering import Renderer

_FORCED = 1e4
"""Added to the logit of the token that is to be chosen; the probabilities reported are the model's own all the same."""


class GgufTarget:
    """One file.

    Args:
        context: tokens of the longest row.
        num_slots: answers computed together.

    Raises:
        ModelError: llama.cpp refuses the file. MissingExtraError: it is not installed.
    """

    kind = "llama.cpp"
    no_likelihoods: str | None = None

    def __init__(
        self, path: Path, renderer: Renderer, *, context: int, num_slots: int = 8, num_threads: int | None = None
    ) -> None:
        self.name, self.renderer, self.context, self._num_slots = str(path), renderer, context, num_slots
        # Exactly, so that likelihoods differ from another form's by what the file's weights do.
        self._server = LlamaServer(path, context=context, num_slots=num_slots, num_threads=num_threads, exact=True)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "renderer": self.renderer.name, "context": self.context}

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        rows = [self.renderer.prompt(messages).tolist() for messages in prompts]
        require_room(max((len(row) for row in rows), default=0), decoding.max_new_tokens, self.context)
        replies: dict[int, Reply] = {}
        num_tokens = 0
        with ThreadPoolExecutor(self._num_slots, thread_name_prefix="foundry-llama") as threads:
            for batch in by_length([len(row) for row in rows], batch_size):
                answers = threads.map(lambda index: self._answer(rows[index], decoding), batch)
                for index, reply in zip(batch, answers, strict=True):
                    replies[index] = reply
                    num_tokens += reply.num_tokens
                if on_progress is not None:
                    on_progress(len(replies), num_tokens, len(prompts))
        return tuple(replies[index] for index in range(len(rows)))

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        """Token by token: each is made the choice, and its own probability is asked for."""
        rows = [ending_tokens(self.renderer, each) for each in continuations]
        require_room(max((len(tokens) for tokens, _ in rows), default=0), 1, self.context)
        found = []
        num_tokens = 0
        for continuation, (tokens, num_read) in zip(continuations, rows, strict=True):
            ids = tokens.tolist()
            logprob = sum(self._logprob(ids[:place], ids[place]) for place in range(num_read, len(ids)))
            found.append(Likelihood(logprob, len(ids) - num_read, num_bytes_of(continuation)))
            num_tokens += len(ids) - num_read
            if on_progress is not None:
                on_progress(len(found), num_tokens, len(continuations))
        return tuple(found)

    def _answer(self, prompt: list[int], decoding: Decoding) -> Reply:
        asked = {
            "prompt": prompt, "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature,
            "top_p": decoding.top_p, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": decoding.seed,
        }  # fmt: skip
        answer = self._ask(asked)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        is_cut = choice.get("finish_reason") == "length"
        return Reply(str(choice["text"]).strip(), int(usage.get("completion_tokens", 0)), is_cut)

    def _logprob(self, before: list[int], token: int) -> float:
        asked = {
            "prompt": before, "max_tokens": 1, "temperature": 0.0, "n_probs": 1, "logprobs": 1,
            "logit_bias": [[token, _FORCED]],
        }  # fmt: skip
        content = (self._ask(asked)["choices"][0].get("logprobs") or {}).get("content") or []
        if content and int(content[0]["id"]) == token:
            return float(content[0]["logprob"])
        return self._logprob_of_half(before, token)

    def _logprob_of_half(self, before: list[int], token: int) -> float:
        """For a token that is no whole character: llama.cpp says nothing of it while it is chosen, so a letter is."""
        size = self.renderer.tokenizer.vocab_size
        letter = self.renderer.tokenizer.encode("a")[0]
        asked = {
            "prompt": before, "max_tokens": 1, "temperature": 0.0, "n_probs": size, "logprobs": size,
            "logit_bias": [[letter, _FORCED]],
        }  # fmt: skip
        content = (self._ask(asked)["choices"][0].get("logprobs") or {}).get("content") or []
        for entry in content[0]["top_logprobs"] if content else ():
            if int(entry["id"]) == token:
                return float(entry["logprob"])
        raise EngineError(f"llama.cpp gave no probability for token {token}", where=self.name)

    def _ask(self, asked: dict[str, Any]) -> Any:
        answer = self._server.complete(asked)
        if not isinstance(answer, dict) or "choices" not in answer:
            raise EngineError(f"llama.cpp does not answer ({refusal(answer)})", where=self.name)
        return answer
