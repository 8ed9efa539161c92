"""Reading an export back and holding it against the reference, kind by kind: right after writing, and again later.

    folder ─► transformers, llama.cpp, our own reader ─► checks

Writes nothing into the folder, and decides nothing: `hand_over` refuses, `verify` reports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from model_foundry.errors import FoundryError, ModelError
from model_foundry.export.certificate import Origin
from model_foundry.export.gguf import GgufFile, gguf_context, plan_layout, write_gguf
from model_foundry.export.go_template import derive
from model_foundry.export.llama_cpp import LlamaCpp
from model_foundry.export.merge import Merge, plan_merge
from model_foundry.export.modelfile import check_modelfile
from model_foundry.export.parity import (
    Probe,
    answer_logits,
    compare_configs,
    compare_ids,
    compare_logits,
    compare_tokens,
    compare_weights,
    load_with_adapter,
    make_probe,
    prompts_that_fit,
)
from model_foundry.models.config import ModelConfig, is_native
from model_foundry.models.folder import read_json
from model_foundry.models.gguf import convert_gguf
from model_foundry.models.language_model import load_language_model
from model_foundry.models.llama_cpp import is_installed, private_socket
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Check, Message

Kind = Literal["adapter", "merged", "gguf", "gguf-adapter", "ollama"]
READERS = ("transformers", "llama.cpp")
ADAPTER = "adapter"
"""Key of an adapter's file among an export's files, where it goes on top of the other one."""
LLAMA_CPP_TOKENS = 4
"""Tokens of each answer that llama.cpp is asked for: each brings a distribution over the whole vocabulary."""
HARD_TEXTS = (
    "In 1984 it's 3.14159, 20,000 or 1e-5; they'll say DON'T!", "  four  spaces \n\n\n\tand a tab, \r\nthen an end  ",
    "Ça va, naïve Zoë? Größe 42 – “Привет”, 東京, नमस्ते 😀", "if (x >= 10) { return a[i]->b_c(\"d\"); } // #!/bin/sh",
)  # fmt: skip
"""Tokenised beside the prompts: on plain words alone two ways of splitting a text often agree."""
NOT_TRIED = "not tried with llama.cpp: pip install 'model-foundry[gguf]' brings it"

NO_TEMPLATE = "it has no chat template: prompts are plain texts, and the export has none either"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is exported.

    Attributes:
        base: Hugging Face folder; adapter: PEFT folder on top, or None for a model that is whole.
        renderer: as the model was trained with.
        prompts: held-out conversations for the checks.
        system: the system prompt that the run's questions were asked with.
    """

    base: Path
    adapter: Path | None
    renderer: Renderer
    prompts: tuple[tuple[Message, ...], ...]
    origin: Origin
    system: str | None = None


@dataclass(slots=True)
class Draft:
    """An export that is written and not yet accepted.

    Attributes:
        files: format or precision -> name of the file that holds the weights, where one does; `ADAPTER` -> what goes
            on top of it.
    """

    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    precision: str = "float32"
    files: dict[str, str] = field(default_factory=dict)


def ask_reference(subject: Subject, merge: Merge, kind: Kind) -> tuple[Subject, Probe, str | None]:
    """The reference's answers; the subject with the prompts that were asked, and why others were not.

    Raises:
        ModelError: no prompt fits the context that the export has. EngineError, TemplateError: as `make_probe`.
    """
    context, called = None, "context"
    if is_native(merge.config):
        config = ModelConfig.from_hf(merge.config)
        by_llama_cpp = kind in ("gguf", "gguf-adapter", "ollama")
        context = gguf_context(config) if by_llama_cpp else config.max_position_embeddings
        called = "context" if context == config.max_position_embeddings else "sliding window"
    if context is None:
        return subject, make_probe(merge, subject.renderer, subject.prompts), None
    prompts = prompts_that_fit(subject.renderer, subject.prompts, context, called=called)
    num_left = len(subject.prompts) - len(prompts)
    note = f"{num_left} of {len(subject.prompts)} prompts do not fit its {called} of {context} and were not asked"
    probe = make_probe(merge, subject.renderer, prompts, context=context)
    return replace(subject, prompts=prompts), probe, note if num_left else None


def measure(
    folder: Path, kind: Kind, subject: Subject, merge: Merge, probe: Probe, *, precision: str, files: Mapping[str, str]
) -> list[Check]:
    """Every check of an export that lies in `folder`.

    Args:
        precision: of a merged folder; files: as in `Draft`.
    """
    if kind == "adapter":
        return check_adapter(folder, subject, probe)
    if kind == "merged":
        return check_merged(folder, subject, merge, probe, precision=precision)
    checks: list[Check] = []
    on_top = files.get(ADAPTER)
    sources = {format: name for format, name in files.items() if format != ADAPTER}
    for format, name in sources.items():
        if kind == "gguf-adapter":
            found = check_gguf_adapter(folder / name, format, subject, merge, probe)
        else:
            held, above = (merge, None) if on_top is None else (plan_merge(merge.base, None), folder / on_top)
            layouts = plan_layout(ModelConfig.from_hf(held.config), held.shapes, format, [])
            found = check_gguf(GgufFile(folder / name, format, layouts, ()), subject, held, probe, adapter=above)
        several = len(sources) > 1
        checks += [replace(check, name=f"{format} {check.name}") if several else check for check in found]
    if kind == "ollama":
        derived, (source,) = derive(subject.renderer), sources.values()
        checks += check_modelfile(
            folder, subject.renderer, derived, system=subject.system,
            context=gguf_context(ModelConfig.from_hf(merge.config)), source=source, adapter=on_top,
        )  # fmt: skip
    return checks


def check_adapter(folder: Path, subject: Subject, probe: Probe) -> list[Check]:
    """An adapter folder on the base, in float32."""
    try:
        logits = answer_logits(load_with_adapter(subject.base, folder), probe.rows, probe.starts)
    except FoundryError as error:
        return [Check("adapter: loads", False, error.what, "it loads onto its base", folder.name)]
    checks = compare_logits(probe, logits, stage="adapter", precision="float32")
    return checks + folder_tokens(folder, subject, stage="adapter")


def check_merged(folder: Path, subject: Subject, merge: Merge, probe: Probe, *, precision: str) -> list[Check]:
    """A merged Hugging Face folder."""
    checks = compare_model(folder, merge, probe, stage="merged", precision=precision)
    return checks + folder_tokens(folder, subject, stage="merged")


def compare_model(
    folder: Path,
    merge: Merge,
    probe: Probe | None,
    *,
    stage: str,
    precision: str,
    types: Mapping[str, str] | None = None,
) -> list[Check]:
    """A Hugging Face folder against the reference: numbers of the configuration, weight by weight, and what it says.

    Args:
        probe: None where the folder alone is not what was asked.
        types: of each weight as it was stored, see `compare_weights`.
    """
    checks = []
    try:
        if is_native(merge.config):
            checks.append(compare_configs(merge, folder, stage=stage))
        checks.append(compare_weights(merge, folder, stage=stage, precision=precision, types=types or {}))
        if probe is None:
            return checks
        model = load_language_model(folder, dtype=torch.float32).eval()
    except ModelError as error:
        return [*checks, Check(f"{stage}: loads", False, error.what, "it loads", folder.name)]
    found = answer_logits(model, probe.rows, probe.starts)
    return [*checks, *compare_logits(probe, found, stage=stage, precision=precision)]


def folder_tokens(folder: Path, subject: Subject, *, stage: str) -> list[Check]:
    """Tokenizer, template and stop tokens of a Hugging Face folder."""
    try:
        tokenizer = Tokenizer.load(folder)
        path = folder / "generation_config.json"
        stops = (read_json(path) if path.exists() else {}).get("eos_token_id", [])
    except FoundryError as error:
        return [Check(f"{stage}: tokenizer", False, error.what, "it loads", folder.name)]
    stops = stops if isinstance(stops, list) else [stops]
    template = tokenizer.chat_template
    return compare_tokens(subject.renderer, tokenizer, template, stops, subject.prompts, stage=stage)


def check_gguf(
    written: GgufFile,
    subject: Subject,
    merge: Merge,
    probe: Probe,
    *,
    readers: Sequence[str] = READERS,
    adapter: Path | None = None,
) -> list[Check]:
    """Read a GGUF back by other code than ours, transformers' and llama.cpp's, and hold it against the reference.

    Args:
        merge: what the file holds; with an adapter's GGUF on top of it, the base alone.
    """
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
                instead = "llama.cpp" in readers and is_installed()
                bound = "it does, or llama.cpp"
                checks.append(Check("gguf: transformers reads it", instead, "no", bound, error.what))
            else:
                types = {source: each.kind.lower() for each in written.layouts for source in each.sources}
                asked = probe if adapter is None else None
                checks = compare_model(folder, merge, asked, stage="gguf", precision=written.format, types=types)
                tokenizer = Tokenizer.load(folder)
    checks += compare_tokens(renderer, tokenizer, template, stops, subject.prompts, stage="gguf")
    if adapter is not None and not is_installed():
        checks.append(_nobody_reads_adapter())
    elif "llama.cpp" in readers and is_installed():
        checks += ask_llama_cpp(written.path, written.format, subject, probe, adapter=adapter)
    return checks


def check_gguf_adapter(path: Path, format: str, subject: Subject, merge: Merge, probe: Probe) -> list[Check]:
    """An adapter's GGUF on top of the base as a GGUF in float32, through llama.cpp."""
    if not is_installed():
        return [_nobody_reads_adapter()]
    renderer = subject.renderer
    with tempfile.TemporaryDirectory(prefix="foundry-gguf-") as temporary:
        base = write_gguf(
            Path(temporary, "base.gguf"), plan_merge(merge.base, None), format="f32", tokenizer=renderer.tokenizer,
            chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids, name="base",
        )  # fmt: skip
        return ask_llama_cpp(base.path, format, subject, probe, adapter=path)


def _nobody_reads_adapter() -> Check:
    """An adapter's GGUF is read by llama.cpp alone: without it nothing is known of the file."""
    evidence = "pip install 'model-foundry[gguf]' brings it"
    return Check("llama.cpp: installed", False, "no", "llama.cpp loads and runs the adapter", evidence)


def ask_llama_cpp(
    path: Path, format: str, subject: Subject, probe: Probe, *, adapter: Path | None = None
) -> list[Check]:
    """What llama.cpp computes from the file: logits, choices, the tokens of a text, and that it stops."""
    short, stage, renderer = probe.shortened(LLAMA_CPP_TOKENS), "llama.cpp", subject.renderer
    longest, spelled = max(len(row) for row in short.rows), renderer.tokenizer.encode("a")[-1]
    start = short.rows[0][: short.starts[0]].tolist()
    stops = renderer.stop_token_ids[:3]  # a GGUF names three
    texts = [*(renderer.text(prompt, add_generation_prompt=True) for prompt in subject.prompts), *HARD_TEXTS]
    wanted = [renderer.tokenizer.scan(text)[0] for text in texts]
    vocab_size = probe.logits.shape[1]
    try:
        with private_socket() as socket:
            model = LlamaCpp(
                path, socket=socket, context=longest, vocab_size=vocab_size, spelled=spelled, adapter=adapter
            )
            tokens = [model.tokens(text) for text in texts]
        found = torch.stack([
            model.next_logprobs(row[:end].tolist())
            for row, start in zip(short.rows, short.starts, strict=True)
            for end in range(start, len(row))
        ])  # fmt: skip
        running = [stop for stop in stops if not model.stops_at(start, stop)]
        stops_anyway = model.stops_at(start, spelled)
    except ModelError as error:
        return [Check(f"{stage}: readable", False, error.what, "llama.cpp loads and runs it", (adapter or path).name)]
    return [
        *compare_logits(short, found, stage=stage, precision=format),
        compare_ids(wanted, tokens, stage=stage),
        _stopping(renderer, stops, running, stops_anyway=stops_anyway, stage=stage),
    ]


def _stopping(
    renderer: Renderer, stops: Sequence[int], running: Sequence[int], *, stops_anyway: bool, stage: str
) -> Check:
    """Each stop token was made the model's choice; an ordinary one as well, which must not end anything."""
    evidence = f"chosen one after the other: {[renderer.tokenizer.decode([stop]) for stop in stops]}"
    if running:
        evidence = f"it goes on after {', '.join(repr(renderer.tokenizer.decode([stop])) for stop in running)}"
    elif stops_anyway:
        evidence = "it stops at an ordinary token as well"
    bound = "generation ends at every stop token, and at no other"
    return Check(f"{stage}: stops", not running and not stops_anyway, len(running), bound, evidence)


def gguf_ends(path: Path) -> tuple[list[int], str]:
    """The stop tokens that a file names, and its chat template."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    stops = [value(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    return [int(stop) for stop in stops if stop is not None], value("tokenizer.chat_template") or ""
