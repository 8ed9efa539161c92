"""An export looked at again, later: its bytes against the manifest, then the same measurements against the reference.

What cannot be repeated (the run or the base is gone or is another one by now) is said, not passed over. It finds no
runs: the caller brings the subject, or the reason why there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.manifest import hash_file, read_manifest
from model_foundry.errors import CheckpointError, ModelError
from model_foundry.export.certificate import CERTIFICATE
from model_foundry.export.measure import ADAPTER, NOT_TRIED, Subject, ask_reference, measure
from model_foundry.export.merge import plan_merge
from model_foundry.models import llama_cpp
from model_foundry.types import Check


@dataclass(slots=True)
class Verdict:
    """Checks that were made, and what could not be repeated, each with its reason."""

    checks: list[Check] = field(default_factory=list)
    not_repeated: list[str] = field(default_factory=list)


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of an exported folder.

    Raises:
        ModelError: there is none that can be read.
    """
    path = folder / CERTIFICATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["kind"], content["origin"]["name"], content["precision"], content["weights"]
    except FileNotFoundError:
        hint = "foundry export writes one; a model without it has not been certified."
        raise ModelError(f"there is no {CERTIFICATE}, so it is no export", where=str(folder), hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "Export it again: foundry export RUN --to …"
        raise ModelError(f"it is damaged ({error})", where=str(path), hint=hint) from error
    return content


def check_files(folder: Path) -> Check:
    """Every file against the manifest; the first that differs is named, with all others."""
    name, bound = "files", "size and SHA-256 of every file as they were certified"
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Check(name, False, error.what, bound, error.where or "")
    problems = []
    for path, expected in manifest.files.items():
        if not (folder / path).is_file():
            problems.append(f"{path} is missing")
        elif (found := hash_file(folder / path)) != expected:
            what = f"{found.size_bytes:,} bytes instead of {expected.size_bytes:,}"
            problems.append(f"{path} has {what if found.size_bytes != expected.size_bytes else 'another SHA-256'}")
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems += [f"{path} was added" for path in sorted(here - manifest.files.keys() - {"manifest.json"})]
    evidence = "; ".join(problems) or f"{len(manifest.files)} files, {manifest.total_bytes:,} bytes"
    return Check(name, not problems, len(problems), bound, evidence)


def verify_export(
    folder: Path,
    certificate: dict[str, Any],
    subject: Subject | str,
    *,
    is_claimed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Repeat the checks of an export.

    Args:
        certificate: from `read_certificate`.
        subject: what it was made from; or why that is not to be had.
        is_claimed: somebody says that it was made from just this: a subject that is another one is a failed check. Else
            the certificate's own words led to it, and it may have changed since.
    """
    say("reading every file")
    verdict = Verdict([check_files(folder)])
    if isinstance(subject, str):
        verdict.not_repeated.append(f"parity: {subject}")
        return verdict
    then, now = certificate["origin"], subject.origin
    for what, key in {"base": "base_fingerprint", "adapter": "adapter_sha256", "template": "renderer"}.items():
        if then.get(key) != getattr(now, key):
            if is_claimed:
                evidence = f"{now.name} has another {what} than the export was made from ({then['name']})"
                verdict.checks.append(Check("origin", False, what, "base, adapter and template of --of", evidence))
                return verdict
            verdict.not_repeated.append(f"parity: {now.name} has another {what} by now than the export was made from")
            return verdict
    kind = certificate["kind"]
    if kind in ("gguf", "ollama") and ADAPTER not in certificate["weights"] and not llama_cpp.is_installed():
        verdict.not_repeated.append(NOT_TRIED)
    merge = plan_merge(subject.base, subject.adapter)
    say(f"asking the reference {len(subject.prompts)} prompts from {now.prompts_from}")
    subject, probe, left_out = ask_reference(subject, merge, kind)
    if left_out is not None:
        say(left_out)
    say("asking the export")
    verdict.checks += measure(
        folder, kind, subject, merge, probe, precision=certificate["precision"], files=certificate["weights"]
    )
    return verdict
