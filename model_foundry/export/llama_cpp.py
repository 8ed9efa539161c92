"""A GGUF file asked through llama.cpp itself: what it says about the next token, and what tokens it makes of a text.

Nothing of our reading or writing of weights takes part. It knows tokens and probabilities; it compares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
import torch

from model_foundry.errors import ModelError
from model_foundry.models.llama_cpp import LlamaServer, refusal


class LlamaCpp:
    """One file, loaded.

    Args:
        context: the longest row that is asked about, in tokens.
        vocab_size: of the model, to ask for whole distributions.
        adapter: a LoRA adapter as a GGUF, on top.
        socket: from `private_socket`; what text becomes is asked there, for llama.cpp tells it over HTTP alone.
        spelled: a token that is a whole character. It is what gets chosen, for llama.cpp keeps probabilities to itself
            while a character lacks bytes; those reported are the model's own all the same.

    Raises:
        ModelError: llama.cpp refuses the file. MissingExtraError: it is not installed.
    """

    def __init__(
        self, path: Path, *, socket: Path, context: int, vocab_size: int, spelled: int, adapter: Path | None = None
    ) -> None:
        num_threads = min(4, torch.get_num_threads())
        self._server = LlamaServer(
            path, context=max(context + 8, 64), num_threads=num_threads, adapter=adapter, exact=True, socket=socket
        )
        self.path, self.vocab_size, self.spelled, self.socket = path, vocab_size, spelled, socket

    def next_logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 [V]: the natural logarithm of each token's probability after these, at temperature 1.

        Raises:
            ModelError: llama.cpp does not answer, or not for every token.
        """
        asked = {"prompt": list(tokens), "max_tokens": 1, "temperature": 0.0, "n_probs": self.vocab_size}
        asked |= {"logprobs": self.vocab_size, "logit_bias": [[self.spelled, 1e4]]}
        answer = self._server.complete(asked)
        try:
            entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise ModelError(f"llama.cpp does not answer ({refusal(answer)})", where=str(self.path)) from error
        out = torch.full((self.vocab_size,), float("nan"))
        for entry in entries:
            out[entry["id"]] = entry["logprob"]
        if bool(out.isnan().any()):
            what = f"llama.cpp gave {len(entries)} probabilities for {self.vocab_size} tokens"
            raise ModelError(what, where=str(self.path))
        return out

    def tokens(self, text: str) -> list[int]:
        """What llama.cpp makes of a prompt in which control tokens are read as such, its own BOS included.

        Raises:
            ModelError: llama.cpp does not answer.
        """
        asked = {"content": text, "add_special": True, "parse_special": True}
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=60) as client:
                answer = client.post("http://llama.cpp/tokenize", json=asked).json()
            return [int(token) for token in answer["tokens"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"llama.cpp does not say what tokens a text is ({error})", where=str(self.path)) from error

    def stops_at(self, tokens: Sequence[int], token: int) -> bool:
        """Whether generation ends when the model, asked to go on with these, chooses this token.

        Raises:
            ModelError: llama.cpp does not answer.
        """
        asked = {"prompt": list(tokens), "max_tokens": 3, "temperature": 0.0, "logit_bias": [[token, 1e4]]}
        answer = self._server.complete(asked)
        try:
            return answer["choices"][0]["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError) as error:
            raise ModelError(f"llama.cpp does not answer ({refusal(answer)})", where=str(self.path)) from error
