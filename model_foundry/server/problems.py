"""What goes wrong with a request, and how it is told: OpenAI's shape under /v1, FastAPI's elsewhere.

Nothing a client sent is sent back: neither prompts nor keys come into an answer or a log that way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

MAX_NAME = 100
"""Characters of a field's name, as a client spelled it, that an error repeats."""


class Problem(Exception):
    """A request that is not answered as asked.

    Args:
        status: HTTP status.
        message: one sentence or two for the person who wrote the client.
        param: the field it concerns.
        code: a word for programs.
        retry_after: seconds after which it makes sense to try again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's word for the kind of error."""
        return {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def as_openai(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def as_fastapi(self) -> dict[str, Any]:
        if self.status == 422:
            loc = ["body", *([self.param] if self.param else [])]
            return {"detail": [{"type": self.code or "value_error", "loc": loc, "msg": self.message}]}
        return {"detail": self.message}

    def response(self, path: str) -> Response:
        """The answer to a request for this path."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.as_openai() if speaks_openai(path) else self.as_fastapi(), self.status, headers)


def speaks_openai(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def from_validation(errors: Sequence[Mapping[str, Any]], path: str) -> Response:
    """The answer to a body that does not fit its schema: 422 with FastAPI's list, or 400 in OpenAI's shape."""
    if not speaks_openai(path):
        detail = [
            {"type": error["type"], "loc": [_plain(part) for part in error["loc"]], "msg": _plain(error["msg"], 500)}
            for error in errors[:20]
        ]
        return JSONResponse({"detail": detail}, 422)
    first = errors[0]
    context = first.get("ctx") or {}
    param = context.get("param") or _dotted(first["loc"])
    code = str(first["type"])
    if code == "extra_forbidden":
        return Problem(
            400, f"the parameter {param!r} is not known here", param=param, code="unknown_parameter"
        ).response(path)
    if code == "json_invalid":
        return Problem(400, "the body is not JSON in UTF-8", code=code).response(path)
    message = _plain(first["msg"], 500)
    return Problem(400, f"{param}: {message}" if param else message, param=param, code=code).response(path)


def _dotted(loc: Sequence[Any]) -> str | None:
    parts = [_plain(part) for part in loc if part != "body"]
    return ".".join(str(part) for part in parts) or None


def _plain(part: Any, most: int = MAX_NAME) -> Any:
    """A name that can be written as JSON, whatever a client spelled."""
    if isinstance(part, int):
        return part
    return str(part)[:most].encode("utf-8", "backslashreplace").decode()
