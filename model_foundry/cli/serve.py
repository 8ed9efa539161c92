"""`foundry serve MODEL|RUN|GGUF`: a model behind HTTP; `foundry serve keys …`: who may ask."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.serve import ServeConfig

DEFAULT_KEYS = Path("keys.json")


class ServeGroup(click.Group):
    """A command of its own that has `keys` as its one verb: anything else is what to serve."""

    allow_interspersed_args = True

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["keys"]:
            return keys.make_context("serve keys", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return click.Command.parse_args(self, ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return click.Command.collect_usage_pieces(self, ctx)


@click.group(
    cls=ServeGroup,
    invoke_without_command=True,
    help="Serve a model, a run or a GGUF file: /generate, OpenAI's API at /v1, a page at /.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "llama.cpp", "vllm", "mlx"]),
    help="What computes; the same as backend=….",
)
@click.option(
    "--health-check-only",
    is_flag=True,
    help="With a model: load it, ask it once, stop. Without: ask the server at host and port. Exit code 0 is healthy.",
)
@takes_config(ServeConfig, subject="model.name", subject_name="MODEL|RUN|GGUF")
def command(resolved: Resolved[ServeConfig], *, as_json: bool, backend: str | None, health_check_only: bool) -> int:
    # Read by torch's OpenMP when it is loaded: its helpers wait awake for about a millisecond, longer than the pause
    # between two products of a step. Waking one cost 0.2 ms each time; awake for good, it would take an idle core.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from model_foundry.server.running import check_health, log_as_json, serve, try_model

    config = resolved.config if backend is None else resolved.config.model_copy(update={"backend": backend})
    say = functools.partial(click.echo, err=True)
    if health_check_only:
        names_model = resolved.provenance.get("model.name", "default") != "default"
        healthy = (try_model if names_model else check_health)(config, os.environ, say=say)
        if as_json:
            click.echo(json.dumps({"healthy": healthy}))
        return 0 if healthy else 1
    if config.backend in ("vllm", "mlx"):
        from model_foundry.server.delegated import become

        become(config, os.environ, say=say)
    log_as_json()
    serve(config, os.environ, say=say)
    return 0


@click.group(help="Keys of a server: added, listed and removed. Only their hashes are kept.")
def keys() -> None: ...


def _takes_file(function: Any) -> Any:
    return click.option(
        "--file", "path", type=click.Path(path_type=Path), default=DEFAULT_KEYS, show_default=True,
        help="File of keys, which access.keys_file names.",
    )(function)  # fmt: skip


@keys.command("add", help="Make a key called NAME and print it, this once.")
@click.argument("name")
@click.option("--requests-per-minute", type=click.FloatRange(min=0, min_open=True), help="Its own rate.")
@click.option("--burst", type=click.IntRange(min=1), help="Requests that may come at once before that rate counts.")
@click.option("--admin", is_flag=True, help="It may add and remove adapters.")
@_takes_file
def add(name: str, *, requests_per_minute: float | None, burst: int | None, admin: bool, path: Path) -> None:
    from model_foundry.server.security import add_key

    click.echo(add_key(path, name, rate=requests_per_minute, burst=burst, admin=admin))
    click.echo(f"{path} holds its hash. The server reads it when it starts: access.keys_file={path}", err=True)


@keys.command("list", help="The names of the keys, and what they may do.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
@_takes_file
def list_keys(*, path: Path, as_json: bool) -> None:
    from model_foundry.server.security import read_keys

    found = read_keys(path, must_exist=True)
    rows: Sequence[dict[str, Any]] = [
        {
            "name": key.name, "created": key.created, "admin": key.admin,
            "requests_per_minute": key.requests_per_minute, "burst": key.burst,
        }
        for key in found.values()
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        rate = "the server's rate" if row["requests_per_minute"] is None else f"{row['requests_per_minute']:g} a minute"
        click.echo(f"{row['name']}  {row['created']}  {rate}{'  admin' if row['admin'] else ''}")


@keys.command("remove", help="Take the key called NAME away.")
@click.argument("name")
@_takes_file
def remove(name: str, *, path: Path) -> None:
    from model_foundry.server.security import remove_key

    remove_key(path, name)
    click.echo(f"{name} is gone; a server that runs knows it until it starts again", err=True)


command.add_command(keys)
