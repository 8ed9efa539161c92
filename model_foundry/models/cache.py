"""The model cache: one folder a model, filled whole or not at all, with a manifest of sizes and sha256.

    <home>/models/<entry>/  a Hugging Face folder + foundry-model.json (written last: present = complete)
    <home>/locks/<entry>.lock

It knows nothing of hubs, wheels or GGUF: `fill` is handed a function that fills a folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.atomic import TEMPORARY_PREFIX, atomic_directory
from model_foundry.checkpoint.manifest import hash_file
from model_foundry.errors import MissingExtraError, ModelError
from model_foundry.models.folder import write_json
from model_foundry.models.hashes import cache_home

MANIFEST = "foundry-model.json"
LOCK_TIMEOUT_S = 3600.0
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A complete model in the cache."""

    folder: Path
    name: str
    provenance: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def num_bytes(self) -> int:
        return sum(int(facts["bytes"]) for facts in self.files.values())

    def discard(self) -> None:
        """Take the entry out of the cache, by its manifest: what has none counts as absent."""
        (self.folder / MANIFEST).unlink(missing_ok=True)


def entry_folder(key: str, *, home: Path | None = None) -> Path:
    """Where a model of this key lives; a hub id `org/name` becomes `org--name`."""
    return cache_home(home) / "models" / re.sub(r"[^A-Za-z0-9._-]", "-", key.replace("/", "--"))


def read_entry(folder: Path) -> CacheEntry | None:
    """The entry in this folder, or None where there is no complete one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return CacheEntry(folder, manifest["name"], manifest["provenance"], manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_entries(*, home: Path | None = None) -> tuple[CacheEntry, ...]:
    """Every complete model in the cache, by name."""
    root = cache_home(home) / "models"
    found = [read_entry(path) for path in sorted(root.iterdir())] if root.is_dir() else []
    return tuple(sorted((entry for entry in found if entry is not None), key=lambda entry: entry.name))


def damage(entry: CacheEntry, *, hashes: bool = False) -> str | None:
    """What differs from the manifest, or None. Sizes only, unless `hashes` asks for the bytes to be read."""
    for name, facts in entry.files.items():
        path = entry.folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != facts["bytes"]:
            return f"{name} has {size} bytes instead of {facts['bytes']}"
        if hashes and hash_file(path).sha256 != facts["sha256"]:
            return f"{name} has another sha256 than when it was stored"
    return None


def usable(folder: Path) -> CacheEntry | None:
    """The entry, its sizes checked.

    Raises:
        ModelError: it is there but damaged.
    """
    entry = read_entry(folder)
    if entry is not None and (what := damage(entry)) is not None:
        raise ModelError(
            f"the cached copy is damaged: {what}", where=str(folder), hint=f"Run: foundry models pull {entry.name}"
        )
    return entry


def fill(key: str, name: str, make: Callable[[Path], Mapping[str, Any]], *, say: Say, home: Path | None) -> CacheEntry:
    """The entry, made by `make(folder) -> provenance` unless another process just made it.

    Raises:
        ModelError: what `make` raises, or the cache cannot be written.
    """
    folder = entry_folder(key, home=home)
    with _lock(folder, say=say, home=home):
        entry = read_entry(folder)
        if entry is not None:
            if (what := damage(entry)) is None:
                return entry
            say(f"the cached copy of {name} is damaged ({what}); making it again")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            with atomic_directory(folder) as target:
                provenance = make(target)
                _write_manifest(target, name, provenance)
        except OSError as error:
            hint = "Free some space there, or set FOUNDRY_HOME to a folder on another disk."
            what = f"{name} cannot be stored ({error.strerror or error})"
            raise ModelError(what, where=str(folder.parent), hint=hint) from error
    entry = read_entry(folder)
    if entry is None:
        raise ModelError("the model was stored but its manifest cannot be read back", where=str(folder))
    return entry


def _remove_leftovers(folder: Path) -> None:
    """What killed processes left of this entry; we hold its lock, so nobody is writing it."""
    pattern = re.compile(rf"{re.escape(TEMPORARY_PREFIX + folder.name)}-\d+-\d+")
    for path in folder.parent.iterdir():
        if pattern.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _write_manifest(folder: Path, name: str, provenance: Mapping[str, Any]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path).sha256}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"name": name, "provenance": dict(provenance), "files": files})
    for path in folder.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextmanager
def _lock(folder: Path, *, say: Say, home: Path | None) -> Iterator[None]:
    """One process makes an entry; others wait for it, and say so."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        raise MissingExtraError("filelock", "train") from None
    path = cache_home(home) / "locks" / f"{folder.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "Set FOUNDRY_HOME to a folder that can be written."
        raise ModelError(f"the model cache cannot be written ({error})", where=str(path.parent), hint=hint) from error
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        say(f"another process is preparing {folder.name}; waiting for it")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise ModelError(f"another process has held it for {LOCK_TIMEOUT_S:.0f} s", where=str(path)) from None
    try:
        yield
    finally:
        lock.release()
