"""What an export proved, for programs (`certificate.json`) and for people (`README.md`, a model card).

Knows checks and files; measures nothing.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import yaml

from model_foundry import __version__
from model_foundry.checkpoint.manifest import hash_file
from model_foundry.types import Check

CERTIFICATE, CARD = "certificate.json", "README.md"
_LIBRARIES = {"gguf": "gguf", "gguf-adapter": "gguf", "ollama": "gguf", "adapter": "peft"}
_PACKAGES = ("torch", "transformers", "gguf", "tokenizers", "safetensors", "xllamacpp")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an export comes from.

    Attributes:
        name: what it was asked for by.
        base: name of the base model; base_fingerprint identifies its bytes.
        adapter_sha256: of the adapter's tensors, or None.
        renderer: name of the template and tokenizer that it was trained with.
        prompts_from: where the prompts of the checks come from.
        licence: of the base, where it is known.
    """

    name: str
    base: str
    base_fingerprint: str
    adapter_sha256: str | None
    renderer: str
    prompts_from: str
    licence: str | None = None


class Measured(Protocol):
    """What was written and measured: `export.measure.Draft`."""

    checks: list[Check]
    notes: list[str]
    precision: str
    files: dict[str, str]


def write_certificate(folder: Path, origin: Origin, draft: Measured, *, kind: str) -> dict[str, Any]:
    """Write `certificate.json` over every file that lies in the folder, and the card; the certificate's content."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": record.size_bytes, "sha256": record.sha256}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for record in [hash_file(path)]
    }
    content: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "precision": draft.precision,
        "weights": dict(draft.files),
        "passed": all(check.passed for check in draft.checks),
        "origin": {name: getattr(origin, name) for name in Origin.__slots__},
        "checks": [_finite(check.as_dict()) for check in draft.checks],
        "notes": list(draft.notes),
        "files": files,
        "versions": versions(),
    }
    (folder / CERTIFICATE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(content), encoding="utf-8")
    return content


def versions() -> dict[str, str]:
    """Of Python, of us, and of every package that took part."""
    found = {"python": platform.python_version(), "model-foundry": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finite(check: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    value = check["value"]
    return check | {"value": str(value)} if isinstance(value, float) and not math.isfinite(value) else check


def model_card(content: Mapping[str, Any]) -> str:
    """The card: YAML front matter as model hubs read it, then what was measured."""
    origin = content["origin"]
    front: dict[str, Any] = {
        "base_model": origin["base"],
        "library_name": _LIBRARIES.get(content["kind"], "transformers"),
        "pipeline_tag": "text-generation",
        "tags": ["model-foundry", content["kind"]],
    }
    if origin["licence"]:
        front["license"] = str(origin["licence"]).lower()
    lines = [
        "---", yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip(), "---", "",
        f"# {Path(origin['name']).name}", "",
        f"Exported as {content['kind']} in {content['precision']} by model-foundry {__version__}.",
        f"Base: {origin['base']} (fingerprint `{origin['base_fingerprint'][:16]}`).",
        f"Template and tokenizer: {origin['renderer']}.", "",
        "## What was measured", "",
        f"On prompts from {origin['prompts_from']}, against the base with the adapter beside it, in float32.", "",
        "| check | value | bound | |", "|---|---|---|---|",
    ]  # fmt: skip
    for check in content["checks"]:
        cells = (check["name"], _shown(check["value"]), check["bound"], "pass" if check["passed"] else "FAIL")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    if content["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in content["notes"])]
    names = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    lines += ["", f"Versions: {names}. Hashes and evidence: `{CERTIFICATE}`.", ""]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
