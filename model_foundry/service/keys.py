"""API keys: minted, kept as hashes, with a role. Without any, a service on a loopback address takes every key.

A key tells its tenant; tenants see only what is theirs.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from model_foundry.errors import UsageError
from model_foundry.service import journal as tables
from model_foundry.service.journal import Journal
from model_foundry.service.signing import TOKEN_PREFIX, Signer

PREFIX = "tml-"
ROLES = ("user", "admin")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. An admin sees everybody's."""

    owner: str
    role: str = "user"

    @property
    def sees(self) -> str | None:
        """The owner whose things this one may see; None: everybody's."""
        return None if self.role == "admin" else self.owner


@dataclass(frozen=True, slots=True)
class Key:
    key_id: str
    name: str
    role: str
    created: float
    revoked: float | None


class Keys:
    """The keys of one journal, read once; `foundry service keys` writes while the service runs, so by and by again."""

    def __init__(
        self,
        journal: Journal,
        *,
        is_open: bool,
        signer: Signer | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal, self._clock, self._is_open, self._signer = journal, clock, is_open, signer
        self._by_digest: dict[str, Key] = {}
        self.reload()

    def reload(self) -> None:
        def read(connection: Connection) -> dict[str, Key]:
            rows = connection.execute(select(tables.keys).order_by(tables.keys.c.created))
            return {row.digest: Key(row.key_id, row.name, row.role, row.created, row.revoked) for row in rows}

        self._by_digest = self._journal.read(read)

    def list(self) -> list[Key]:
        return list(self._by_digest.values())

    @property
    def takes_every_key(self) -> bool:
        return self._is_open and not self._by_digest

    def tenant(self, secret: str | None) -> Tenant | None:
        """Whose key, or token of ours, this is; None where it is nobody's."""
        if secret and secret.startswith(TOKEN_PREFIX):
            return self._of_token(secret)
        if not secret or not secret.startswith(PREFIX):
            return None
        key = self._by_digest.get(_digest(secret))
        if key is not None:
            return None if key.revoked is not None else Tenant(key.key_id, key.role)
        return Tenant(f"open-{_digest(secret)[:16]}") if self.takes_every_key else None

    def _of_token(self, token: str) -> Tenant | None:
        owner = None if self._signer is None else self._signer.subject(token)
        if owner is None:
            return None
        key = next((key for key in self.list() if key.key_id == owner), None)
        if key is not None:
            return None if key.revoked is not None else Tenant(owner, key.role)
        return Tenant(owner) if self.takes_every_key else None

    def mint(self, name: str, role: str) -> tuple[Key, str]:
        """A new key, and its secret, which is kept nowhere.

        Raises:
            UsageError: the name is taken, or there is no such role.
        """
        if role not in ROLES:
            raise UsageError(f"no role {role!r}", hint=f"There is: {', '.join(ROLES)}.")
        if any(key.name == name and key.revoked is None for key in self.list()):
            raise UsageError(f"a key named {name!r} exists", hint="Revoke it first, or choose another name.")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(f"key-{secrets.token_hex(8)}", name, role, self._clock(), None)
        values = {"key_id": key.key_id, "digest": _digest(secret), "name": name, "role": role, "created": key.created}
        self._journal.run(lambda connection: connection.execute(insert(tables.keys).values(**values))).result()
        self.reload()
        return key, secret

    def revoke(self, name: str) -> Key:
        """Raises UsageError where no key in use has this name."""
        found = next((key for key in self.list() if key.name == name and key.revoked is None), None)
        if found is None:
            raise UsageError(f"no key named {name!r} is in use", hint="List them with: foundry service keys list")
        table = tables.keys
        change = update(table).where(table.c.key_id == found.key_id).values(revoked=self._clock())
        self._journal.run(lambda connection: connection.execute(change)).result()
        self.reload()
        return found


def _digest(secret: str) -> str:
    # A key has 256 random bits: nothing is gained by hashing it slowly.
    return hashlib.sha256(secret.encode()).hexdigest()
