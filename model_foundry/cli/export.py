"""`foundry export RUN --to adapter|merged|gguf|gguf-adapter|ollama`: hand a trained model over, measured first."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from model_foundry.export.measure import Subject
    from model_foundry.types import Message

QUESTIONS = (
    "What is the capital of France?", "Write one sentence about the sea.", "Count from one to five.",
    "def add(a, b):", "Name three colours.", "Why is the sky blue?",
)  # fmt: skip
"""Asked where a run brings no held-out questions of its own."""
MAX_PROMPTS = 8
KINDS = ("adapter", "merged", "gguf", "gguf-adapter", "ollama")


@click.command(help="Export RUN (or a checkpoint, an adapter, a model) and prove that it is the same model.")
@click.argument("name", metavar="RUN")
@click.option("--to", "kind", type=click.Choice(KINDS), required=True, help="What to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Type of a merged folder's weights."
)
@click.option(
    "--quant",
    help="Formats of a GGUF, one file each: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m …  [default: f16; ollama: q8_0]",
)
@click.option(
    "--separate", is_flag=True, help="With --to ollama: base and adapter as files of their own (FROM and ADAPTER)."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: exports/ in the run, or here.")
@click.option("--register", metavar="NAME", help="With --to ollama: make the model NAME in the running Ollama, ask it.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate.")
def command(
    name: str,
    *,
    kind: str,
    dtype: str | None,
    quant: str | None,
    separate: bool,
    out: Path | None,
    register: str | None,
    as_json: bool,
) -> int:
    from model_foundry.export.hand_over import export
    from model_foundry.recipes.interruption import leave_on_signals

    quants = _formats(kind, dtype=dtype, quant=quant, register=register, separate=separate)
    subject = find_subject(name)
    detail = "+".join(quants) if quants else dtype
    target = (out or default_folder(name, kind, f"{detail}-separate" if separate else detail)).resolve()
    say = functools.partial(click.echo, err=True)
    with leave_on_signals():  # what is half written goes with us
        certificate = export(
            subject,
            target,
            kind=kind,  # pyright: ignore[reportArgumentType]
            dtype=dtype,
            quants=quants,
            separate=separate,
            say=say,
        )
    answer = None if register is None else _register(target, register, subject, say)
    if as_json:
        registered = {} if register is None else {"registered": register, "answer": answer}
        click.echo(json.dumps({"folder": str(target)} | registered | certificate, indent=2, ensure_ascii=False))
        return 0
    for check in certificate["checks"]:
        value = f"{check['value']:.3g}" if isinstance(check["value"], float) else check["value"]
        click.echo(f"{'pass' if check['passed'] else 'FAIL'}  {check['name']}: {value} ({check['bound']})")
    for note in certificate["notes"]:
        click.echo(f"note  {note}")
    if answer is not None:
        click.echo(f"Ollama has it as {register}; it answers {answer!r}")
    click.echo(f"{kind} is in {target}")
    return 0


def _formats(
    kind: str, *, dtype: str | None, quant: str | None, register: str | None, separate: bool
) -> tuple[str, ...]:
    """The formats of the GGUF files; options that mean nothing here are refused before anything is loaded."""
    from model_foundry.errors import UsageError
    from model_foundry.export.quantise import check_formats

    has_gguf = kind in ("gguf", "gguf-adapter", "ollama")
    if dtype is not None and kind != "merged":
        hint = "A GGUF's type is set with --quant." if has_gguf else "An adapter is copied as it is."
        raise UsageError("--dtype is for --to merged", hint=hint)
    if quant is not None and not has_gguf:
        hint = "A merged folder's type is set with --dtype." if kind == "merged" else "An adapter is copied as it is."
        raise UsageError("--quant is for a GGUF", hint=hint)
    if separate and kind != "ollama":
        raise UsageError("--separate is for --to ollama", hint="The adapter alone is --to gguf-adapter.")
    if register is not None:
        from model_foundry.export.ollama import check_model_name

        if kind != "ollama":
            raise UsageError("--register is for --to ollama")
        check_model_name(register)
    return check_formats(quant or ("q8_0" if kind == "ollama" else "f16")) if has_gguf else ()


def _register(folder: Path, name: str, subject: Subject, say: Callable[[str], None]) -> str:
    from model_foundry.export.ollama import register

    say(f"making {name} in Ollama")
    question = next(message.content for message in subject.prompts[0] if message.role == "user")
    return register(folder, name, question=question)


def find_subject(name: str) -> Subject:
    """What NAME stands for, with the renderer that it was trained with and prompts that it was not trained on."""
    from model_foundry.config.schema import ModelSection
    from model_foundry.export.certificate import Origin
    from model_foundry.export.measure import Subject
    from model_foundry.export.merge import adapter_sha256
    from model_foundry.export.plain_prompts import PlainPrompts
    from model_foundry.models.finder import resolve_model
    from model_foundry.models.folder import fingerprint
    from model_foundry.recipes.conversation import as_trained
    from model_foundry.rendering import Renderer
    from model_foundry.tokenizer import Tokenizer

    source = resolve_model(name)
    section, now = as_trained(ModelSection(name=name))
    renderer = Renderer(Tokenizer.load(source.folder), section.template, now=now)
    if not renderer.template_text:
        renderer = PlainPrompts(renderer.tokenizer, now=now)
    prompts, prompts_from, system = held_out_prompts(name)
    origin = Origin(
        name=name,
        base=str(source.provenance.get("base", source.provenance.get("repository", source.folder.name))),
        base_fingerprint=fingerprint(source.folder),
        adapter_sha256=None if source.adapter is None else adapter_sha256(source.adapter),
        renderer=renderer.name,
        prompts_from=prompts_from,
        licence=source.provenance.get("licence"),
    )
    return Subject(source.folder, source.adapter, renderer, prompts, origin, system)


def held_out_prompts(name: str) -> tuple[tuple[tuple[Message, ...], ...], str, str | None]:
    """The run's own questions where it has some, else general ones; where they come from; their system prompt."""
    from model_foundry.evals.generation import read_questions
    from model_foundry.recipes.conversation import run_of, stored_section
    from model_foundry.run.directory import RunDirectory
    from model_foundry.types import Message

    run = run_of(name)
    if run is not None:
        stored, started_in = stored_section(RunDirectory.read(run).facts, "evaluation")
        if stored.get("file") and (path := started_in / str(stored["file"])).exists():
            questions = read_questions(path, system=stored.get("system"))
            prompts = tuple(tuple(question.messages) for question in questions[:MAX_PROMPTS])
            return prompts, f"{path.name} of the run", stored.get("system")
    return tuple((Message("user", question),) for question in QUESTIONS), "foundry export itself", None


def default_folder(name: str, kind: str, detail: str | None) -> Path:
    """`exports/merged-bfloat16` and the like, in the run's folder, or here for what is none."""
    from model_foundry.recipes.conversation import run_of

    run, last = run_of(name), f"{kind}-{detail}" if detail else kind
    return Path("exports", f"{Path(name).name}-{last}") if run is None else run / "exports" / last
