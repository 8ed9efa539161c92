"""Request bodies as they come off the wire: bounded, unpacked, parsed; and what a refusal looks like."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
import zstandard
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

Body = TypeVar("Body", bound=BaseModel)
PROTOBUF = "application/x-protobuf"
_SMALL_BYTES = 256_000
"""What is parsed at once; larger bodies in a thread, so that nobody waits for them."""


@dataclass(slots=True)
class Refusal(Exception):
    """A request that is answered with an error status and nothing else."""

    status: int
    what: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        body = orjson.dumps({"detail": self.what, "error": self.what})
        return Response(body, self.status, dict(self.headers), media_type="application/json")


def reply(values: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(values), status, media_type="application/json")


async def read_bytes(request: Request, *, limit: int) -> bytes:
    """The body, unpacked where it is zstd; never more than `limit` bytes of it in memory.

    Raises:
        Refusal: too large, packed in another way, or damaged.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    data = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "zstd":
        return await asyncio.to_thread(_unpack, data, limit)
    if encoding not in ("identity", ""):
        raise Refusal(415, f"content-encoding {encoding} is not read here; zstd is")
    return data


def _unpack(data: bytes, limit: int) -> bytes:
    # Twice: bounded first, because a small body may claim any size; then to see whether its end is there.
    try:
        out = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(limit + 1)
        if len(out) > limit:
            raise _too_large(limit)
        whole = zstandard.ZstdDecompressor().decompressobj()
        whole.decompress(data)
    except zstandard.ZstdError as error:
        raise Refusal(400, f"the body is not zstd ({error})") from error
    if not whole.eof:
        raise Refusal(400, "the zstd body is cut off")
    return out


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is over {limit:,} bytes, the most that this service takes")


async def read_json(request: Request, *, limit: int) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refusal: it is none.
    """
    return await parse_json(await read_bytes(request, limit=limit))


async def read_body(request: Request, kind: type[Body], *, limit: int) -> Body:
    """The body as one of `requests`.

    Raises:
        Refusal: it is none; every problem is named by field.
    """
    try:
        return kind.model_validate(await read_json(request, limit=limit))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise Refusal(422, f"{request.url.path.removeprefix('/api/v1/')}: {told}") from error


async def parse_json(data: bytes) -> dict[str, Any]:
    try:
        values = orjson.loads(data) if len(data) < _SMALL_BYTES else await asyncio.to_thread(orjson.loads, data)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise Refusal(400, "the body is not a JSON object")
    return values


def text(values: Mapping[str, Any], key: str) -> str:
    """A required text of a body.

    Raises:
        Refusal: it is missing, or something else.
    """
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise Refusal(422, f"{key} is {value!r}; it must be a text")
    return value


def whole_number(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < 2**53):
        raise Refusal(422, f"{key} is {value!r}; it must be a whole number")
    return value
