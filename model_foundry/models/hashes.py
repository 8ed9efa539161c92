"""sha256 of large files, remembered by path, size and modification time so that each is read once.

The memory lies in the model cache, not beside the file: a user's folder may be read-only, and is not ours to litter.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.checkpoint.manifest import hash_file


def cache_home(home: Path | None = None) -> Path:
    """Where fetched and converted models live: `home`, else FOUNDRY_HOME, else ~/.cache/model-foundry."""
    if home is not None:
        return home
    named = os.environ.get("FOUNDRY_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "model-foundry"


def file_sha256(path: Path, *, home: Path | None = None) -> str:
    """Hex sha256 of a file's bytes, remembered while its path, size and modification time stay the same."""
    path = path.resolve()
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = cache_home(home) / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(note.read_bytes())
        if known["stamp"] == stamp:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not remembered, or not readable: read the file
    digest = hash_file(path).sha256
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(note, json.dumps({"path": str(path), "stamp": stamp, "sha256": digest}))
    except OSError:
        pass  # a cache that cannot be written costs time, not truth
    return digest
