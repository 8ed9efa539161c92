"""One export from beginning to end: write, measure, certify, and only then let it appear under its name.

    base + adapter ─► adapter | merged | gguf, in a folder beside the target
                      └► read back ─► compared with the reference ─► certificate.json, README.md, manifest.json
                                       └► a failed bound: CheckFailedError, and the folder is gone

Takes what a run says about itself as plain values; the command line finds them.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from model_foundry.checkpoint.atomic import atomic_directory
from model_foundry.checkpoint.manifest import write_manifest
from model_foundry.errors import CheckFailedError, ModelError, UsageError
from model_foundry.export import llama_cpp
from model_foundry.export.certificate import Origin, write_certificate
from model_foundry.export.gguf import GgufFile, check_format, write_gguf
from model_foundry.export.merge import DTYPES, Merge, fill_merged_folder, plan_merge, set_chat_template
from model_foundry.export.parity import (
    Probe,
    answer_logits,
    compare_configs,
    compare_logits,
    compare_tokens,
    compare_weights,
    load_with_adapter,
    make_probe,
)
from model_foundry.models.adapter import CONFIG_NAME, WEIGHTS_NAME
from model_foundry.models.config import is_native
from model_foundry.models.folder import copy_tokenizer, read_json
from model_foundry.models.gguf import convert_gguf
from model_foundry.models.language_model import load_language_model
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Check, Message

Kind = Literal["adapter", "merged", "gguf"]
Say = Callable[[str], None]
READERS = ("transformers", "llama.cpp")
LLAMA_CPP_TOKENS = 4
"""Tokens of each answer that llama.cpp is asked for: each brings a distribution over the whole vocabulary."""
_KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is exported.

    Attributes:
        base: Hugging Face folder; adapter: PEFT folder on top, or None for a model that is whole.
        renderer: as the model was trained with.
        prompts: held-out conversations for the checks.
    """

    base: Path
    adapter: Path | None
    renderer: Renderer
    prompts: tuple[tuple[Message, ...], ...]
    origin: Origin


@dataclass(slots=True)
class Draft:
    """An export that is written and not yet accepted."""

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    precision: str = "float32"


def export(
    subject: Subject,
    out: Path,
    *,
    kind: Kind,
    dtype: str | None = None,
    quant: str = "f16",
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Write one export into a new folder, and certify it.

    Args:
        dtype: of a merged folder, `float32`, `float16` or `bfloat16`; None keeps the base's.
        quant: of a GGUF file, a name of `gguf.FORMATS`.

    Returns:
        The certificate.

    Raises:
        CheckFailedError: a bound is not met; the first failed check is named, and nothing is left behind.
        UsageError, ModelError: it cannot be made. OSError: the disk is full; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "it is not empty", where=str(out), hint="Choose another folder with --out, or remove this one."
        )
    if kind == "gguf":
        quant = check_format(quant)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no type {dtype!r}", where="--dtype", hint=f"Types: {', '.join(DTYPES)}")
    if kind == "adapter" and subject.adapter is None:
        hint = "Every weight was trained, or it is a plain model: use --to merged."
        raise UsageError("it has no adapter to export", where=subject.origin.name, hint=hint)
    merge = plan_merge(subject.base, subject.adapter)
    say(f"asking the reference {len(subject.prompts)} prompts from {subject.origin.prompts_from}")
    probe = make_probe(merge, subject.renderer, subject.prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        say(f"writing {kind}")
        if kind == "adapter":
            draft = _write_adapter(folder, subject, probe)
        elif kind == "merged":
            draft = _write_merged(folder, subject, merge, probe, dtype)
        else:
            draft = _write_gguf(folder, subject, merge, probe, quant, say)
        require_passed(draft.checks, where=str(out))
        certificate = write_certificate(
            folder, subject.origin, draft.checks, kind=kind, precision=draft.precision, notes=draft.notes
        )
        fields = {"kind": kind, "precision": draft.precision, "origin": certificate["origin"]}
        write_manifest(folder, fields=fields)
    return certificate


def require_passed(checks: Sequence[Check], *, where: str) -> None:
    """Raises: CheckFailedError naming the first check that failed, what was measured, and how many others failed."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    first = failed[0]
    more = (
        f"; {len(failed) - 1} more checks failed: {', '.join(check.name for check in failed[1:])}" if failed[1:] else ""
    )
    what = f"the export is refused: {first.name} is {first.value} ({first.bound}): {first.evidence}{more}"
    raise CheckFailedError(what, where=where, hint="Nothing was written.")


def _write_adapter(folder: Path, subject: Subject, probe: Probe) -> Draft:
    if subject.adapter is not None:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(subject.adapter / name, folder / name)
    copy_tokenizer(subject.base, folder)
    set_chat_template(folder, subject.renderer.template_text, subject.renderer.stop_token_ids)
    logits = answer_logits(load_with_adapter(subject.base, folder), probe.rows, probe.starts)
    draft = Draft(compare_logits(probe, logits, stage="adapter", precision="float32"))
    draft.checks += _folder_tokens(folder, subject, stage="adapter")
    return draft


def _write_merged(folder: Path, subject: Subject, merge: Merge, probe: Probe, dtype: str | None) -> Draft:
    fill_merged_folder(folder, merge, dtype=dtype, base_name=subject.origin.base)
    set_chat_template(folder, subject.renderer.template_text, subject.renderer.stop_token_ids)
    precision = dtype or stored_dtype(merge)
    draft = Draft(precision=precision)
    draft.checks = compare_model(folder, merge, probe, stage="merged", precision=precision)
    draft.checks += _folder_tokens(folder, subject, stage="merged")
    if merge.rounding.num_tensors:
        draft.notes.append(f"rounding to {precision} took {merge.rounding.share:.2%} of the adapter's change")
    return draft


def stored_dtype(merge: Merge) -> str:
    """The coarsest type among the base's weights."""
    names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = {names[entry.dtype] for entry in merge.tensors.values() if entry.dtype in names}
    return next((name for name in ("bfloat16", "float16") if name in found), "float32")


def compare_model(
    folder: Path, merge: Merge, probe: Probe, *, stage: str, precision: str, exempt: Mapping[str, str] | None = None
) -> list[Check]:
    """A Hugging Face folder against the reference: numbers of the configuration, weight by weight, and what it says."""
    checks = []
    if is_native(merge.config):
        checks.append(compare_configs(merge, folder, stage=stage))
    checks.append(compare_weights(merge, folder, stage=stage, precision=precision, exempt=exempt or {}))
    try:
        model = load_language_model(folder, dtype=torch.float32).eval()
    except ModelError as error:
        return [*checks, Check(f"{stage}: loads", False, error.what, "it loads", folder.name)]
    found = answer_logits(model, probe.rows, probe.starts)
    return [*checks, *compare_logits(probe, found, stage=stage, precision=precision)]


def _folder_tokens(folder: Path, subject: Subject, *, stage: str) -> list[Check]:
    tokenizer = Tokenizer.load(folder)
    path = folder / "generation_config.json"
    stops = (read_json(path) if path.exists() else {}).get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [stops]
    template = tokenizer.chat_template
    return compare_tokens(subject.renderer, tokenizer, template, stops, subject.prompts, stage=stage)


def _write_gguf(folder: Path, subject: Subject, merge: Merge, probe: Probe, quant: str, say: Say) -> Draft:
    renderer = subject.renderer
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(subject.origin.name).name) or "model"
    written = write_gguf(
        folder / f"{name}-{quant}.gguf", merge, format=quant, tokenizer=renderer.tokenizer,
        chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids, name=name,
    )  # fmt: skip
    say("reading the GGUF back")
    draft = Draft(precision=quant, notes=list(written.notes))
    draft.checks = check_gguf(written, subject, merge, probe)
    if not llama_cpp.is_installed():
        draft.notes.append("not tried with llama.cpp: pip install 'model-foundry[gguf]' brings it")
    return draft


def check_gguf(
    written: GgufFile, subject: Subject, merge: Merge, probe: Probe, *, readers: Sequence[str] = READERS
) -> list[Check]:
    """Read a GGUF back by other code than ours, transformers' and llama.cpp's, and hold it against the reference."""
    try:
        stops, template = gguf_ends(written.path)
    except (ValueError, IndexError, OSError) as error:
        return [Check("gguf: readable", False, str(error), "the gguf package reads it", written.path.name)]
    renderer, tokenizer, checks = subject.renderer, None, []
    with tempfile.TemporaryDirectory(prefix="foundry-gguf-") as temporary:
        if "transformers" in readers:
            folder = Path(temporary, "back")
            folder.mkdir()
            try:
                convert_gguf(written.path, folder)
            except ModelError as error:
                # It knows Qwen3 with heads of 128 channels only, for example; then llama.cpp alone must agree.
                instead = "llama.cpp" in readers and llama_cpp.is_installed()
                bound = "it does, or llama.cpp"
                checks.append(Check("gguf: transformers reads it", instead, "no", bound, error.what))
            else:
                exempt = {s: kind for each in written.layouts if (kind := _KINDS.get(each.kind)) for s in each.sources}
                checks = compare_model(folder, merge, probe, stage="gguf", precision=written.format, exempt=exempt)
                tokenizer = Tokenizer.load(folder)
    checks += compare_tokens(renderer, tokenizer, template, stops, subject.prompts, stage="gguf")
    if "llama.cpp" in readers and llama_cpp.is_installed():
        checks += ask_llama_cpp(written, subject, probe)
    return checks


def ask_llama_cpp(written: GgufFile, subject: Subject, probe: Probe) -> list[Check]:
    """What llama.cpp computes from the file: numbers of tokens, logits, choices."""
    short, stage = probe.shortened(LLAMA_CPP_TOKENS), "llama.cpp"
    longest, spelled = max(len(row) for row in short.rows), subject.renderer.tokenizer.encode("a")[-1]
    try:
        model = llama_cpp.LlamaCpp(written.path, context=longest, vocab_size=probe.logits.shape[1], spelled=spelled)
        found = torch.stack([
            model.next_logprobs(row[:end].tolist())
            for row, start in zip(short.rows, short.starts, strict=True)
            for end in range(start, len(row))
        ])  # fmt: skip
        texts = [subject.renderer.text(prompt, add_generation_prompt=True) for prompt in subject.prompts]
        counts = [(model.num_tokens(text), len(subject.renderer.tokenizer.scan(text)[0])) for text in texts]
    except ModelError as error:
        return [Check(f"{stage}: readable", False, error.what, "llama.cpp loads and runs it", written.path.name)]
    differing = [number for number, (theirs, ours) in enumerate(counts) if theirs != ours]
    evidence = f"{len(counts)} prompts as text"
    if differing:
        theirs, ours = counts[differing[0]]
        evidence = f"prompt {differing[0]} has {theirs} tokens instead of {ours}"
    tokens = Check(f"{stage}: numbers of tokens", not differing, len(differing), "no prompt differs", evidence)
    return [*compare_logits(short, found, stage=stage, precision=written.format), tokens]


def gguf_ends(path: Path) -> tuple[list[int], str]:
    """The stop tokens that a file names, and its chat template."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    stops = [value(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    return [int(stop) for stop in stops if stop is not None], value("tokenizer.chat_template") or ""
