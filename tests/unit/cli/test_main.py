"""The command itself: errors of one paragraph, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from model_foundry import __version__
from model_foundry.cli.errors import exit_code_of
from model_foundry.cli.main import VERBS, main
from model_foundry.errors import (
    CheckFailedError,
    ConfigError,
    DataError,
    EngineError,
    FoundryError,
    InterruptedRunError,
    UsageError,
)


def run(*arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-m", "model_foundry", *arguments],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": root, **environ}, timeout=60,
    )  # fmt: skip


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def test_help_and_version_of_the_module() -> None:
    result = run("--help")
    assert result.returncode == 0
    for verb in VERBS:
        assert f"\n  {verb} " in result.stdout
    assert run("--version").stdout == f"model-foundry {__version__}\n"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert code() == 0
    assert "Verbs:" in capsys.readouterr().out


def test_a_group_without_a_verb_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("config") == 2
    assert "Usage: foundry config" in capsys.readouterr().err


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_of_the_table_exists(verb: str) -> None:
    """A verb in the help that isn't there would fail only when a user asks for it."""
    context = click.Context(main)
    command = main.get_command(context, verb)
    assert isinstance(command, click.Command)
    assert command.name == verb
    assert command.help


def test_a_misspelt_verb_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("trian", "x.yaml") == 2
    assert capsys.readouterr().err == "error: there is no verb 'trian'. Did you mean train?\n"


@pytest.mark.parametrize(
    "arguments",
    [["--bogus"], ["config", "chek"], ["config", "check", "--bogus"], ["config", "schema", "--command", "x"]],
)
def test_usage_errors_are_one_line_and_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "--help" in said.err


@pytest.mark.slow
def test_a_users_mistake_shows_place_and_next_step_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nlearning_rate: 3\n", encoding="utf-8")
    result = run("config", "check", "a.yaml", cwd=tmp_path)
    assert result.returncode == 2
    wanted = "error: a.yaml:2: unknown key learning_rate. Did you mean training.learning_rate?"
    assert result.stderr.startswith(wanted)
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_with_json_the_error_is_an_object_on_stdout_too(tmp_path: Path) -> None:
    result = run("config", "check", "nowhere.yaml", "--json", cwd=tmp_path)
    error = json.loads(result.stdout)["error"]
    assert (error["kind"], error["where"], error["exit_code"]) == ("ConfigError", "nowhere.yaml", 2)
    assert error["what"] == "there is no such file"
    assert result.stderr.startswith("error: nowhere.yaml: there is no such file")
    usage = run("config", "check", "--json", "--bogus")
    assert json.loads(usage.stdout)["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    "error, expected",
    [
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (EngineError("x"), 3),
        (InterruptedRunError("x"), 3),
        (CheckFailedError("x"), 1),
        (KeyboardInterrupt(), 3),
        (click.Abort(), 3),
        (click.BadParameter("x"), 2),
        (ModuleNotFoundError("no torch", name="torch.nn"), 2),
        (MemoryError(), 3),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), 3),
        (click.exceptions.Exit(7), 7),
        (SystemExit(1), 1),
        (SystemExit(None), 0),
        (SystemExit("text"), 3),
    ],
)
def test_exit_codes(error: BaseException, expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(error, as_json=False) == expected
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_no_bug_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code_of(OSError(errno.ENOSPC, "No space left on device", "/runs/x/metrics.jsonl"), as_json=False)
    said = capsys.readouterr().err
    assert said.startswith("error: /runs/x/metrics.jsonl: No space left on device. Free some space")


def test_a_missing_package_names_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code_of(ModuleNotFoundError("No module named 'torch'", name="torch"), as_json=False)
    assert "pip install 'model-foundry[train]'" in capsys.readouterr().err


def raised() -> Exception:
    try:
        raise KeyError("a secret place")
    except KeyError as error:
        return error


def test_an_unforeseen_error_names_a_log_with_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(raised(), as_json=False, arguments=["train", "x.yaml"]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said
    log = Path(said.split("The traceback is in ")[1].split(";")[0])
    text = log.read_text(encoding="utf-8")
    log.unlink()
    assert "Traceback" in text
    assert "test_main.py" in text
    assert "'x.yaml'" in text


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("config", "check", "nowhere.yaml", cwd=tmp_path, FOUNDRY_DEBUG="1")
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: nowhere.yaml")


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_not_answered_with_a_traceback() -> None:
    """`foundry config schema | head -1`"""
    command = f"{sys.executable} -m model_foundry config schema | head -c 1"
    root = str(Path(__file__).parents[3])
    environ = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environ, timeout=60)
    assert result.stdout == "{"
    assert result.stderr == ""


@pytest.mark.slow
def test_a_terminal_that_cannot_show_a_character_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("zahl: ×\n", encoding="utf-8")
    result = run("config", "check", "ключ=1", "a.yaml", cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_ctrl_c_is_a_sentence_and_exit_code_3(tmp_path: Path) -> None:
    """The configuration is a pipe that nobody writes to, so the command waits where a signal finds it."""
    pipe = tmp_path / "a.yaml"
    os.mkfifo(pipe)
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-m", "model_foundry", "config", "check", str(pipe)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
        # A shell starts what is put in its background with interrupts ignored, and so would everything below it be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said = None
    with pipe.open("w"):  # opens once the command reads
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            # One that comes right before the call that reads is noticed only after it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, said = process.communicate(timeout=3)
                break
        process.kill()
    assert process.returncode == 3
    assert said == "error: interrupted before it was done\n"


def test_help_reads_only_the_table() -> None:
    """Nothing but click and the table: neither a verb nor what it needs."""
    script = (
        "import sys\nsys.argv = ['foundry', '--help']\nfrom model_foundry.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*(name for name in sys.modules if name.startswith('model_foundry')), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = {"model_foundry", "model_foundry.cli", "model_foundry.cli.main", "model_foundry.cli.lazy"}
    assert set(result.stderr.split()) == names


def test_a_failed_proof_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(CheckFailedError("loss fell by 1 %", where="criteria.loss_fall"), as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["error"]["where"] == "criteria.loss_fall"


def test_every_error_of_the_tree_has_a_documented_exit_code() -> None:
    def tree(kind: type[FoundryError]) -> list[type[FoundryError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in tree(child))]

    assert {kind.exit_code for kind in tree(FoundryError)} == {1, 2, 3}


def test_the_table_names_modules_of_the_cli() -> None:
    for verb, (home, line) in VERBS.items():
        module, _, attribute = home.partition(":")
        assert (module, attribute) == (f"model_foundry.cli.{verb}", "command")
        assert line.endswith(".")
