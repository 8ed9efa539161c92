"""The tiers' own rules: what trained nothing fails, what is missing is named and the rest goes on, the flags decide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tiers.__main__ import TIERS, main
from tests.tiers.real_model import ENABLE, MODEL, model_name
from tests.tiers.record import StepFailed, Tier, ToolMissing

TARGETS = ("workflow", "real-model", "mlx", "ollama", "quick", "all")


def raising(error: Exception) -> None:
    raise error


def test_a_tier_that_trained_nothing_fails(tmp_path: Path) -> None:
    """Every step left out for a missing tool, and green: that is how nobody notices that nothing works."""
    tier = Tier("x", tmp_path, 1)
    tier.step("llama.cpp", lambda: raising(ToolMissing("not here")))
    assert tier.failures == ["nothing was trained"]
    tier.num_runs += 1
    assert tier.failures == []
    assert tier.as_dict()["missing"] == ["llama.cpp: not here"]


def test_a_failed_step_does_not_hide_the_next_and_fails_the_tier(tmp_path: Path) -> None:
    tier = Tier("x", tmp_path, 1, num_runs=1)
    assert tier.step("one", lambda: raising(StepFailed("no"))) is None
    assert tier.step("two", lambda: raising(KeyError("surprise"))) is None
    assert tier.step("three", lambda: 3) == 3
    assert [step.status for step in tier.steps] == ["failed", "failed", "passed"]
    assert tier.failures == ["one: no", "two: KeyError: 'surprise'"]


def test_a_criterion_that_was_not_measured_has_failed(tmp_path: Path) -> None:
    tier = Tier("x", tmp_path, 1, num_runs=1)
    made = {"name": "loss_fall", "passed": True, "value": 0.5, "bound": "> 5 %"}
    (tmp_path / "report.json").write_text(json.dumps({"checks": [made]}))
    tier.take_checks(tmp_path, required=("loss_fall", "memory_saving"))
    assert tier.failures == ["memory_saving is not measured, not measured"]


def test_a_real_model_is_not_touched_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ENABLE, raising=False)
    assert main(["real-model", "--out", str(tmp_path)]) == 1
    assert f"{ENABLE}=1" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"]
    assert "nothing was trained" in report["tiers"][0]["failures"]


def test_the_environment_chooses_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FT_TEST_MODEL", "FT_E2E_MODEL_ID"):
        monkeypatch.delenv(name, raising=False)
    assert model_name("FT_TEST_MODEL", "FT_E2E_MODEL_ID") == MODEL
    monkeypatch.setenv("FT_E2E_MODEL_ID", "theirs")
    assert model_name("FT_TEST_MODEL", "FT_E2E_MODEL_ID") == "theirs"
    monkeypatch.setenv("FT_TEST_MODEL", "mine")
    assert model_name("FT_TEST_MODEL", "FT_E2E_MODEL_ID") == "mine"


@pytest.mark.slow
def test_the_report_names_the_model_of_each_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tier 2 takes FT_TEST_MODEL first and tier 3 FT_E2E_MODEL_ID, and the report named one for both."""
    monkeypatch.setenv("FT_TEST_MODEL", "no-such-a")
    monkeypatch.setenv("FT_E2E_MODEL_ID", "no-such-b")
    monkeypatch.setenv(ENABLE, "1")
    assert main(["real-model", "mlx", "--short", "--out", str(tmp_path)]) == 1
    tiers = json.loads((tmp_path / "report.json").read_text())["tiers"]
    assert [tier["model"] for tier in tiers] == ["no-such-a", "no-such-b"]


def test_every_target_runs_tiers_that_there_are() -> None:
    """A renamed tier would leave a target that fails before it begins."""
    text = (Path(__file__).parents[2] / "Makefile").read_text()
    recipes = dict(re.findall(r"^test-e2e-([a-z-]+):.*\n\t@(.*)$", text, flags=re.MULTILINE))
    assert set(recipes) == set(TARGETS)
    for name, recipe in recipes.items():
        tiers = [word for word in recipe.split("$(TIERS)")[1].split() if word != "$(ARGS)"]
        assert tiers
        assert set(tiers) <= set(TIERS)
        assert (f"{ENABLE}=1" in recipe) == (name in ("quick", "all"))


@pytest.mark.slow
def test_tier_one_passes(tmp_path: Path) -> None:
    assert main(["workflow", "--out", str(tmp_path)]) == 0
    tier = json.loads((tmp_path / "report.json").read_text())["tiers"][0]
    assert tier["training_runs"] == 1
    assert not tier["missing"]
    assert len(tier["checks"]) == 5
