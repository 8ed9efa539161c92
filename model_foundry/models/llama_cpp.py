"""llama.cpp opened in this process: one GGUF file in its own server code, for whoever asks it.

The weights are read by the program that people will serve them with. Knows how it is opened and what it says when it
refuses; what is asked is the business of the evaluation, the export and the server.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model_foundry.errors import MissingExtraError, ModelError

OnAnswer = Callable[[Any], bool]
"""Told every piece of an answer; true ends it."""


LONGEST_SOCKET = 90
"""Bytes of a socket's path that every system takes; they are 104 to 108, with the zero at the end."""


def is_installed() -> bool:
    """Whether this Python has llama.cpp."""
    return find_spec("xllamacpp") is not None


class LlamaServer:
    """One file, loaded.

    Args:
        context: tokens of prompt and answer together, for each of `num_slots` answers that are computed at once.
        num_threads: default all cores.
        adapter: a LoRA adapter as a GGUF, on top.
        exact: keys and values in float32 and plain attention, so that only the weights' precision is measured.
        socket: where its own HTTP routes can be reached, see `private_socket`; by default nowhere. Its server opens
            them in any case, and they know no key and no limit.

    Raises:
        ModelError: llama.cpp refuses the file. MissingExtraError: it is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        num_slots: int = 1,
        num_threads: int | None = None,
        adapter: Path | None = None,
        exact: bool = False,
        socket: Path | None = None,
    ) -> None:
        try:
            library: Any = import_module("xllamacpp")  # compiled, so no type is known
        except ImportError as error:
            raise MissingExtraError("xllamacpp", "gguf") from error
        _try_to_open(path, adapter, context=context, num_slots=num_slots)
        parameters: Any = library.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context * num_slots
        parameters.n_parallel = num_slots
        parameters.cpuparams.n_threads = num_threads or os.cpu_count() or 1
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.endpoint_metrics = True
        if exact:
            parameters.cache_type_k = parameters.cache_type_v = library.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            parameters.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.path = path
        try:
            # Its socket's folder is gone when it runs, unless somebody wants to speak to it there.
            with private_socket() if socket is None else nullcontext(socket) as listening:
                parameters.hostnames = [str(listening)]
                self._server: Any = library.Server(parameters)
        except RuntimeError as error:
            raise _refused(path, adapter, str(error)) from error
        self._server.handle_metrics()  # its loop answers; a server that goes before the loop runs waits for it for ever

    def complete(self, asked: Mapping[str, Any], on_answer: OnAnswer | None = None) -> Any:
        """An answer to what is asked in llama.cpp's words (`/completions`), or its error, as it gives them.

        Args:
            on_answer: with `stream`, called with every piece in this thread.
        """
        if on_answer is None:
            return self._server.handle_completions(dict(asked))
        return self._server.handle_completions(dict(asked), on_answer)


@contextmanager
def private_socket() -> Iterator[Path]:
    """The path for a Unix socket in a folder that no other user can open, which is removed at the end."""
    parent = tempfile.gettempdir()
    short = parent if len(os.fsencode(parent)) < LONGEST_SOCKET - 40 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="foundry-llama-", dir=short) as folder:
        yield Path(folder, "http.sock")


_OPEN = """
import os, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.hostnames, parameters.model.path = [sys.argv[1]], sys.argv[2]
parameters.n_ctx, parameters.n_parallel = int(sys.argv[3]) * int(sys.argv[4]), int(sys.argv[4])
parameters.warmup, parameters.verbosity = False, 1
parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[5:]]
try:
    kept = xllamacpp.Server(parameters)  # let go, it might wait for its loop for ever
    kept.handle_completions({"prompt": [0], "max_tokens": 1})
except RuntimeError as error:
    sys.stderr.write(f"\\n{error}\\n")
    sys.stderr.flush()
    os._exit(3)
os._exit(0)
"""
_REASON = re.compile(
    r" E (?:gguf_init_from_\w+|llama_model_load: error loading model"
    r"|llama_adapter_lora_init\w*: failed to apply lora adapter): (.+)"
)


def _try_to_open(path: Path, adapter: Path | None, *, context: int, num_slots: int) -> None:
    """Open the file in a child process first, and ask for a token: llama.cpp ends the process that it is in at some
    damaged files, then or at the first question. What it logs while it refuses one, its exception keeps to itself.

    Raises:
        ModelError: it does not open there, with llama.cpp's own reason.
    """
    with private_socket() as socket:
        command = [sys.executable, "-P", "-c", _OPEN, str(socket), str(path), str(context), str(num_slots)]
        command += [] if adapter is None else [str(adapter)]
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
        try:
            child = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=600, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _refused(path, adapter, "it was not done within ten minutes") from error
    if child.returncode == 0:
        return
    found, lines = _REASON.search(child.stderr), child.stderr.strip().splitlines()
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        why = ", which is how the system takes back memory that has run out" if name == "SIGKILL" else ""
        raise _refused(path, adapter, f"its process ends with {name}{why}")
    raise _refused(path, adapter, found[1] if found else (lines or ["no reason given"])[-1])


def _refused(path: Path, adapter: Path | None, reason: str) -> ModelError:
    what = "it" if adapter is None else f"it with {adapter.name} on top"
    hint = "It may be cut short or damaged: compare its size, or fetch it again." if adapter is None else None
    return ModelError(f"llama.cpp does not load {what}: {reason.strip().rstrip('.')}", where=str(path), hint=hint)


def refusal(answer: Any) -> str:
    """Why there is no answer, in llama.cpp's words."""
    return str(answer.get("error", {}).get("message", answer) if isinstance(answer, dict) else answer)
