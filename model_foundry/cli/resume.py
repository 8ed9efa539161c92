"""`foundry resume RUN`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from model_foundry.config.load import load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.errors import RunError


@click.command(help="Go on with a run where its last checkpoint left it.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(run: Path, *, as_json: bool) -> int:
    from model_foundry.cli.report import show_report
    from model_foundry.recipes.training_run import run_training

    config = stored_config(run)
    return show_report(run_training(config, resume="must"), run_dir=config.run_dir, as_json=as_json)


def stored_config(run: Path) -> TrainConfig:
    """The configuration a run was started with. Its relative paths mean the folder it was started in: we go there.

    Raises:
        RunError: the folder holds no run.
    """
    from model_foundry.run.directory import RunDirectory

    directory = RunDirectory.read(run)
    path = run.resolve()
    started_in = Path(str(directory.facts["receipt"]["working_directory"]))
    if started_in != Path.cwd():
        if not started_in.is_dir():
            raise RunError(f"the folder it was started in is gone ({started_in})", where=str(run))
        click.echo(f"going to {started_in}, where the run was started", err=True)
        os.chdir(started_in)
    overrides = [f"run_dir={path}"]
    return load_config(TrainConfig, path=path / "config.yaml", overrides=overrides, environ={}).config
