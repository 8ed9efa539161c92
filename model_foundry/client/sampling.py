"""Sampling from a checkpoint or from the base, by the method names of the tinker SDK's SamplingClient."""

from __future__ import annotations

import itertools
from typing import Any

from model_foundry.client.futures import Pending
from model_foundry.client.results import SampleOutput
from model_foundry.client.session import Session, load_tokenizer
from model_foundry.client.wire import sample_output, sampling_body, tokens_of
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import SamplingParams


class SamplingClient:
    """One sampler of a service. Requests may be under way at the same time."""

    def __init__(self, session: Session, sampler_id: str) -> None:
        self.sampler_id = sampler_id
        self._session = session
        self._numbers = itertools.count(1)

    def sample(
        self,
        prompt: Any,
        num_samples: int,
        sampling_params: Any,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        topk_sample_logprobs: int = 0,
    ) -> Pending[SampleOutput]:
        """Continue a prompt: token ids as an array, a list, or the SDK's `ModelInput`.

        Args:
            sampling_params: `model_foundry.SamplingParams`, or the SDK's.
            include_prompt_logprobs: score the prompt's own tokens as well.
            topk_prompt_logprobs, topk_sample_logprobs: the likeliest tokens at each place, so many.

        Raises:
            DataError: the prompt is no row of tokens.
        """
        body = {
            "sampling_session_id": self.sampler_id,
            "seq_id": next(self._numbers),
            "num_samples": num_samples,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens_of(prompt).tolist()}]},
            "sampling_params": sampling_body(sampling_params),
            "prompt_logprobs": include_prompt_logprobs,
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "type": "sample",
        }
        return self._session.loop.start(self._sample(body))

    async def _sample(self, body: dict[str, Any]) -> SampleOutput:
        connection = self._session.connection
        accepted = await connection.post("asample", body)
        return sample_output((await connection.result(accepted["request_id"])).content)

    def compute_logprobs(self, prompt: Any) -> Pending[list[float | None]]:
        """The log-probability of each token of a row given those before it; the first has none."""
        pending = self.sample(prompt, 1, SamplingParams(max_tokens=1), include_prompt_logprobs=True)

        async def logprobs() -> list[float | None]:
            return list((await pending).prompt_logprobs or ())

        return self._session.loop.start(logprobs())

    def get_base_model(self) -> str:
        """The base as the service names it; a folder of the service's machine where it has no name of a hub."""
        found = self._session.loop.run(self._session.connection.get(f"samplers/{self.sampler_id}"))
        return str(found["base_model"])

    def get_tokenizer(self) -> Tokenizer:
        base = self.get_base_model()
        return load_tokenizer(base, base)
