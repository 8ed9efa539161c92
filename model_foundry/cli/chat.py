"""`foundry chat MODEL|RUN|URL`: talk to a model, or ask it once with prompt=…."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Protocol

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.schema import ChatConfig


class Talk(Protocol):
    """A conversation, here or on a server."""

    def say(self, text: str) -> Iterator[str]: ...


@click.command(
    help="Talk to a model, a run or a server's URL; prompt=TEXT asks once. Lines on standard input are turns of one "
    "talk. A server's key is FOUNDRY_API_KEY; http://HOST:PORT#NAME chooses one of its models."
)
@takes_config(ChatConfig, subject="model.name", subject_name="MODEL|RUN|URL")
def command(resolved: Resolved[ChatConfig], *, as_json: bool) -> int:
    config = resolved.config
    talk = _open(config)
    if config.prompt is not None:
        if as_json:
            answer = "".join(talk.say(config.prompt))
            click.echo(json.dumps({"prompt": config.prompt, "answer": answer, "model": config.model.name}))
        else:
            _print_stream(talk.say(config.prompt))
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        click.echo(f"{config.model.name} · an empty line or Ctrl-D ends it", err=True)
    while True:
        line = _read_line("> " if interactive else "")
        if line is None or (interactive and not line.strip()):
            return 0
        if not line.strip():
            continue
        if as_json:
            click.echo(json.dumps({"prompt": line, "answer": "".join(talk.say(line)), "model": config.model.name}))
        else:
            _print_stream(talk.say(line))


def _open(config: ChatConfig) -> Talk:
    if config.model.name.startswith(("http://", "https://")):
        from model_foundry.server.remote_chat import RemoteConversation

        options = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
        options["max_tokens"] = config.max_new_tokens
        key = os.environ.get("FOUNDRY_API_KEY", "").strip() or None
        return RemoteConversation(config.model.name, key=key, system=config.system, options=options)
    from model_foundry.recipes.conversation import open_conversation
    from model_foundry.run.logs import run_logging

    with run_logging(level="warning"):
        return open_conversation(config)


def _read_line(prompt: str) -> str | None:
    if prompt:
        click.echo(prompt, nl=False)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _print_stream(pieces) -> None:
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
