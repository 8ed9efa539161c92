"""A thin seam over the Anthropic SDK: plain values in, plain values out, and three kinds of failure.

What matters about a failed call is whether the API did what was asked: `NotSentError` never left this machine,
`RefusedError` is the API's own word that it did nothing, and after `AnswerLostError` nobody knows. The SDK repeats a
create without an idempotency key, which can make and bill it twice, so its own retries are off for everything. It reads
what the API says without checking it, so that is done here. Knows nothing of ledgers, money or waiting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from model_foundry.errors import FoundryError, MissingExtraError

DEFAULT_BASE_URL = "https://api.anthropic.com"
REFUSALS = frozenset({400, 401, 402, 403, 404, 413, 422, 429, 529})
"""Statuses that say, in the API's own error object, that nothing was done. 5xx, 408 and 409 don't."""
_NEVER_LEFT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
_PAGE_BATCHES = 100
_MAX_LINE_BYTES = 64 << 20


class NotSentError(Exception):
    """No connection could be made: the request never left this machine."""


class AnswerLostError(Exception):
    """The request may have been done or not: the connection broke, or what came back can't be read."""


class RefusedError(Exception):
    """The API answered that it did nothing.

    Attributes:
        kind: its word for it (`rate_limit_error`); `code` its finer one, if any.
        retry_after: seconds that it asks to wait, if it does.
    """

    def __init__(self, status: int, kind: str, message: str, *, code: str | None, retry_after: float | None) -> None:
        super().__init__(f"{status} {kind}: {message}")
        self.status = status
        self.kind = kind
        self.message = message
        self.code = code
        self.retry_after = retry_after

    @property
    def passes(self) -> bool:
        """Whether waiting helps: too many requests now, or overloaded; a spend limit lasts until next month."""
        return self.status in (429, 529) and self.code != "enforced_spend_limit_reached"


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """What the API says of a batch. `counts` has processing, succeeded, errored, canceled and expired."""

    id: str
    status: str
    counts: Mapping[str, int]
    expires_at: str | None
    has_results: bool

    @property
    def num_requests(self) -> int:
        return sum(self.counts.values())

    @property
    def ended(self) -> bool:
        return self.status == "ended"


class Client:
    """The calls that generation makes. Every one raises NotSentError, RefusedError or AnswerLostError, once.

    Args:
        api_key: sent as it is; nothing else is read from the environment but what the SDK reads for itself.
        timeout_seconds: for one call; creating a batch uploads all of it.
    """

    def __init__(self, *, api_key: str, base_url: str | None = None, timeout_seconds: float = 600.0) -> None:
        try:
            import anthropic
        except ModuleNotFoundError as error:
            raise MissingExtraError("anthropic", "generate") from error
        self._sdk = anthropic
        self.base_url = (base_url or DEFAULT_BASE_URL).rstrip("/")
        self._client = anthropic.Anthropic(
            api_key=api_key,
            base_url=self.base_url,
            max_retries=0,
            timeout=timeout_seconds,
            # A redirect would send what is paid for to another place; it is reported instead.
            http_client=anthropic.DefaultHttpxClient(follow_redirects=False),
        )

    def close(self) -> None:
        self._client.close()

    def count_tokens(self, params: Mapping[str, Any]) -> int:
        """Input tokens of a request by the API's counter, which costs nothing."""
        counted = {name: value for name, value in params.items() if name != "max_tokens"}
        body = self._answer(self._client.messages.with_raw_response.count_tokens, **counted)
        if type(body.get("input_tokens")) is not int:
            raise AnswerLostError("the answer to count_tokens has no input_tokens")
        return body["input_tokens"]

    def send_message(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """One message, as the API's JSON. Paid for."""
        body = self._answer(self._client.messages.with_raw_response.create, **params)
        if body.get("type") != "message" or not isinstance(body.get("content"), list):
            raise AnswerLostError("the answer is no message")
        return body

    def create_batch(self, requests: Sequence[Mapping[str, Any]]) -> BatchInfo:
        """A batch of {"custom_id", "params"}. Paid for."""
        return _batch_info(self._answer(self._client.messages.batches.with_raw_response.create, requests=requests))

    def retrieve_batch(self, id: str) -> BatchInfo:
        return _batch_info(self._answer(self._client.messages.batches.with_raw_response.retrieve, id))

    def cancel_batch(self, id: str) -> BatchInfo:
        return _batch_info(self._answer(self._client.messages.batches.with_raw_response.cancel, id))

    def list_batches(self) -> Iterator[BatchInfo]:
        """Every batch of the workspace, newest first, fetched a page at a time as they are asked for."""
        cursor: dict[str, Any] = {}
        while True:
            page = self._answer(self._client.messages.batches.with_raw_response.list, limit=_PAGE_BATCHES, **cursor)
            batches = page.get("data")
            if not isinstance(batches, list):
                raise AnswerLostError("the list of batches has no data")
            found = [_batch_info(batch) for batch in batches]
            yield from found
            if not page.get("has_more") or not found:
                return
            cursor = {"after_id": found[-1].id}

    def results(self, id: str) -> Iterator[bytes]:
        """The lines of a batch's results as they come, in the API's order, undecoded; the stream may break anywhere.

        The SDK's own decoder stops at the first line that isn't JSON, and would hide every line after it.
        """
        with (
            self._failures(),
            self._client.messages.batches.with_streaming_response.results(id) as response,
        ):
            rest = b""
            for chunk in response.iter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line for line in lines if line.strip())
                if len(rest) > _MAX_LINE_BYTES:
                    raise AnswerLostError("a line of the results does not end")
            if rest.strip():
                yield rest

    def _answer(self, call: Any, *values: Any, **params: Any) -> dict[str, Any]:
        with self._failures():
            response = call(*values, **params)
            try:
                body = json.loads(response.http_response.content)
            except ValueError as error:
                raise AnswerLostError(f"the answer is not JSON ({error})") from error
        if not isinstance(body, dict):
            raise AnswerLostError("the answer is not a JSON object")
        return body

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever a call raises as one of the three."""
        try:
            yield
        except (AnswerLostError, GeneratorExit):
            raise
        except self._sdk.APIStatusError as error:
            raise _status_failure(error) from error
        except self._sdk.APIConnectionError as error:
            cause = error.__cause__
            if type(cause).__name__ in _NEVER_LEFT:
                raise NotSentError(_one_line(cause)) from error
            raise AnswerLostError(_one_line(cause or error)) from error
        except TypeError as error:
            raise FoundryError(
                f"the installed anthropic {self._sdk.__version__} does not take these parameters: {error}",
                hint="Install a newer one: pip install --upgrade 'model-foundry[generate]'",
            ) from error
        except Exception as error:
            # A body that breaks off while it is read raises the transport's own errors through the SDK.
            raise AnswerLostError(f"{type(error).__name__}: {_one_line(error)}") from error


def _status_failure(error: Any) -> Exception:
    body = error.body if isinstance(error.body, Mapping) else {}
    said = body.get("error")
    if error.status_code not in REFUSALS or not isinstance(said, Mapping) or not isinstance(said.get("type"), str):
        message = said.get("message") if isinstance(said, Mapping) else None
        return AnswerLostError(f"status {error.status_code}: {message or 'no error object of the API'}")
    details = said.get("details")
    code = details.get("error_code") if isinstance(details, Mapping) else None
    return RefusedError(
        error.status_code,
        said["type"],
        str(said.get("message", "")),
        code=code if isinstance(code, str) else None,
        retry_after=_retry_after(error.response.headers.get("retry-after")),
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds; a date or nonsense is no number and means no wish."""
    try:
        seconds = float(value) if value is not None else None
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds < float("inf") else None


def _batch_info(body: Any) -> BatchInfo:
    counts = body.get("request_counts") if isinstance(body, Mapping) else None
    if not isinstance(counts, Mapping) or not isinstance(body.get("id"), str) or not body["id"]:
        raise AnswerLostError("the answer is no batch")
    if body.get("processing_status") not in ("in_progress", "canceling", "ended"):
        raise AnswerLostError(f"a batch has the unknown state {body.get('processing_status')!r}")
    expires_at = body.get("expires_at")
    return BatchInfo(
        id=body["id"],
        status=body["processing_status"],
        counts={name: value for name, value in counts.items() if type(value) is int},
        expires_at=expires_at if isinstance(expires_at, str) else None,
        has_results=isinstance(body.get("results_url"), str),
    )


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
