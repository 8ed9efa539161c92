"""What the API says became of a request, as the ledger keeps it: one line of a batch's results, or one message.

Everything is checked here, because the SDK checks nothing: a line that can't be understood is no answer, and says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from model_foundry.generate.ledger import Failure, Reply
from model_foundry.generate.pricing import Price, Usage

FINAL_ERRORS = frozenset(
    {
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "billing_error",
    }
)
"""Errors that the same request would meet again."""


class UnreadableResultError(Exception):
    """A line that names no request, or says nothing about it that is known."""


def read_result(line: bytes, *, price: Price) -> tuple[str, Reply | Failure]:
    """One line of a batch's results: its custom_id and what became of it.

    Raises:
        UnreadableResultError: saying what is wrong with the line.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnreadableResultError(f"not JSON ({error})") from error
    custom_id = value.get("custom_id") if isinstance(value, Mapping) else None
    result = value.get("result") if isinstance(value, Mapping) else None
    if not isinstance(custom_id, str) or not isinstance(result, Mapping):
        raise UnreadableResultError("no custom_id with a result")
    kind = result.get("type")
    if kind == "succeeded":
        message = result.get("message")
        if not isinstance(message, Mapping):
            raise UnreadableResultError("a success without a message")
        return custom_id, read_message(message, price=price, batch=True)
    if kind in ("expired", "canceled"):
        return custom_id, Failure(kind)
    if kind == "errored":
        return custom_id, _read_error(result.get("error"))
    raise UnreadableResultError(f"a result of the unknown type {kind!r}")


def read_message(message: Mapping[str, Any], *, price: Price, batch: bool) -> Reply:
    """A message: its text, and what it cost."""
    usage = Usage.from_api(message.get("usage"))
    counted = usage or Usage()
    content = message.get("content")
    blocks = content if isinstance(content, list) else []
    texts = [block.get("text") for block in blocks if isinstance(block, Mapping) and block.get("type") == "text"]
    return Reply(
        text="".join(text for text in texts if isinstance(text, str)),
        cost=None if usage is None else price.cost(usage, batch=batch),
        input_tokens=counted.input_tokens,
        output_tokens=counted.output_tokens,
        cache_write_tokens=counted.cache_write_tokens,
        cache_read_tokens=counted.cache_read_tokens,
        model=_text(message.get("model")),
        stop_reason=_text(message.get("stop_reason")),
    )


def _read_error(error: Any) -> Failure:
    # {"type": "error", "error": {"type", "message"}}; the outer frame is not always there.
    inner = error.get("error", error) if isinstance(error, Mapping) else {}
    kind = _text(inner.get("type")) if isinstance(inner, Mapping) else ""
    message = _text(inner.get("message")) if isinstance(inner, Mapping) else ""
    reason = " ".join(f"{kind or 'unknown error'}: {message}".split())
    return Failure("errored", reason[:500].rstrip(": "), final=kind in FINAL_ERRORS)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
