"""`foundry resume RUN`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from model_foundry.config.commands import METHOD_SCHEMAS, RunConfig
from model_foundry.config.load import load_config, schema_by_method
from model_foundry.errors import RunError


@click.command(help="Go on with a run where its last checkpoint left it.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(run: Path, *, as_json: bool) -> int:
    from model_foundry.cli.report import show_report
    from model_foundry.recipes.training_run import run_training

    config = stored_config(run)
    return show_report(run_training(config, resume="must"), run_dir=config.run_dir, as_json=as_json)


def stored_config(run: Path) -> RunConfig:
    """The configuration a run was started with. Its relative paths mean the folder it was started in: we go there.

    Raises:
        RunError: the folder holds no run.
    """
    from model_foundry.run.directory import RunDirectory

    path = run.resolve()
    try:
        started_in = Path(RunDirectory.read(run).facts["receipt"]["working_directory"])
    except (KeyError, TypeError) as error:
        raise RunError(f"the run's record lacks {error}", where=str(run / "run.json")) from error
    if started_in != Path.cwd():
        if not started_in.is_dir():
            raise RunError(f"the folder it was started in is gone ({started_in})", where=str(run))
        click.echo(f"going to {started_in}, where the run was started", err=True)
        os.chdir(started_in)
    schema = schema_by_method(METHOD_SCHEMAS, path=path / "config.yaml")
    config = load_config(schema, path=path / "config.yaml", environ={}).config
    return config.model_copy(update={"run_dir": path})
