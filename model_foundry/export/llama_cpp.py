"""A GGUF file asked through llama.cpp itself, in this process: what it says about the next token.

The weights are read by the program that people will serve them with; nothing of our reading or writing takes part. It
knows tokens and probabilities; it compares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from model_foundry.errors import MissingExtraError, ModelError


def is_installed() -> bool:
    """Whether this Python has llama.cpp."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """One file, loaded. Caches are kept in float32, so that only the weights' precision is measured.

    Args:
        context: the longest row that is asked about, in tokens.
        vocab_size: of the model, to ask for whole distributions.
        adapter: a LoRA adapter as a GGUF, on top.
        spelled: a token that is a whole character. It is what gets chosen, for llama.cpp keeps probabilities to itself
            while a character lacks bytes; those reported are the model's own all the same.

    Raises:
        ModelError: llama.cpp refuses the file. MissingExtraError: it is not installed.
    """

    def __init__(self, path: Path, *, context: int, vocab_size: int, spelled: int, adapter: Path | None = None) -> None:
        try:
            library: Any = import_module("xllamacpp")  # compiled, so no type is known
        except ImportError as error:
            raise MissingExtraError("xllamacpp", "gguf") from error
        parameters: Any = library.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = max(context + 8, 64)
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = min(4, torch.get_num_threads())
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.cache_type_k = parameters.cache_type_v = library.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            parameters.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.path, self.vocab_size, self.spelled = path, vocab_size, spelled
        try:
            self._server: Any = library.Server(parameters)
        except RuntimeError as error:
            what = "it" if adapter is None else f"it with {adapter.name} on top"
            raise ModelError(f"llama.cpp does not load {what} ({error})", where=str(path)) from error

    def next_logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 [V]: the natural logarithm of each token's probability after these, at temperature 1.

        Raises:
            ModelError: llama.cpp does not answer, or not for every token.
        """
        asked = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0.0, "n_probs": self.vocab_size}
        asked |= {"logprobs": self.vocab_size, "logit_bias": [[self.spelled, 1e4]]}
        answer = self._server.handle_completions(asked)
        try:
            entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            message = answer.get("error", {}).get("message", answer) if isinstance(answer, dict) else answer
            raise ModelError(f"llama.cpp does not answer ({message})", where=str(self.path)) from error
        out = torch.full((self.vocab_size,), float("nan"))
        for entry in entries:
            out[entry["id"]] = entry["logprob"]
        if bool(out.isnan().any()):
            what = f"llama.cpp gave {len(entries)} probabilities for {self.vocab_size} tokens"
            raise ModelError(what, where=str(self.path))
        return out

    def num_tokens(self, text: str) -> int:
        """How many tokens llama.cpp makes of a text in which control tokens are read as such."""
        answer = self._server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0.0})
        return int(answer["usage"]["prompt_tokens"])

    def stops_at(self, tokens: Sequence[int], token: int) -> bool:
        """Whether generation ends when the model, asked to go on with these, chooses this token.

        Raises:
            ModelError: llama.cpp does not answer.
        """
        asked = {"prompt": list(tokens), "max_tokens": 3, "temperature": 0.0, "logit_bias": [[token, 1e4]]}
        answer = self._server.handle_completions(asked)
        try:
            return answer["choices"][0]["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError) as error:
            raise ModelError("llama.cpp does not answer", where=str(self.path)) from error
