"""`foundry export RUN --to merged|gguf|adapter`: hand a trained model over, measured before it is accepted."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from model_foundry.export.hand_over import Subject
    from model_foundry.types import Message

QUESTIONS = (
    "What is the capital of France?", "Write one sentence about the sea.", "Count from one to five.",
    "def add(a, b):", "Name three colours.", "Why is the sky blue?",
)  # fmt: skip
"""Asked where a run brings no held-out questions of its own."""
MAX_PROMPTS = 8


@click.command(help="Export RUN (or a checkpoint, an adapter, a model) and prove that it is the same model.")
@click.argument("name", metavar="RUN")
@click.option("--to", "kind", type=click.Choice(["merged", "gguf", "adapter"]), required=True, help="What to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Type of a merged folder's weights."
)
@click.option("--quant", default="f16", show_default=True, help="Format of a GGUF: f32, f16, bf16, q8_0, q5_1 … q4_0.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: exports/ in the run, or here.")
@click.option("--json", "as_json", is_flag=True, help="Print the certificate.")
def command(name: str, *, kind: str, dtype: str | None, quant: str, out: Path | None, as_json: bool) -> int:
    from model_foundry.errors import UsageError
    from model_foundry.export.gguf import check_format
    from model_foundry.export.hand_over import export

    if dtype is not None and kind != "merged":
        hint = "A GGUF's type is set with --quant." if kind == "gguf" else "An adapter is copied as it is."
        raise UsageError("--dtype is for --to merged", hint=hint)
    if kind == "gguf":
        quant = check_format(quant)
    subject = find_subject(name)
    target = (out or default_folder(name, kind, quant if kind == "gguf" else dtype)).resolve()
    say = functools.partial(click.echo, err=True)
    certificate = export(subject, target, kind=kind, dtype=dtype, quant=quant, say=say)  # pyright: ignore[reportArgumentType]
    if as_json:
        click.echo(json.dumps({"folder": str(target)} | certificate, indent=2, ensure_ascii=False))
        return 0
    for check in certificate["checks"]:
        value = f"{check['value']:.3g}" if isinstance(check["value"], float) else check["value"]
        click.echo(f"{'pass' if check['passed'] else 'FAIL'}  {check['name']}: {value} ({check['bound']})")
    for note in certificate["notes"]:
        click.echo(f"note  {note}")
    click.echo(f"{kind} is in {target}")
    return 0


def find_subject(name: str) -> Subject:
    """What NAME stands for, with the renderer that it was trained with and prompts that it was not trained on."""
    from model_foundry.config.schema import ModelSection
    from model_foundry.export.certificate import Origin
    from model_foundry.export.hand_over import Subject
    from model_foundry.export.merge import adapter_sha256
    from model_foundry.models.finder import resolve_model
    from model_foundry.models.folder import fingerprint
    from model_foundry.recipes.conversation import as_trained
    from model_foundry.rendering import Renderer
    from model_foundry.tokenizer import Tokenizer

    source = resolve_model(name)
    section, now = as_trained(ModelSection(name=name))
    renderer = Renderer(Tokenizer.load(source.folder), section.template, now=now)
    renderer.require_template()
    prompts, prompts_from = held_out_prompts(name)
    origin = Origin(
        name=name,
        base=str(source.provenance.get("base", source.provenance.get("repository", source.folder.name))),
        base_fingerprint=fingerprint(source.folder),
        adapter_sha256=None if source.adapter is None else adapter_sha256(source.adapter),
        renderer=renderer.name,
        prompts_from=prompts_from,
        licence=source.provenance.get("licence"),
    )
    return Subject(source.folder, source.adapter, renderer, prompts, origin)


def held_out_prompts(name: str) -> tuple[tuple[tuple[Message, ...], ...], str]:
    """The run's own questions where it has some, else general ones; and where they come from."""
    from model_foundry.evals.generation import read_questions
    from model_foundry.recipes.conversation import run_of, stored_section
    from model_foundry.run.directory import RunDirectory
    from model_foundry.types import Message

    run = run_of(name)
    if run is not None:
        stored, started_in = stored_section(RunDirectory.read(run).facts, "evaluation")
        if stored.get("file") and (path := started_in / str(stored["file"])).exists():
            questions = read_questions(path, system=stored.get("system"))
            return tuple(tuple(question.messages) for question in questions[:MAX_PROMPTS]), f"{path.name} of the run"
    return tuple((Message("user", question),) for question in QUESTIONS), "foundry export itself"


def default_folder(name: str, kind: str, detail: str | None) -> Path:
    """`exports/merged-bfloat16` and the like, in the run's folder, or here for what is none."""
    from model_foundry.recipes.conversation import run_of

    run, last = run_of(name), f"{kind}-{detail}" if detail else kind
    return Path("exports", f"{Path(name).name}-{last}") if run is None else run / "exports" / last
