"""`foundry models pull NAME | list | show NAME`: what there is, where it came from, and whether it is whole.

Reads headers and manifests only; loads no weights and imports no torch.
"""

from __future__ import annotations

import json
import math
from typing import Any

import click

from model_foundry.errors import ModelError
from model_foundry.models.cache import CacheEntry, damage, list_entries, read_entry
from model_foundry.models.config import ModelConfig, native_obstacle
from model_foundry.models.finder import KNOWN_MODELS, ModelSource, resolve_model
from model_foundry.models.folder import read_config, stored_tensors, weight_files


@click.group(name="models")
def command() -> None:
    """Fetch, list and describe models."""


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def pull(name: str, as_json: bool) -> None:
    """Fetch or convert NAME into the cache, and check every byte of it.

    NAME is a known name (foundry models list), a hub id org/name, a GGUF file or a folder.
    """
    source = resolve_model(name)
    entry = read_entry(source.folder)
    if entry is not None and (what := damage(entry, hashes=True)) is not None:
        entry.discard()
        source = resolve_model(name)
        click.echo(f"the cached copy was damaged ({what}) and has been made again", err=True)
    facts = describe(source)
    click.echo(json.dumps(facts, indent=2) if as_json else f"{name} is ready in {source.folder}")


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def list_models(as_json: bool) -> None:
    """List what is cached, and the names that can be fetched."""
    rows = [_row(entry) for entry in list_entries()]
    cached = {row["name"] for row in rows}
    for name, known in KNOWN_MODELS.items():
        if name not in cached:
            rows.append({"name": name, "state": "not fetched", "bytes": None, "source": None, "about": known.about})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        size = "" if row["bytes"] is None else _size(row["bytes"])
        click.echo(f"{row['name']:<{width}}  {row['state']:<11}  {size:>8}  {row['about']}")


@command.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Read every file and compare its sha256 with the manifest.")
@click.option("--plan", is_flag=True, help="What training it takes and which machines fit; config.json is enough.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def show(name: str, verify: bool, plan: bool, as_json: bool) -> None:
    """Describe NAME: shape, numbers, where its bytes come from. Fetches nothing.

    With --plan, NAME may also be a config.json, or a folder that holds nothing else.
    """
    if plan:
        _show_plan(name, as_json=as_json)
        return
    source = resolve_model(name, pull=False)
    facts = describe(source)
    if verify:
        facts["verified"] = _verify(source)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for label, text in _lines(facts):
        click.echo(f"{label:<14} {text}")


def _show_plan(name: str, *, as_json: bool) -> None:
    from model_foundry.recipes.shape_plan import config_without_weights, shape_facts, shape_text

    path = config_without_weights(name) or resolve_model(name, pull=False).folder / "config.json"
    facts = shape_facts(path)
    click.echo(json.dumps(facts, indent=2) if as_json else shape_text(facts))


def describe(source: ModelSource) -> dict[str, Any]:
    """What is known about a model without loading it, as JSON values."""
    config, tensors = read_config(source.folder), stored_tensors(source.folder)
    obstacle = native_obstacle(config)
    dtypes = sorted({entry.dtype for entry in tensors.values()})
    facts: dict[str, Any] = {
        "name": source.name,
        "folder": str(source.folder),
        "adapter": None if source.adapter is None else str(source.adapter),
        "architecture": config.get("model_type"),
        "implementation": "native" if obstacle is None else "transformers",
        "why_not_native": obstacle,
        "num_parameters": sum(math.prod(entry.shape) for entry in tensors.values()),
        "stored_as": dtypes,
        "bytes": sum(path.stat().st_size for path in weight_files(source.folder)),
        "provenance": dict(source.provenance),
    }
    if obstacle is None:
        shape = ModelConfig.from_hf(config, where=str(source.folder / "config.json"))
        facts |= {
            "num_parameters": shape.num_parameters,
            "num_layers": shape.num_hidden_layers,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "max_length": shape.max_position_embeddings,
        }
    return facts


def _verify(source: ModelSource) -> str:
    entry = read_entry(source.folder)
    if entry is None:
        return "no manifest: it is not a folder of the cache, so there is nothing to compare with"
    if (what := damage(entry, hashes=True)) is not None:
        hint = f"Run: foundry models pull {entry.name}"
        raise ModelError(f"it is damaged: {what}", where=str(source.folder), hint=hint)
    return f"{len(entry.files)} files have the sha256 of the manifest"


def _row(entry: CacheEntry) -> dict[str, Any]:
    what = damage(entry)
    known = KNOWN_MODELS.get(entry.name)
    return {
        "name": entry.name,
        "state": "cached" if what is None else "damaged",
        "bytes": entry.num_bytes,
        "source": entry.provenance.get("source"),
        "about": what or (known.about if known else _origin(entry.provenance)),
        "folder": str(entry.folder),
    }


def _origin(provenance: Any) -> str:
    places = ("repository", "requirement", "file", "path")
    place = next((provenance[key] for key in places if key in provenance), "")
    return f"from {provenance.get('source')} {place}".strip()


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    million = facts["num_parameters"] / 1e6
    lines = [
        ("name", facts["name"]),
        ("folder", facts["folder"]),
        ("architecture", f"{facts['architecture']}, run by {_runner(facts)}"),
        ("parameters", f"{facts['num_parameters']:,} ({million:.1f} million)"),
        ("weights", f"{', '.join(facts['stored_as'])}, {_size(facts['bytes'])}"),
    ]
    if "num_layers" in facts:
        lines.append(("shape", f"{facts['num_layers']} layers, width {facts['hidden_size']}"))
        lines.append(("vocabulary", f"{facts['vocab_size']:,} tokens, context {facts['max_length']:,}"))
    if facts["adapter"]:
        lines.append(("adapter", facts["adapter"]))
    provenance = facts["provenance"]
    lines.append(("origin", _origin(provenance)))
    lines += [(key, str(provenance[key])) for key in ("values", "licence", "revision") if key in provenance]
    lines += [("note", note) for note in provenance.get("conversion", {}).get("notes", ())]
    return lines + ([("verified", facts["verified"])] if "verified" in facts else [])


def _runner(facts: dict[str, Any]) -> str:
    if facts["implementation"] == "native":
        return "the native decoder"
    return f"transformers ({facts['why_not_native']})"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 10e9 else f"{num_bytes / 1e9:.1f} GB"
