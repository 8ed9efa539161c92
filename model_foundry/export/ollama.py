"""Handing an exported folder to a running Ollama, over its own HTTP API and through its own client.

The GGUF is sent as a blob under its SHA-256, then the model is made from it, the template and the parameters; then it
is asked one question. Knows no weights and judges no logits: by then they have been measured.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from model_foundry.errors import FoundryError, MissingExtraError, UsageError
from model_foundry.export.modelfile import NAME, read_modelfile

SMOKE_TOKENS = 16


def register(folder: Path, name: str, *, question: str, host: str | None = None) -> str:
    """Make the model `name` of an exported folder in a running Ollama; its answer to one question.

    Args:
        host: default OLLAMA_HOST, or 127.0.0.1:11434.

    Raises:
        FoundryError: nobody answers there, it refuses, or the model says nothing. MissingExtraError: no client.
    """
    try:
        import httpx  # the client's own

        library: Any = import_module("ollama")
    except ImportError as error:
        raise MissingExtraError("ollama", "gguf") from error
    modelfile = read_modelfile(folder / NAME)
    gguf = folder / modelfile.source
    client = library.Client(host=host)
    try:
        extra: dict[str, Any] = {} if modelfile.system is None else {"system": modelfile.system}
        files = {gguf.name: client.create_blob(gguf)}
        if modelfile.adapter is not None:
            adapter = folder / modelfile.adapter
            extra["adapters"] = {adapter.name: client.create_blob(adapter)}
        client.create(model=name, files=files, template=modelfile.template, parameters=modelfile.parameters, **extra)
        options = {"temperature": 0, "num_predict": SMOKE_TOKENS}
        answer = client.chat(model=name, messages=[{"role": "user", "content": question}], options=options)
    except library.ResponseError as error:
        hint = f"The folder is whole: cd {folder} && ollama create {name} -f {NAME}"
        raise FoundryError(f"Ollama refuses it ({error})", where=name, hint=hint) from error
    except (OSError, httpx.HTTPError) as error:
        where = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
        hint = f"Start it (ollama serve), then: cd {folder} && ollama create {name} -f {NAME}"
        raise FoundryError(f"no Ollama answers ({error})", where=where, hint=hint) from error
    text = answer["message"]["content"] or ""
    if not text.strip():
        raise FoundryError("the model was made, and answers nothing", where=name, hint=f"ollama run {name}")
    return text


def check_model_name(name: str) -> str:
    """Raises: UsageError for what Ollama takes for no model's name."""
    allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/"
    if not name or not name[0].isalnum() or set(name) - set(allowed):
        raise UsageError(
            f"{name!r} is no name for a model", where="--register", hint="For example: foxes or me/foxes:1b"
        )
    return name
