"""What the command line says when something goes wrong: one paragraph on stderr, and an exit code.

0 done, 1 a check failed, 2 usage, configuration or data, 3 failure. With --json the error is an object on stdout as
well. A traceback is shown only with FOUNDRY_DEBUG=1; that of an error nobody foresaw goes to a log file.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress

import click

from model_foundry import __version__
from model_foundry.cli.extras import extra_of
from model_foundry.errors import FoundryError, InterruptedRunError, MissingExtraError, UsageError

EXIT_FAILURE = 3

MACHINE_ERRORS: dict[int, str | None] = {
    errno.ENOSPC: "Free some space, or write to another disk: run_dir=PATH for a run",
    errno.EDQUOT: "Free some space, or write to another disk: run_dir=PATH for a run",
    errno.EROFS: "Put the run where it can be written with run_dir=PATH",
    errno.EACCES: "Check who may read and write it",
    errno.EPERM: "Check who may read and write it",
    errno.EMFILE: "Raise the limit with ulimit -n",
    errno.EIO: None,
}
"""Errors of the machine rather than of ours, with what helps."""


def exit_code_of(error: BaseException, *, as_json: bool, arguments: Sequence[str] = ()) -> int:
    """Say `error` and return the exit code it means."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILURE if error.code else 0
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.UsageError) and type(error).__name__ == "NoArgsIsHelpError":  # since click 8.2
        error.show()
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Whoever read our output left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    if os.environ.get("FOUNDRY_DEBUG") == "1":
        traceback.print_exception(error)
    said = _as_foundry_error(error)
    if said is None:
        said = _unforeseen(error, arguments)
    _say(said, kind=type(error).__name__ if isinstance(error, FoundryError) else type(said).__name__, as_json=as_json)
    return said.exit_code


def hush_ctrl_c(error: BaseException) -> None:
    """We are leaving because of a signal: another impatient Ctrl-C must not interrupt saying so."""
    if isinstance(error, (KeyboardInterrupt, InterruptedRunError)):
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_foundry_error(error: BaseException) -> FoundryError | None:
    """The error in our terms, None when nobody foresaw it."""
    if isinstance(error, FoundryError):
        return error
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return FoundryError("interrupted before it was done")
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message().rstrip("."), hint=_help_hint(error))
    if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name)):
        return MissingExtraError(str(error.name).partition(".")[0], extra)
    if isinstance(error, MemoryError):
        return FoundryError("this machine's memory is full", hint="foundry doctor says how much there is")
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        where = None if error.filename is None else os.fsdecode(error.filename)
        return FoundryError(error.strerror or str(error), where=where, hint=MACHINE_ERRORS[error.errno])
    return None


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"See {context.command_path if context else 'foundry'} --help"


def _unforeseen(error: BaseException, arguments: Sequence[str]) -> FoundryError:
    """An error of ours: the traceback goes to a file whose name the paragraph gives."""
    what = " ".join(f"unforeseen {type(error).__name__}: {error}".split())
    try:
        log = _write_log(error, arguments)
    except OSError:
        traceback.print_exception(error)
        return FoundryError(what)
    return FoundryError(what, hint=f"The traceback is in {log}; FOUNDRY_DEBUG=1 prints it")


def _write_log(error: BaseException, arguments: Sequence[str]) -> str:
    handle, name = tempfile.mkstemp(prefix="foundry-error-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"model-foundry {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
        file.write(f"arguments: {list(arguments)}\n\n")
        traceback.print_exception(error, file=file)
    return name


def _say(error: FoundryError, *, kind: str, as_json: bool) -> None:
    click.echo(f"error: {error}", err=True)
    if as_json:
        fields = {"kind": kind, "what": error.what, "where": error.where, "hint": error.hint}
        click.echo(json.dumps({"error": {**fields, "exit_code": error.exit_code}}))
