"""The command `foundry`: a table of verbs, each loaded only when it is asked for.

Imports click and nothing else, so that `--help` is instant: even `cli.errors`, which words the errors that end here, is
imported when there is one.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from model_foundry import __version__
from model_foundry.cli.lazy import LazyGroup

VERBS: dict[str, tuple[str, str]] = {
    "train": ("model_foundry.cli.train:command", "Fine-tune a model, and prove that it improved."),
    "rl": ("model_foundry.cli.rl:command", "Train by reward: arithmetic, through a training service."),
    "resume": ("model_foundry.cli.resume:command", "Go on with a run where its last checkpoint left it."),
    "evaluate": ("model_foundry.cli.evaluate:command", "Ask a model held-out questions and score the answers."),
    "chat": ("model_foundry.cli.chat:command", "Talk to a model, a run or a server."),
    "serve": ("model_foundry.cli.serve:command", "Serve a model over HTTP: /generate, OpenAI's API, a page."),
    "export": ("model_foundry.cli.export:command", "Hand a trained model over, measured before it is accepted."),
    "service": (
        "model_foundry.cli.service:command",
        "Train for clients of the Tinker protocol; survives being killed.",
    ),
    "data": ("model_foundry.cli.data:command", "Check, inspect, convert, deduplicate and pack training data."),
    "generate": (
        "model_foundry.cli.generate:command",
        "Make a data set from code through a batch API, never paid twice.",
    ),
    "tokenizer": ("model_foundry.cli.tokenizer:command", "Train a vocabulary, and report how well one fits."),
    "models": ("model_foundry.cli.models:command", "Fetch, list and describe models."),
    "config": ("model_foundry.cli.config:command", "Check a configuration, print its schema."),
    "verify": ("model_foundry.cli.verify:command", "Prove that a run resumes and repeats, and an export is the model."),
    "runs": ("model_foundry.cli.runs:command", "List runs and compare them."),
    "report": ("model_foundry.cli.report:command", "Write a run's report again."),
    "doctor": ("model_foundry.cli.doctor:command", "Say what this machine has and what is missing."),
}
"""Verb -> (module:attribute of its click command, help line)."""

EPILOG = "foundry VERB --help says more. Docs: docs/configuration.md, docs/cli.md."


class Foundry(LazyGroup):
    """The verbs, and how a command line ends: an exit code, and one paragraph for an error."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:
        """Run a command line and leave with its exit code; every error becomes one paragraph.

        A verb's integer result is its exit code.
        """
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        as_json = "--json" in arguments
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character must not end a run
                stream.reconfigure(errors="backslashreplace")
        try:
            code = self._run_or_follow(arguments, prog_name or "foundry")
            sys.stdout.flush()
        except BaseException as error:
            from model_foundry.cli.errors import exit_code_of, hush_ctrl_c

            hush_ctrl_c(error)
            code = exit_code_of(error, as_json=as_json, arguments=arguments)
        sys.exit(code)

    def _run_or_follow(self, arguments: list[str], prog_name: str) -> int:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:  # torchrun started several of us
            from model_foundry.cli.ranks import run_as_rank

            return run_as_rank(lambda: self._run(arguments, prog_name), arguments)
        return self._run(arguments, prog_name)

    def _run(self, arguments: list[str], prog_name: str) -> int:
        try:
            with self.make_context(prog_name, arguments) as context:
                result = self.invoke(context)
        except click.exceptions.Exit as leave:
            return leave.exit_code
        return result if type(result) is int else 0


@click.command(
    cls=Foundry,
    table=VERBS,
    epilog=EPILOG,
    subcommand_metavar="VERB [CONFIG] [KEY=VALUE]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="model-foundry", message="%(prog)s %(version)s")
def main() -> None:
    """Train, fine-tune and ship language models, with proof at every hand-over.

    CONFIG is a YAML file and KEY=VALUE overrides one field of it, for example:
    foundry train examples/demo/demo.yaml training.learning_rate=5e-5
    """
