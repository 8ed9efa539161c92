"""Proofs that this service made something: addresses of downloads, and tokens that stand for a key for a while.

The secret is made once and kept in the journal, so they outlive a restart.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, insert, select

from model_foundry.service import journal as tables
from model_foundry.service.journal import Journal

_HEAD = {"alg": "HS256", "typ": "JWT"}
TOKEN_PREFIX = "eyJ"
"""What every token begins with."""


class Signer:
    """Signs with HMAC-SHA256; tokens are JSON web tokens (RFC 7519)."""

    def __init__(self, journal: Journal, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._secret = bytes.fromhex(journal.run(_secret).result())

    def sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def made(self, text: str, signature: str) -> bool:
        return hmac.compare_digest(self.sign(text).encode(), signature.encode())

    def token(self, subject: str, *, seconds: float) -> str:
        claims = {"sub": subject, "iat": int(self._clock()), "exp": int(self._clock() + seconds)}
        body = f"{_packed(_HEAD)}.{_packed(claims)}"
        return f"{body}.{_text(hmac.new(self._secret, body.encode(), hashlib.sha256).digest())}"

    def subject(self, token: str) -> str | None:
        """Whom a token of ours stands for; None where it is another's, or over."""
        body, _, signature = token.rpartition(".")
        mine = _text(hmac.new(self._secret, body.encode(), hashlib.sha256).digest())
        if not hmac.compare_digest(mine.encode(), signature.encode()):
            return None
        claims = _unpacked(body.partition(".")[2])
        return str(claims["sub"]) if claims["exp"] > self._clock() else None


def _secret(connection: Connection) -> str:
    row = connection.execute(select(tables.meta.c.value).where(tables.meta.c.key == "secret")).first()
    if row is not None:
        return row.value
    made = secrets.token_hex(32)
    connection.execute(insert(tables.meta).values(key="secret", value=made))
    return made


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _packed(values: dict[str, Any]) -> str:
    return _text(json.dumps(values, separators=(",", ":")).encode())


def _unpacked(text: str) -> dict[str, Any]:
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
