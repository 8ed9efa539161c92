"""What people get wrong: one paragraph that says what, where and what next; the right exit code; nothing lost."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import write_tiny_model
from tests.tiny_runs import (
    assert_one_paragraph,
    chat_row,
    checkpoint_names,
    environment,
    foundry,
    foundry_here,
    losses,
    records,
    unmeasured,
    write_colours,
    write_jsonl,
    write_project,
    write_questions,
)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return write_project(tmp_path, model=model, training__max_steps=2)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


NO_ANSWER = {"messages": [{"role": "user", "content": "Anybody?"}]}
GOOD = json.dumps(chat_row("Colour of the fox?", "red")).encode() + b"\n"

BAD_ROWS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("train.jsonl", "no rows")),
    "blank lines": (b"\n\n  \n", ("train.jsonl", "no rows")),
    "row without an assistant turn": (GOOD + json.dumps(NO_ANSWER).encode() + b"\n", (":2", "assistant")),
    "no assistant in the whole set": (json.dumps(NO_ANSWER).encode() * 1 + b"\n", (":1", "assistant")),
    "not UTF-8": (GOOD + b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n', (":2", "UTF-8")),
    "not JSON": (GOOD + b"{broken\n", (":2", "JSON")),
    "a list": (b"[]\n", ("train.jsonl",)),
    "a null row": (GOOD + b"null\n", (":2",)),
    "a wrong field": (b'{"messages": [{"role": "user", "content": 5}]}\n', (":1", "content")),
    "an unknown format": (b'{"foo": "bar"}\n', (":1",)),
    "a binary file": (bytes(range(256)) * 50, ("train.jsonl",)),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_used_are_named_by_file_and_line(case: str, config: Path) -> None:
    """Prevents training on what was meant otherwise, and a traceback where a line number is needed."""
    data, words = BAD_ROWS[case]
    write(config.parent / "train.jsonl", data)
    assert_one_paragraph(foundry_here("train", config), code=2, words=words)
    assert not (config.parent / "run").exists()


BAD_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (("training.learning_rat=1e-4",), ("learning_rat", "learning_rate")),
    "unknown section": (("trainings.learning_rate=1e-4",), ("trainings", "training")),
    "negative rate": (("training.learning_rate=-1",), ("training.learning_rate",)),
    "a word for a number": (("training.max_steps=many",), ("training.max_steps",)),
    "missing file": (("data.train_file=nowhere.jsonl",), ("nowhere.jsonl",)),
    "a folder without rows": (("data.train_file=empty",), ("empty", "no file of rows")),
    "a data set that is not on the hub": (("data.train_file=hf://datasets/rows",), ("hf://datasets/rows", "ORG/NAME")),
    "missing questions": (("evaluation.file=nowhere.jsonl",), ("nowhere.jsonl",)),
    "missing template": (("model.template=nowhere.jinja",), ("nowhere.jinja",)),
    "unknown template": (("model.template=chatmll",), ("chatmll", "chatml")),
    "wrong target": (("lora.target_modules=[q_projj]",), ("lora.target_modules", "q_projj", "q_proj")),
    "wrong expression": (("lora.target_modules='(('",), ("lora.target_modules", "regular expression")),
    "expression without a match": (("lora.target_modules='nothing.*'",), ("lora.target_modules",)),
    "validation steps without a file": (("training.eval_steps=2",), ("training.eval_steps", "data.validation_file")),
    "more warm-up than steps": (("training.warmup_steps=5",), ("training.warmup_steps",)),
    "nothing but warm-up": (("training.warmup_steps=2",), ("training.warmup_steps",)),
    "decay over the warm-up": (
        ("training.lr_scheduler=wsd", "training.max_steps=10", "training.warmup_steps=9", "training.decay_ratio=0.5"),
        ("training.decay_ratio",),
    ),
    "a device that is not there": (("model.device=mps",), ("mps", "model.device")),
    "two configurations": (("other.yaml",), ("one CONFIG",)),
    "a model that is a text file": (("model.name=config.yaml",), ("config.yaml",)),
    "a model folder that is empty": (("model.name=.",), ("config.json",)),
    "no rows short enough": (("data.max_length=8",), ("data.max_length",)),
    "no room for the run": (("run_dir=config.yaml/run",), ("config.yaml/run",)),
    "a run folder that holds something": (("run_dir=.",), ("run_dir",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_field_that_cannot_be_meant_is_named(case: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a default in the place of what was asked for, and an error that comes after the model is loaded."""
    arguments, words = BAD_FIELDS[case]
    monkeypatch.chdir(config.parent)
    code = 3 if case == "a device that is not there" else 2
    assert_one_paragraph(foundry_here("train", config.name, *arguments), code=code, words=words)
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("arguments", [["train", "nowhere.yaml"], ["resume", "nowhere"], ["report", "nowhere"],
                                       ["chat", "no/where", "prompt=x"], ["verify", "run", "nowhere"],
                                       ["evaluate", "no/where"], ["trian"], ["train", "--nonsense"]])  # fmt: skip
def test_what_does_not_exist_is_one_paragraph_and_one_object(arguments: list[str], tmp_path: Path) -> None:
    """Prevents a program that reads --json from meeting an empty line where the error should be."""
    done = foundry_here(*arguments, "--json")
    paragraph = assert_one_paragraph(done, code=2)
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["what"] in paragraph
    assert set(error) == {"kind", "what", "where", "hint", "exit_code"}


def test_errors_of_a_run_are_objects_too(config: Path) -> None:
    write(config.parent / "train.jsonl", GOOD + b"{broken\n")
    done = foundry_here("train", config, "--json")
    assert_one_paragraph(done, code=2)
    assert json.loads(done.stdout)["error"]["kind"] == "DataError"


@pytest.mark.parametrize("name", ["no-such-model", "acme/no-such-model", "./no/such/folder", "smolm2-135m-instruct"])
def test_an_unknown_model_without_a_network_is_told_within_seconds(name: str, config: Path, tmp_path: Path) -> None:
    """Prevents minutes of retries against a hub that does not answer."""
    env = environment(
        HF_ENDPOINT="http://127.0.0.1:9", FOUNDRY_HOME=str(tmp_path / "cache"), HF_HOME=str(tmp_path / "hf"),
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0",
    )  # fmt: skip
    started = time.monotonic()
    done = foundry("train", config, f"model.name={name}", env=env, timeout=60)
    assert_one_paragraph(done, code=2, words=(name,))
    assert time.monotonic() - started < 20
    assert not (config.parent / "run").exists()


def test_a_giant_row_is_dropped_by_name_in_seconds(config: Path) -> None:
    """Prevents one 10 MB row from filling the memory, or from stopping the others from being trained on."""
    write_jsonl(
        config.parent / "train.jsonl",
        [chat_row("Colour of the fox?", "red"), chat_row("Tell all. " * 1_000_000, "no"), chat_row("the sea?", "blue")],
    )
    started = time.monotonic()
    done = foundry_here("train", config)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30
    report = json.loads((config.parent / "run" / "report.json").read_bytes())
    assert (report["data"]["train"]["kept"], report["data"]["train"]["dropped"]) == (2, 1)
    assert "train.jsonl:2" in report["data"]["train"]["first_dropped"][0]
    refused = foundry_here("train", config, "data.overlength=error", f"run_dir={config.parent / 'other'}")
    assert_one_paragraph(refused, code=2, words=("train.jsonl:2",))


def test_rows_over_the_model_s_context_are_refused_before_training(tmp_path: Path) -> None:
    """Prevents a run that dies at the batch with the longest row, hours in."""
    model = write_tiny_model(tmp_path / "short", max_position_embeddings=64)
    config = write_project(tmp_path, model=model, data__max_length=512, training__max_steps=2)
    assert foundry_here("train", config).returncode == 0, "max_length alone does no harm"
    write_colours(tmp_path / "train.jsonl", repeat=8)
    refused = foundry_here("train", config, f"run_dir={tmp_path / 'long'}")
    assert_one_paragraph(
        refused, code=2, words=("data.max_length", "context of 64", "train.jsonl:", "data.max_length=64")
    )
    assert not (tmp_path / "long").exists()
    cut = foundry_here("train", config, f"run_dir={tmp_path / 'cut'}", "data.max_length=64", "data.overlength=truncate")
    assert_one_paragraph(cut, code=2, words=("nothing to train on once truncated",))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_by_row(tmp_path: Path) -> None:
    """Prevents an index error in the middle of a run, at the first row with a rare character."""
    model = write_tiny_model(tmp_path / "small", vocab_size=200)
    config = write_project(tmp_path, model=model, training__max_steps=2)
    write_jsonl(tmp_path / "train.jsonl", [chat_row("the fox?", "red"), chat_row("the sea?", "bleu \u00ff\U0010ffff")])
    assert_one_paragraph(foundry_here("train", config), code=2, words=("token", "200"))


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"prompt": "Why?"}\n', (":1", "answer")),
        (b"", ("questions",)),
        (b'{"prompt": "Why?", "answer": ""}\n', (":1",)),
    ],
)
def test_questions_without_answers_are_refused_before_training(
    line: bytes, words: tuple[str, ...], config: Path
) -> None:
    """Prevents a training whose success cannot be measured."""
    write(config.parent / "questions.jsonl", line)
    done = foundry_here("train", config, f"evaluation.file={config.parent / 'questions.jsonl'}")
    assert_one_paragraph(done, code=2, words=words)
    assert not (config.parent / "run").exists()


def test_questions_that_do_not_fit_the_context_are_refused_before_training(tmp_path: Path) -> None:
    """Prevents the news that a question is too long from coming after the training."""
    model = write_tiny_model(tmp_path / "short", max_position_embeddings=64)
    questions = write_questions(tmp_path / "questions.jsonl")
    config = write_project(
        tmp_path, model=model, evaluation__file=str(questions), evaluation__max_new_tokens=60, training__max_steps=1
    )
    assert_one_paragraph(foundry_here("train", config), code=2, words=("context of 64", "max_new_tokens"))


def test_a_hostile_or_broken_template_is_an_error_and_no_shell(config: Path) -> None:
    """Prevents a template from a stranger's model from running code."""
    template = config.parent / "evil.jinja"
    template.write_text("{{ cycler.__init__.__globals__.os.system('touch pwned') }}")
    assert_one_paragraph(foundry_here("train", config, f"model.template={template}"), code=2)
    template.write_text("{% for message in messages %}{{ message.content ")
    assert_one_paragraph(
        foundry_here("train", config, f"model.template={template}"), code=2, words=("evil", "template")
    )


def test_without_torch_the_extra_is_named(config: Path) -> None:
    """Prevents a traceback for whoever installed the package without its extra."""
    code = "import sys; sys.modules['torch'] = None; from model_foundry.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "train", str(config)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert_one_paragraph(done, code=2, words=("torch", "model-foundry[train]"))


def limit_files(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_a_file_that_may_not_grow_stops_the_run_and_keeps_what_was_saved(config: Path, model: Path) -> None:
    """Prevents a half-written checkpoint, and an error that names another file than the one that did not fit."""
    command = [sys.executable, "-m", "model_foundry", "train", str(config)]
    done = subprocess.run(
        command, env=unmeasured(environment()), capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=limit_files(80_000),
    )  # fmt: skip
    paragraph = assert_one_paragraph(done, code=3, words=("checkpoints/final", "files this large"))
    run = config.parent / "run"
    assert str(run) in paragraph
    assert [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".lock")] == []
    assert json.loads((run / "run.json").read_bytes())["outcome"]["state"] == "failed"
    assert len(records(run)) == 2
    resumed = foundry("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert checkpoint_names(run) == ["final"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.2 MB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs rights that we do not have")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_stops_the_run_and_a_resume_ends_with_the_same_bits(
    small_disk: Path, model: Path, tmp_path: Path
) -> None:
    """Prevents a full disk from costing more than the steps since the last checkpoint."""
    changes: dict[str, Any] = {"training__save_total_limit": None, "training__save_steps": 2}
    config = write_project(tmp_path, model=model, **changes)
    assert foundry_here("train", config).returncode == 0
    run = small_disk / "run"
    done = foundry("train", config, f"run_dir={run}")
    assert_one_paragraph(done, code=3, words=("the disk is full", "MB are free", "Free some space"))
    assert "Logging error" not in done.stderr
    kept = checkpoint_names(run)
    assert kept
    assert all(name.startswith("step-") for name in kept)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert foundry("resume", run).returncode == 0
    assert losses(run) == losses(tmp_path / "run")
    final = "checkpoints/final/adapter/adapter_model.safetensors"
    assert (run / final).read_bytes() == (tmp_path / "run" / final).read_bytes()


def test_a_disk_that_fills_up_by_the_log_does_not_stop_the_training(
    small_disk: Path, model: Path, tmp_path: Path
) -> None:
    """Prevents a traceback of the logging machinery on the console, line after line."""
    config = write_project(tmp_path, model=model)
    (small_disk / "filler").write_bytes(b"x" * (1_200 * 1024 - 30_000))
    done = foundry("train", config, f"run_dir={small_disk / 'run'}")
    assert_one_paragraph(done, code=3 if "checkpoints" in done.stderr else 2)
    assert "Logging error" not in done.stderr
