"""Who may ask, and how often: keys by name, hashed at rest, and a token bucket for each.

A key is 32 random bytes, so one sha256 is as good as a slow hash: there is nothing to guess. It is shown once, when it
is made. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.errors import ConfigError, UsageError

KEY_PREFIX = "mf-"
MIN_KEY_CHARS = 16
"""Shortest key that is taken from the environment; ours are longer."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Key:
    """A key's record, without the key.

    Attributes:
        sha256: hex digest of the key.
        requests_per_minute: own rate; None takes the server's.
        admin: may add and remove adapters.
    """

    name: str
    sha256: str
    created: str
    requests_per_minute: float | None = None
    burst: int | None = None
    admin: bool = False


class Keys:
    """The keys of one server."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self.by_name = dict(keys)

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def find(self, presented: str) -> Key | None:
        """The key's record. Every record is compared, each in constant time, whichever fits."""
        digest = digest_of(presented)
        found = None
        for key in self.by_name.values():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def load_keys(path: Path | None, environ: Mapping[str, str]) -> Keys:
    """Keys of the file and of FOUNDRY_API_KEY (called `environment`, with admin rights).

    Raises:
        ConfigError: the file is missing or damaged, or the variable's key is too short to be one.
    """
    keys = {} if path is None else read_keys(path, must_exist=True)
    given = environ.get("FOUNDRY_API_KEY", "").strip()
    if given:
        if len(given) < MIN_KEY_CHARS:
            hint = f"Make one with: python -c 'import secrets; print(\"{KEY_PREFIX}\" + secrets.token_urlsafe(32))'"
            raise ConfigError(f"a key has at least {MIN_KEY_CHARS} characters", where="FOUNDRY_API_KEY", hint=hint)
        keys["environment"] = Key("environment", digest_of(given), _now(), admin=True)
    return Keys(keys)


def read_keys(path: Path, *, must_exist: bool = False) -> dict[str, Key]:
    """The records of a file, by name.

    Raises:
        ConfigError: it cannot be read, or is not a file of keys.
    """
    if not path.exists() and not must_exist:
        return {}
    try:
        content: Any = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ConfigError(f"format {content['format']} is not known here", where=str(path))
        keys = {name: Key(name=name, **fields) for name, fields in content["keys"].items()}
    except FileNotFoundError:
        hint = "Make a key with: foundry serve keys add NAME"
        raise ConfigError("there is no such file of keys", where=str(path), hint=hint) from None
    except OSError as error:
        raise ConfigError(f"the keys cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"it is not a file of keys ({type(error).__name__})", where=str(path)) from error
    wrong = [name for name, key in keys.items() if not re.fullmatch("[0-9a-f]{64}", str(key.sha256))]
    if wrong:
        raise ConfigError(f"the key {wrong[0]!r} has no sha256", where=str(path))
    return keys


def write_keys(path: Path, keys: Mapping[str, Key]) -> None:
    """Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: {k: v for k, v in asdict(key).items() if k != "name"} for name, key in keys.items()}
    atomic_write(path, json.dumps({"format": _FORMAT, "keys": entries}, indent=1) + "\n")
    path.chmod(0o600)


def add_key(path: Path, name: str, *, rate: float | None, burst: int | None, admin: bool) -> str:
    """A new key of this name; returned once, and only its hash is kept.

    Raises:
        UsageError: the name is not one, or taken. ConfigError: as `read_keys`.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a key's name", hint="Use letters, digits, dots, - and _.")
    keys = read_keys(path)
    if name in keys:
        raise UsageError(
            f"there is a key {name!r} already", hint=f"Take it away with: foundry serve keys remove {name}"
        )
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    record = Key(name, digest_of(key), _now(), requests_per_minute=rate, burst=burst, admin=admin)
    write_keys(path, keys | {name: record})
    return key


def remove_key(path: Path, name: str) -> None:
    """Raises: UsageError: there is none of this name. ConfigError: as `read_keys`."""
    keys = read_keys(path, must_exist=True)
    if name not in keys:
        raise UsageError(f"there is no key {name!r}", hint=f"There is: {', '.join(keys) or 'none'}")
    write_keys(path, {other: key for other, key in keys.items() if other != name})


class Buckets:
    """A token bucket for each client: `burst` requests at once, then `rate` a minute.

    Args:
        clock: seconds, monotonic.
        most: clients that are remembered; a full bucket that is forgotten is a full bucket.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = 10_000) -> None:
        self._clock, self._most = clock, most
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, *, per_minute: float, burst: int) -> float:
        """Take one; 0.0 when there was one, else the seconds until there is."""
        now, rate = self._clock(), per_minute / 60.0
        level, then = self._levels.pop(client, (float(burst), now))
        level = min(float(burst), level + (now - then) * rate)
        wait = 0.0 if level >= 1.0 else (1.0 - level) / rate
        self._levels[client] = (level - 1.0 if wait == 0.0 else level, now)
        while len(self._levels) > self._most:
            self._levels.popitem(last=False)
        return wait


def with_defaults(key: Key, *, rate: float | None, burst: int) -> Key:
    """The key with the server's rate where it has none of its own."""
    return replace(
        key,
        requests_per_minute=key.requests_per_minute if key.requests_per_minute is not None else rate,
        burst=key.burst if key.burst is not None else burst,
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017
