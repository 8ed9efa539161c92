"""A served model as a target: any server that speaks OpenAI's /v1/chat/completions.

It gets conversations and gives texts; its template is its own. Likelihoods of given endings are no part of that API.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx

from model_foundry.errors import FoundryError, UsageError
from model_foundry.evals.suite import Decoding
from model_foundry.evals.targets import Continuation, Likelihood, Messages, OnProgress, Reply

KEY_VARIABLE = "FOUNDRY_API_KEY"
_TRIES = 5
_RETRIED = (408, 409, 429, 500, 502, 503, 504)


class ServerAnswerError(FoundryError):
    """The server answered with an error, or not at all."""


class ServedTarget:
    """A model behind an address.

    Args:
        url: with or without /v1; `#NAME` at its end chooses the model, else the first that it lists.
        key: sent as `Authorization: Bearer`; None sends none.

    Raises:
        UsageError: no address. ServerAnswerError: nobody answers there.
    """

    kind = "served"
    no_likelihoods: str | None = "a server gives texts, not the likelihood of a given ending"

    def __init__(self, url: str, *, key: str | None) -> None:
        parts, host = _address(url)
        base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1") + "/v1", "", ""))
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            self._client = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=600))
        except httpx.InvalidURL as error:
            raise _no_address(url, str(error)) from error
        self._model = parts.fragment or self._first_model()
        self.name = f"{parts.scheme}://{host}{parts.path}#{self._model}"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind}

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        replies: list[Reply] = []
        num_tokens = 0
        with ThreadPoolExecutor(batch_size, thread_name_prefix="foundry-ask") as threads:
            for reply in threads.map(lambda messages: self._answer(messages, decoding), prompts):
                replies.append(reply)
                num_tokens += reply.num_tokens
                if on_progress is not None:
                    on_progress(len(replies), num_tokens, len(prompts))
        return tuple(replies)

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        raise ServerAnswerError(str(self.no_likelihoods), where=self.name)

    def _answer(self, messages: Messages, decoding: Decoding) -> Reply:
        body = {
            "model": self._model, "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature, "top_p": decoding.top_p,
            "seed": decoding.seed,
        }  # fmt: skip
        answer = self._json("POST", "/chat/completions", body)
        try:
            choice = answer["choices"][0]
            text, is_cut = choice["message"].get("content") or "", choice.get("finish_reason") == "length"
            num_tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ServerAnswerError(f"its answer has no text ({error!r})", where=self.name) from error
        return Reply(str(text).strip(), num_tokens, is_cut)

    def _first_model(self) -> str:
        listed = self._json("GET", "/models", None)
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerAnswerError("it lists no models", where=str(self._client.base_url)) from error

    def _json(self, method: str, path: str, body: Any) -> Any:
        """One answer; a busy server is asked again, a few times and later each time."""
        where = f"{self._client.base_url}".rstrip("/") + path
        for attempt in range(1, _TRIES + 1):
            try:
                response = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                hint = "Is it running? foundry serve MODEL starts one."
                raise ServerAnswerError(
                    f"no answer ({error or type(error).__name__})", where=where, hint=hint
                ) from error
            if response.status_code == 200:
                try:
                    return response.json()
                except ValueError as error:
                    raise ServerAnswerError("its answer is not JSON", where=where) from error
            if response.status_code not in _RETRIED or attempt == _TRIES:
                raise _refusal(response, where)
            time.sleep(_wait_s(response, attempt))
        raise AssertionError("the last attempt returns or raises")


def _address(url: str) -> tuple[SplitResult, str]:
    """The parts of an address, and its host and port; a key that is written into it stays out of the latter."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _no_address(url, str(error)) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _no_address(url)
    return parts, parts.hostname + (f":{port}" if port else "")


def _no_address(url: str, why: str = "") -> UsageError:
    what = "not an address of a server" + (f" ({why})" if why else "")
    return UsageError(what, where=url, hint="Write http://HOST:PORT")


def _wait_s(response: httpx.Response, attempt: int) -> float:
    try:
        return min(30.0, max(0.0, float(response.headers.get("retry-after", ""))))
    except ValueError:
        return 0.5 * 2**attempt


def _refusal(response: httpx.Response, where: str) -> FoundryError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"it answered {response.status_code}"
    hint = f"Set {KEY_VARIABLE} to a key of this server." if response.status_code in (401, 403) else None
    return ServerAnswerError(str(message), where=where, hint=hint)
