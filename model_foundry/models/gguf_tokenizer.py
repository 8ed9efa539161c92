"""What a GGUF file says beside its weights: its tokenizer and chat template as a folder, and its context."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from model_foundry.errors import MissingExtraError, ModelError
from model_foundry.models.cache import entry_folder, fill, usable
from model_foundry.models.gguf import convert_gguf
from model_foundry.models.hashes import file_sha256

logger = logging.getLogger(__name__)


def tokenizer_of(path: Path) -> Path:
    """The folder of a GGUF file's own tokenizer and chat template, from the cache or made now.

    Raises:
        ModelError: the file is damaged, or its tokenizer is of a kind that cannot be read.
    """
    digest = file_sha256(path)
    key = f"gguf-tokenizer-{digest[:24]}"
    entry = usable(entry_folder(key))
    if entry is None:

        def convert(folder: Path) -> dict[str, Any]:
            made = convert_gguf(path, folder, weights=False)
            return {"source": "gguf", "file": path.name, "sha256": digest, "conversion": made}

        entry = fill(key, f"the tokenizer of {path.name} ({digest[:8]})", convert, say=logger.info, home=None)
    return entry.folder


def context_of(path: Path, *, most: int) -> int:
    """The context to serve a GGUF file with: its own, or `most` where that is less.

    Raises:
        ModelError: the file cannot be read. MissingExtraError: the package gguf is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        return min(int(reader.fields[f"{architecture}.context_length"].contents()), most)
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(f"it is damaged, or no GGUF file ({error})", where=str(path)) from error
