"""What an evaluation is called, which criteria it takes, and what it must not overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_foundry.config.load import load_config
from model_foundry.config.schema import EvaluateConfig, TrainConfig
from model_foundry.errors import ConfigError
from model_foundry.evals.suite import load_suite
from model_foundry.recipes.before_after import suites_of
from model_foundry.recipes.evaluation import MAX_NAME_CHARS, _criteria, _folder, _name
from model_foundry.recipes.suites import keep_result, kept_result, load_suites
from tests.unit.evals.scripted_target import ScriptedTarget
from tests.unit.evals.test_kinds import ask
from tests.unit.evals.test_suite import ROW, write


def config_of(*overrides: object) -> EvaluateConfig:
    return load_config(EvaluateConfig, path=None, overrides=[str(each) for each in overrides]).config


def run_at(folder: Path, **config: object) -> Path:
    (folder / "checkpoints" / "step-10" / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": config}))
    return folder


def test_each_target_and_each_opponent_has_a_page_of_its_own(tmp_path: Path) -> None:
    """An evaluation of step 10 took the place of the run's, and one against another model that against its base."""
    run = run_at(tmp_path / "a")
    targets = (run, run / "checkpoints" / "step-10", run / "checkpoints" / "step-10" / "adapter")
    opponents = ("base", "none", "runs/b", "runs-c", "模型甲", "模型乙")
    pages = {_folder(config) / _name(config, ["mine"])
             for target in targets for opponent in opponents
             if (config := config_of(f"model.name={target}", f"against={opponent}"))}  # fmt: skip
    assert len(pages) == len(targets) * len(opponents)
    assert run / "evaluation" / "mine" in pages
    assert {page.parent for page in pages if page.parent.parent == run} == {run / "evaluation"}


def test_a_password_in_an_address_is_in_no_name() -> None:
    config = config_of("model.name=https://me:sk-secret@host/v1", "against=https://me:sk-secret@other/v1#m")
    assert "secret" not in str(_folder(config) / _name(config, ["mine"]))


def test_names_of_training_s_own_files_are_not_taken(tmp_path: Path) -> None:
    """A suite in before.yaml would have overwritten the answers that training compares with."""
    config = config_of(f"model.name={run_at(tmp_path / 'a')}")
    names = [_name(config, [name]) for name in ("before", "after", "again", "evaluation", "before-general")]
    assert all(name.startswith("suite-") for name in names)
    many = [f"suite{number}" for number in range(30)]
    assert _name(config, many) != _name(config, many[:-1])
    assert len(_name(config, many)) <= MAX_NAME_CHARS


def test_a_run_is_held_to_its_own_criteria(tmp_path: Path) -> None:
    """`foundry evaluate RUN` asked what the run was asked, and forgot what was demanded of it."""
    run = run_at(tmp_path / "a", criteria={"metrics": {"general.accuracy": "> 60 %", "questions.f1": "> 10 %"}})
    suites = (load_suite("general"),)
    assert _criteria(config_of(f"model.name={run}"), suites) == {"general.accuracy": "> 60 %"}
    given = config_of(f"model.name={run}", "criteria.metrics={general.margin: '> 1'}")
    assert _criteria(given, suites) == {"general.margin": "> 1"}
    assert _criteria(config_of(f"model.name={run_at(tmp_path / 'b')}"), suites) == {}


def questions_of(folder: Path) -> Path:
    (folder / "q.jsonl").write_text(json.dumps(ROW) + "\n")
    return folder / "q.jsonl"


def test_criteria_on_the_questions_hold_in_training(tmp_path: Path) -> None:
    """The run measures them, and a bound on them was refused: no suite that is asked measures questions.f1."""
    overrides = [f"evaluation.file={questions_of(tmp_path)}", "evaluation.suites=[]"]
    bounded = [*overrides, "criteria.metrics={questions.f1: '> 10 %'}"]
    suites, bounds = suites_of(load_config(TrainConfig, path=None, overrides=bounded).config)
    assert suites == ()
    assert bounds["questions"]["f1"].number == 0.1
    with pytest.raises(ConfigError, match=r"no suite that is asked measures questions\.f1"):
        suites_of(load_config(TrainConfig, path=None, overrides=bounded[1:]).config)


def test_a_suite_called_questions_does_not_replace_the_questions(tmp_path: Path) -> None:
    """Both are kept by their name, so the held-out questions were gone."""
    path = write(tmp_path, [ROW]).rename(tmp_path / "questions.yaml")
    assert load_suites([str(path)], max_rows=None)[0].name == "questions"
    with pytest.raises(ConfigError, match="a suite is called questions"):
        load_suites([str(path)], max_rows=None, with_questions=True)
    overrides = [f"evaluation.file={questions_of(tmp_path)}", f"evaluation.suites=[{path}]"]
    with pytest.raises(ConfigError, match="a suite is called questions"):
        suites_of(load_config(TrainConfig, path=None, overrides=overrides).config)


def test_a_kept_result_without_a_metric_is_asked_again(tmp_path: Path) -> None:
    """One digest for other metrics of the same rows: an interrupted run would have gone on with what it lacks."""
    suite = load_suite(str(write(tmp_path, [ROW])))
    keep_result(tmp_path / "kept.json", ask(suite, ScriptedTarget()))
    assert kept_result(tmp_path / "kept.json", suite) is not None
    more = load_suite(str(write(tmp_path, [ROW], metrics=["f1", "exact"])))
    assert more.digest == suite.digest
    assert kept_result(tmp_path / "kept.json", more) is None
