"""`foundry doctor`: what this machine has, what is missing, and what to do about it.

Probes only: it changes nothing, reaches for no network, and goes on when a probe fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from model_foundry import __version__
from model_foundry.cli.extras import EXTRAS
from model_foundry.run.machine import memory_facts, read_lines

GIB = 2**30
LOW_MEMORY_BYTES = 3 * GIB
LOW_DISK_BYTES = 2 * GIB

CORE = ("click", "jinja2", "numpy", "orjson", "pydantic", "pyyaml", "rich", "safetensors", "tokenizers")
DISTRIBUTIONS = {
    "google.protobuf": ("protobuf",),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "mlx_lm": ("mlx-lm",),
    "prometheus_client": ("prometheus-client",),
    "tree_sitter": ("tree-sitter",),
    "tree_sitter_gdscript": ("tree-sitter-gdscript",),
    "tree_sitter_lua": ("tree-sitter-lua",),
}
"""Distributions that bring a module of another name, the first found counts."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(as_json: bool) -> int:
    """Say what this machine has and what is missing.

    Exit code 1 when something is missing that training needs.
    """
    facts = machine_facts()
    missing, warnings = diagnose(facts)
    if as_json:
        click.echo(json.dumps({**facts, "missing": missing, "warnings": warnings}, indent=2))
        return 1 if missing else 0
    for label, text in describe(facts):
        click.echo(f"{label:<10} {text}")
    for sentence in warnings:
        click.echo(f"warning: {sentence}")
    for sentence in missing:
        click.echo(f"missing: {sentence}")
    if not missing:
        click.echo("Ready to train.")
    return 1 if missing else 0


def machine_facts() -> dict[str, Any]:
    """Everything probed, as JSON values; sizes in bytes."""
    return {
        "version": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "cpu": {"name": cpu_name(), "cores": usable_cores()},
        "memory": memory_facts(),
        "disk": disk_facts(Path.cwd()),
        "torch": torch_facts(),
        "packages": {name: installed_version(name) for name in CORE},
        "extras": {extra: {name: installed_version(name) for name in names} for extra, names in EXTRAS.items()},
        "models": cached_models(),
    }


def diagnose(facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is missing for training, and what may get in the way."""
    missing, warnings = [], []
    gone = [name for name, version in facts["packages"].items() if version is None]
    if gone:
        missing.append(f"{', '.join(gone)}. Install with: pip install model-foundry")
    gone = [name for name, version in facts["extras"]["train"].items() if version is None]
    if gone:
        missing.append(f"{', '.join(gone)}. Install with: pip install 'model-foundry[train]'")
    elif "error" in facts["torch"]:
        missing.append(f"a torch that can be imported ({facts['torch']['error']})")
    free = facts["memory"]["available_bytes"]
    if free is not None and free < LOW_MEMORY_BYTES:
        warnings.append(f"{gib(free)} of memory are free; training the smallest known model takes about 3 GiB")
    for place, disk in facts["disk"].items():
        if disk["free_bytes"] < LOW_DISK_BYTES:
            warnings.append(f"{gib(disk['free_bytes'])} are free on the disk of the {place} ({disk['path']})")
        if not disk["writable"]:
            warnings.append(f"the {place} ({disk['path']}) cannot be written")
    return missing, warnings


def describe(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as labelled lines."""
    torch, memory = facts["torch"], facts["memory"]
    rows = [
        ("foundry", str(facts["version"])),
        ("python", f"{facts['python']['version']} ({facts['python']['executable']})"),
        ("platform", str(facts["platform"])),
        ("cpu", f"{facts['cpu']['name']}, {facts['cpu']['cores']} usable cores"),
        ("memory", f"{gib(memory['available_bytes'])} free of {gib(memory['total_bytes'])}"),
    ]
    rows += [
        ("disk", f"{gib(disk['free_bytes'])} free for the {place} ({disk['path']})")
        for place, disk in facts["disk"].items()
    ]
    if "error" in torch:
        rows.append(("torch", f"not usable: {torch['error']}"))
    else:
        rows.append(("torch", f"{torch['version']}, {torch['threads']} threads"))
        rows.append(("device", ", ".join(torch["devices"])))
        rows.append(
            ("bfloat16", f"{'native' if torch['bfloat16'] else 'emulated: float32 is faster'} on {torch['device']}")
        )
    for extra, packages in facts["extras"].items():
        rows.append((f"[{extra}]", ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())))
    models = [f"{model['name']} ({gib(model['bytes'])})" for model in facts["models"]]
    rows.append(("models", ", ".join(models) or "none cached; foundry models pull NAME fetches one"))
    return rows


def gib(num_bytes: int | None) -> str:
    """A size for people."""
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"


def installed_version(module: str) -> str | None:
    """The version of the distribution that brings a module; imports nothing."""
    for name in DISTRIBUTIONS.get(module, (module,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    for line in read_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def disk_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """Free bytes where runs go and where models are cached."""
    from model_foundry.models.hashes import cache_home

    return {"working directory": _disk(folder), "model cache": _disk(cache_home(None))}


def _disk(path: Path) -> dict[str, Any]:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return {
        "path": str(path),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "writable": os.access(there, os.W_OK),
    }


def torch_facts() -> dict[str, Any]:
    """What torch sees and what a run with `auto` would use; `error` when torch can't be imported."""
    try:
        import torch

        from model_foundry.engine.platform import choose_device, multiplies_bfloat16

        device = choose_device("auto")
        native = multiplies_bfloat16(device)
    except Exception as error:  # a broken build raises anything
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "version": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "devices": gpus or [device.type],
        "bfloat16": native,
    }


def cached_models() -> list[dict[str, Any]]:
    """Complete models in the cache."""
    from model_foundry.models.cache import list_entries

    return [{"name": entry.name, "bytes": entry.num_bytes, "folder": str(entry.folder)} for entry in list_entries()]
