"""The way of a person through the command line, as real processes: train, ask, measure, compare, prove."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from model_foundry.recipes.verify import compare_runs
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import (
    COLOURS,
    assert_one_paragraph,
    checkpoint_names,
    environment,
    foundry,
    foundry_here,
    write_colours,
    write_project,
    write_questions,
)

CHECKS = ["loss_fall", "answers_improved", "parameters_changed", "artefacts_load", "replay_identical"]


@dataclass(frozen=True)
class Home:
    """A folder in which everything is named relative to it, as people do, and the run that was made there."""

    folder: Path
    config: Path
    stdout: str
    stderr: str

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "first"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    write_tiny_model(folder / "model", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    config = write_project(
        folder, model=Path("model"), run_dir="runs/first", data__train_file="train.jsonl",
        training__max_steps=50, training__learning_rate=0.01, evaluation__file="questions.jsonl",
        evaluation__max_new_tokens=12, criteria__replay_steps=5, criteria__loss_fall=0.5,
        criteria__answers_improved=0.8, criteria__parameters_changed=0.8,
    )  # fmt: skip
    write_questions(folder / "questions.jsonl")
    done = foundry("train", "config.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return Home(folder, config, done.stdout, done.stderr)


def test_training_leaves_a_report_for_people_and_one_for_programs(home: Home) -> None:
    """Prevents a run whose success nobody can read."""
    report = json.loads((home.run / "report.json").read_bytes())
    assert report["verdict"] == "passed"
    assert [check["name"] for check in report["checks"]] == CHECKS
    assert all(set(check) == {"name", "passed", "value", "bound", "evidence"} for check in report["checks"])
    assert report["evaluation"]["before"]["exact"] == 0.0
    assert report["evaluation"]["after"]["exact"] == 1.0
    assert {"training", "data", "memory", "machine", "reproduce"} <= report.keys()
    page = (home.run / "report.html").read_text()
    assert "Colour of the fox?" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "passed" in home.stdout
    assert "tokens/s" in home.stderr
    names = {path.name for path in home.run.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints.jsonl", "run.log", "checkpoints"} <= names
    facts = json.loads((home.run / "run.json").read_bytes())
    assert facts["receipt"]["data"].keys() == {"train_file", "questions"}
    assert facts["receipt"]["torch"]["num_threads"] == 1
    assert facts["outcome"]["state"] == "finished"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_learnt_answer_comes_back_from_any_folder(elsewhere: bool, home: Home, tmp_path: Path) -> None:
    """Prevents a run that can only be talked to from the folder it was started in."""
    done = foundry("chat", home.run, "prompt=Colour of the owl? ", cwd=tmp_path if elsewhere else home.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "brown\n"


def test_chat_answers_lines_of_standard_input_and_speaks_json(home: Home) -> None:
    """Prevents a chat that a script cannot use."""
    done = foundry("chat", home.run, "--json", "prompt=Colour of the sea? ", cwd=home.folder)
    assert json.loads(done.stdout) == {
        "prompt": "Colour of the sea? ", "answer": "blue", "model": str(home.run)
    }  # fmt: skip
    silent = foundry("chat", home.run, cwd=home.folder)
    assert (silent.returncode, silent.stdout) == (0, "")


def test_evaluate_asks_the_run_s_own_questions(home: Home, tmp_path: Path) -> None:
    """Prevents another score than the report's, or questions that are not found from elsewhere."""
    done = foundry("evaluate", home.run, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    questions = result["suites"]["questions"]
    assert questions["after"]["metrics"]["exact"]["value"] == 1.0
    assert questions["before"]["metrics"]["exact"]["value"] == 0.0
    assert questions["changes"]["exact"]["verdict"] == "better"
    assert questions["after"]["num_rows"] == len(COLOURS)
    assert questions["after"]["metrics"]["exact"]["interval"][0] < 0.7  # eight of eight is not certain
    cases = json.loads((home.run / "report.json").read_bytes())["evaluation"]["cases"]
    for side in ("before", "after"):
        assert [row["answers"][0]["text"] for row in questions[side]["rows"]] == [case[side] for case in cases]
    base = foundry("evaluate", "model", "evaluation.file=questions.jsonl", "evaluation.max_new_tokens=12",
                   "model.template=chatml", "--show", 2, cwd=home.folder)  # fmt: skip
    assert base.returncode == 0, base.stderr
    assert "exact     0.0 %" in base.stdout
    assert "NOT JUDGED" in base.stdout


def test_runs_report_and_resume_know_the_run(home: Home) -> None:
    """Prevents commands that disagree about what a run is."""
    listed = json.loads(foundry("runs", home.folder / "runs", "--json").stdout)["runs"]
    assert [(row["state"], row["step"], row["total_steps"]) for row in listed] == [("finished", 50, 50)]
    assert listed[0]["checks"] == {"passed": 5, "total": 5}
    (home.run / "report.html").unlink()
    done = foundry("report", home.run)
    assert done.returncode == 0, done.stderr
    assert (home.run / "report.html").exists()
    resumed = foundry_here("resume", home.run)
    assert resumed.returncode == 0
    assert "has finished already" in resumed.stderr


def test_verify_run_runs_it_again_and_compares(home: Home, tmp_path: Path) -> None:
    """Prevents a receipt that lacks what decides the result; the threads come from the receipt, not from here."""
    done = foundry("verify", "run", home.run, "--json", cwd=tmp_path, env=environment(OMP_NUM_THREADS="2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["passed"] for check in json.loads(done.stdout)["checks"]] == [True, True]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "something").touch()
    assert_one_paragraph(
        foundry_here("verify", "run", home.run, "--keep", kept), code=2, words=("not an empty folder",)
    )


def test_verify_run_refuses_what_it_cannot_compare(home: Home, tmp_path: Path) -> None:
    """Prevents minutes of training before the news that there is nothing to compare with."""
    assert_one_paragraph(foundry_here("verify", "run", tmp_path), code=2, words=("holds no run",))
    config = write_project(tmp_path, model=home.folder / "model", training__max_steps=3)
    assert foundry_here("train", config).returncode == 0
    weights = tmp_path / "run" / "checkpoints" / "final" / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert_one_paragraph(foundry_here("verify", "run", tmp_path / "run"), code=3, words=(weights.name,))


def test_the_plan_is_printed_and_nothing_is_written(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a dry run that leaves a folder which the real run then stumbles over."""
    before = sorted(home.folder.rglob("*"))
    done = foundry("train", "config.yaml", "--dry-run", "--json", "run_dir=runs/never", cwd=home.folder)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert sorted(home.folder.rglob("*")) == before
    assert (plan["steps"], plan["batches_per_epoch"], plan["epochs"]) == (50, 1, 50.0)
    assert plan["data"]["train"]["kept"] == 8
    assert plan["trained_parameters"] == 14848
    assert plan["memory"]["total"] == sum(size for name, size in plan["memory"].items() if name != "total")
    assert plan["measured_peak_bytes"] > 1e8
    assert plan["tokens_per_second"] > 0
    monkeypatch.chdir(home.folder)
    text = foundry_here("train", home.config, "--dry-run")
    for word in ("rows", "tokens", "steps", "trained", "memory", "weights", "optimizer", "activations", "disk", "time"):
        assert word in text.stdout, text.stdout + text.stderr


def test_a_criterion_that_fails_is_the_exit_code_and_the_weights_are_kept(home: Home, tmp_path: Path) -> None:
    """Prevents a failed criterion that a script takes for success, or that throws the training away."""
    config = write_project(tmp_path, model=home.folder / "model", training__max_steps=3, criteria__loss_fall=0.99)
    done = foundry("train", config, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "failed"
    assert [check["passed"] for check in report["checks"]] == [False, True]
    assert "final" in checkpoint_names(tmp_path / "run")
    assert foundry_here("resume", tmp_path / "run").returncode == 1


def test_an_adapter_is_trained_on_and_a_full_model_is_a_model(home: Home, tmp_path: Path) -> None:
    """Prevents a second training that silently starts from the base model again."""
    config = write_project(tmp_path / "more", model=home.run, training__max_steps=2, training__learning_rate=1e-6)
    done = foundry_here("train", config)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "more" / "run" / "report.json").read_bytes())
    assert report["training"]["first_loss"] < 0.1
    answer = foundry_here("chat", tmp_path / "more" / "run", "prompt=Colour of the elm? ")
    assert answer.stdout == "green\n"
    refused = foundry_here("train", config, "lora.enabled=false", f"run_dir={tmp_path / 'full'}")
    assert_one_paragraph(refused, code=2, words=("lora.enabled", "adapter"))
    full = write_project(
        tmp_path / "full", model=home.folder / "model", lora__enabled=False, training__max_steps=40,
        training__learning_rate=0.01,
    )  # fmt: skip
    assert foundry_here("train", full).returncode == 0
    answer = foundry_here("chat", tmp_path / "full" / "run", "prompt=Colour of the elm? ")
    assert answer.stdout == "green\n"
    plain = foundry_here("chat", tmp_path / "full/run/checkpoints/final/model", "prompt=Colour of the elm? ",
                         "model.template=chatml")  # fmt: skip
    assert plain.stdout == "green\n"


def test_environment_and_overrides_reach_the_run(home: Home, tmp_path: Path) -> None:
    """Prevents a setting that is accepted and not used."""
    config = write_project(tmp_path, model=home.folder / "model", training__max_steps=3)
    env = environment(TRAINING_LEARNING_RATE="5e-5", FOUNDRY_SEED="7")
    done = foundry("train", config, "training.max_steps=2", env=env)
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["training"]["learning_rate"], stored["seed"], stored["training"]["max_steps"]) == (5e-5, 7, 2)
    resumed = foundry("resume", tmp_path / "run", env=environment(TRAINING_LEARNING_RATE="1"))
    assert resumed.returncode == 0, "the environment of a resume does not change the run"


def test_a_run_names_the_rows_that_it_left_out(home: Home, tmp_path: Path) -> None:
    """Prevents rows that vanish without a word."""
    config = write_project(tmp_path, model=home.folder / "model", training__max_steps=2, data__max_length=40)
    write_colours(tmp_path / "train.jsonl")
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows + rows.splitlines()[0].replace("Colour", "Colour" * 20) + "\n")
    done = foundry_here("train", config, "data.max_length=64")
    assert done.returncode == 0, done.stderr
    assert "1 rows left out: longer than 64 tokens" in done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert report["data"]["train"]["dropped"] == 1
    assert "train.jsonl:9" in report["data"]["train"]["first_dropped"][0]


def test_evaluate_asks_as_the_run_asked(home: Home, tmp_path: Path) -> None:
    """Prevents another score than the report's, because the system message or the answer's length was another."""
    questions = write_questions(tmp_path / "questions.jsonl")
    config = write_project(
        tmp_path, model=home.folder / "model", training__max_steps=2, evaluation__file=str(questions),
        evaluation__system="Be brief.", evaluation__max_new_tokens=7,
    )  # fmt: skip
    assert foundry_here("train", config).returncode == 0
    report = json.loads((tmp_path / "run" / "report.json").read_bytes())
    result = json.loads(foundry_here("evaluate", tmp_path / "run", "--json").stdout)
    answers = [row["answers"][0]["text"] for row in result["suites"]["questions"]["after"]["rows"]]
    assert answers == [case["after"] for case in report["evaluation"]["cases"]]
    longer = json.loads(foundry_here("evaluate", tmp_path / "run", "--json", "evaluation.max_new_tokens=20").stdout)
    rows = longer["suites"]["questions"]["after"]["rows"]
    assert all(len(row["answers"][0]["text"]) > 7 for row in rows)


@pytest.mark.parametrize("name, content", [("run.json", "{"), ("run.json", "{}"), ("config.yaml", "a: [b"),
                                           ("config.yaml", ""), ("report.json", "{}")])  # fmt: skip
def test_a_run_whose_records_are_damaged_is_an_error_in_words(
    name: str, content: str, home: Home, tmp_path: Path
) -> None:
    """Prevents a traceback where a file of a run was edited or cut."""
    config = write_project(tmp_path, model=home.folder / "model", training__max_steps=2)
    assert foundry_here("train", config).returncode == 0
    (tmp_path / "run" / name).write_text(content)
    commands = [("resume",), ("report",)] if name == "report.json" else [("resume",), ("verify", "run"), ("chat",)]
    for command in commands:
        options = ("prompt=x",) if command == ("chat",) else ()
        done = foundry_here(*command, tmp_path / "run", *options)
        if done.returncode:
            assert_one_paragraph(done, code=2)
        assert "Traceback" not in done.stderr
    assert foundry_here("runs", tmp_path).returncode == 0


def test_an_unfinished_run_named_relative_to_its_folder_resumes_from_another(home: Home, tmp_path: Path) -> None:
    """Prevents a resume that reads other files of the same names, or none."""
    run = tmp_path / "copy"
    shutil.copytree(home.run, run)
    shutil.rmtree(run / "checkpoints" / "final")
    (run / "report.json").unlink()
    done = foundry("resume", run.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going to {home.folder}" in done.stderr
    assert all(check.passed for check in compare_runs(home.run, run))
