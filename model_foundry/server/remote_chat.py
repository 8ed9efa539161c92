"""A talk with a server instead of a model: any that speaks OpenAI's /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from model_foundry.errors import FoundryError, UsageError


class ServerAnswerError(FoundryError):
    """The server answered with an error, or not at all."""


class RemoteConversation:
    """One talk; every turn sees the turns before it.

    Args:
        url: the server's address, with or without /v1; `#NAME` at its end chooses the model, else the first it lists.
        key: sent as `Authorization: Bearer`; None sends none.
        options: further fields of every request.

    Raises:
        UsageError: not an address. ServerAnswerError: nobody answers there.
    """

    def __init__(self, url: str, *, key: str | None, system: str | None, options: dict[str, Any]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("not an address of a server", where=url, hint="Write http://HOST:PORT")
        base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1") + "/v1", "", ""))
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=600))
        self._options = options
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.model = parts.fragment or self._first_model()

    def say(self, text: str) -> Iterator[str]:
        """Add a user turn and stream the answer, which becomes a turn itself.

        Raises:
            ServerAnswerError: it could not be answered; the turn is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self.messages, "stream": True, **self._options}
        answer = ""
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for piece in _pieces(response):
                    answer += piece
                    yield piece
        except (httpx.HTTPError, FoundryError) as error:
            self.messages.pop()
            raise error if isinstance(error, FoundryError) else _unreachable(error) from error
        self.messages.append({"role": "assistant", "content": answer})

    def _first_model(self) -> str:
        try:
            response = self._client.get("/models")
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerAnswerError("it lists no models", where=str(response.url)) from error


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            raise ServerAnswerError(str(chunk["error"].get("message", chunk["error"])), where=str(response.url))
        for choice in chunk.get("choices", ()):
            if piece := (choice.get("delta") or {}).get("content"):
                yield piece


def _refusal(response: httpx.Response) -> FoundryError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"it answered {response.status_code}"
    hint = "Set FOUNDRY_API_KEY to a key of this server." if response.status_code == 401 else None
    return ServerAnswerError(str(message), where=str(response.url), hint=hint)


def _unreachable(error: httpx.HTTPError) -> FoundryError:
    where = str(error.request.url) if getattr(error, "_request", None) is not None else None
    hint = "Is it running? foundry serve MODEL starts one."
    return ServerAnswerError(f"no answer ({error or type(error).__name__})", where=where, hint=hint)
