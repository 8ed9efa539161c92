"""`foundry verify resume CONFIG`, `verify run RUN`, `verify export DIR`: proofs that anyone can repeat."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.commands import METHOD_SCHEMAS, RunConfig
from model_foundry.config.load import Resolved
from model_foundry.types import Check


@click.group(help="Prove that a run resumes and repeats to the last bit, and that an export is still the model.")
def command() -> None: ...


@command.command("resume", help="Kill a run again and again, resume it, and compare every bit with an undisturbed one.")
@click.option("--kills", type=click.IntRange(min=1), default=3, show_default=True, help="SIGKILLs within one run.")
@click.option("--kill-seed", type=int, default=0, show_default=True, help="Chooses the moments.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave both runs in this folder.")
@takes_config(METHOD_SCHEMAS)
def resume_command(
    resolved: Resolved[RunConfig], *, as_json: bool, kills: int, kill_seed: int, keep: Path | None
) -> int:
    from model_foundry.recipes.verify import verify_resume

    say = functools.partial(click.echo, err=True)
    return show_checks(verify_resume(resolved.config, kills=kills, keep=keep, seed=kill_seed, say=say), as_json=as_json)


@command.command("run", help="Run RUN again from its own folder, and compare every bit with what it left.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the second run in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def run_command(run: Path, *, keep: Path | None, as_json: bool) -> int:
    from model_foundry.cli.resume import stored_config
    from model_foundry.recipes.verify import verify_run

    run, keep = run.resolve(), None if keep is None else keep.resolve()
    config = stored_config(run)
    say = functools.partial(click.echo, err=True)
    return show_checks(verify_run(run, config, keep=keep, say=say), as_json=as_json)


@command.command("export", help="Repeat the checks of the export in FOLDER: hashes, then parity with its run.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--of", "source", metavar="RUN", help="What it was made from. Default: what the certificate names.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def export_command(folder: Path, *, source: str | None, as_json: bool) -> int:
    from model_foundry.cli.export import find_subject
    from model_foundry.errors import FoundryError
    from model_foundry.export.verify import read_certificate, verify_export
    from model_foundry.recipes.conversation import run_of

    folder = folder.resolve()
    certificate = read_certificate(folder)
    name = source or certificate["origin"]["name"]
    if source is None and not Path(name).exists() and (around := run_of(str(folder))) is not None:
        name = str(around)
    try:
        subject = find_subject(name)
    except FoundryError as error:
        if source is not None:
            raise
        subject = f"{error.what} ({error.where or name}); foundry verify export {folder.name} --of RUN names it"
    say = functools.partial(click.echo, err=True)
    verdict = verify_export(folder, certificate, subject, is_claimed=source is not None, say=say)
    for line in verdict.not_repeated:
        click.echo(f"not repeated: {line}", err=True)
    return show_checks(verdict.checks, as_json=as_json)


def show_checks(checks: Sequence[Check], *, as_json: bool) -> int:
    """Print checks, as a table or as JSON; 1 when one failed."""
    passed = all(check.passed for check in checks)
    if as_json:
        click.echo(json.dumps({"passed": passed, "checks": [check.as_dict() for check in checks]}, indent=2))
    else:
        for check in checks:
            click.echo(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.shown} (bound: {check.bound})")
            click.echo(f"      {check.evidence}")
    return 0 if passed else 1
