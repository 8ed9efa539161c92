"""`foundry runs` shows what there is, running and broken runs included, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model_foundry.checkpoint.store import FINAL
from model_foundry.cli.runs import command, find_runs, size_text
from model_foundry.errors import RunError, UsageError
from model_foundry.evals.suite import Suite, load_suite
from model_foundry.recipes.suites import assess, write_assessment
from model_foundry.run.directory import RunDirectory
from tests.unit.evals.scripted_target import ScriptedTarget
from tests.unit.evals.test_kinds import ask
from tests.unit.evals.test_suite import write
from tests.unit.evals.test_verdict import suite_of


def make_run(folder: Path, *, steps: int = 2, learning_rate: float = 1e-3, finished: bool = True) -> Path:
    config = f"run_dir: {folder}\ntraining:\n  learning_rate: {learning_rate}\n"
    with RunDirectory.create(folder, config_yaml=config, digest=str(learning_rate), receipt={}) as run:
        run.record(total_steps=steps)
        with run.open_metrics() as metrics:
            for step in range(1, steps + 1):
                metrics.append({"kind": "step", "step": step, "loss": 1.0 / step, "clock": {"seconds": 3.25}})
            metrics.append({"kind": "validation", "step": steps, "loss": 0.75})
        if finished:
            run.checkpoints.save(FINAL, steps, lambda path: (path / "weights").touch())
            run.record_outcome("finished")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_table_shows_state_step_loss_and_checks(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "a" / "report.json").write_text(json.dumps({"checks": [{"passed": True}, {"passed": False}]}))
    make_run(tmp_path / "group" / "b", steps=4, finished=False)
    heading, *lines = run(tmp_path).output.splitlines()
    assert heading.split() == ["run", "state", "step", "loss", "checks", "size", "started"]
    assert [line.split()[1:5] for line in sorted(lines)] == [
        ["finished", "2/2", "0.5", "1/2"],
        ["interrupted", "4/4", "0.25", "–"],
    ]


def test_json_holds_the_same(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    for arguments in ((tmp_path, "--json"), ("--json", tmp_path), ("list", tmp_path, "--json")):
        (row,) = json.loads(run(*arguments).output)["runs"]
        assert (row["state"], row["step"], row["loss"], row["error"]) == ("finished", 2, 0.5, None)


def test_a_broken_run_is_a_row_and_not_the_end_of_the_list(tmp_path: Path) -> None:
    """Prevents one bad folder from hiding all other runs."""
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad")
    (tmp_path / "bad" / "metrics.jsonl").write_text("not json\n")
    make_run(tmp_path / "worse")
    (tmp_path / "worse" / "report.json").write_text("[]")
    output = run(tmp_path).output
    assert "good" in output
    assert "unreadable: " in output
    assert "metrics.jsonl:1" in output
    assert sum(row["error"] is not None for row in json.loads(run(tmp_path, "--json").output)["runs"]) == 2


def test_looking_changes_nothing_even_while_a_run_is_running(tmp_path: Path) -> None:
    make_run(tmp_path / "a", finished=False)
    with RunDirectory.open(tmp_path / "a"):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert " running " in run(tmp_path).output
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_runs_and_no_folder_are_two_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path).output == f"no runs in {tmp_path}\n"
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    assert run().output == "no runs in runs\n"


def test_runs_are_found_three_deep_and_not_inside_runs(tmp_path: Path) -> None:
    for place in ("a", "b/c", "b/d/e", "b/d/f/too-deep", ".hidden/g"):
        make_run(tmp_path / place, steps=1)
    make_run(tmp_path / "a" / "inner", steps=1)
    assert {path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)} == {"a", "b/c", "b/d/e"}
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]


def test_comparison_names_the_keys_and_the_final_numbers(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=4, learning_rate=2e-3)
    output = run("compare", a, b).output
    assert "training.learning_rate: 0.001 → 0.002" in output
    assert "run_dir" not in output
    assert [line.split() for line in output.splitlines() if line.startswith(("loss", "step"))] == [
        ["step", "2", "4"],
        ["loss", "0.5", "0.25"],
    ]
    facts = json.loads(run("compare", a, b, "--json").output)
    assert facts["runs"][1]["ended"] == {"step": 4, "loss": 0.25, "seconds": 3.25, "validation_loss": 0.75}
    assert "configuration of b: the same" in run("compare", a, a).output
    with pytest.raises(RunError, match="holds no run"):
        run("compare", a, tmp_path)


def evaluated(run_dir: Path, suite: Suite, num_right: int, *, part: str = "", name: str = "evaluation") -> Path:
    target = ScriptedTarget(lambda prompt, *_: "yes" if int(prompt[:2]) < num_right else "no")
    target.name = str(run_dir / part)
    result = ask(suite, target)
    facts, found = {"model": target.name, "against": None}, assess([suite], after={suite.name: result}, before={},
                                                                   bounds={})  # fmt: skip
    write_assessment(run_dir / "evaluation", facts, found, name=name)
    return run_dir


def test_three_runs_beside_each_other_with_their_suites(tmp_path: Path) -> None:
    """Prevents comparing means alone: the rows are the same, so a difference is paired, and for sure or unclear."""
    suite = suite_of(tmp_path, 24)
    runs = [evaluated(make_run(tmp_path / name), suite, right) for name, right in (("a", 6), ("b", 7), ("c", 20))]
    page = tmp_path / "page.html"
    output = run("compare", *runs, "--html", page).output
    line = next(line for line in output.splitlines() if line.startswith("mine.exact"))
    assert line.split()[1:] == ["25.0", "%", "29.2", "%", "unclear", "83.3", "%", "better"]
    assert page.read_text().count("<svg") >= 2
    metrics = json.loads(run("compare", *runs, "--json").output)["metrics"]
    assert metrics[0]["against_first"][0] is None
    assert metrics[0]["against_first"][2]["interval"][0] > 0.2


def test_results_of_other_rows_are_shown_and_not_compared(tmp_path: Path) -> None:
    """Prevents 80 % of easy questions from looking better than 60 % of hard ones."""
    a = evaluated(make_run(tmp_path / "a"), suite_of(tmp_path, 10), 5)
    b = evaluated(make_run(tmp_path / "b"), suite_of(tmp_path, 12), 12)
    c = make_run(tmp_path / "c")
    line = next(line for line in run("compare", a, b, c).output.splitlines() if line.startswith("mine.exact"))
    assert line.split()[1:] == ["50.0", "%", "100.0", "%", "(other", "rows", "or", "decoding)", "–"]
    with pytest.raises(UsageError, match="one run alone"):
        run("compare", a)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (60_100_000, "60.1 MB"), (3 * 10**12, "3.0 TB")]
)
def test_sizes_by_example(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_runs_are_held_against_the_first_that_has_the_suite(tmp_path: Path) -> None:
    """Where the first run lacked a suite, results of 10 and of 12 rows stood side by side without a word."""
    a = make_run(tmp_path / "a")
    b = evaluated(make_run(tmp_path / "b"), suite_of(tmp_path, 10), 5)
    c = evaluated(make_run(tmp_path / "c"), suite_of(tmp_path, 12), 12)
    d = evaluated(make_run(tmp_path / "d"), suite_of(tmp_path, 10), 10)
    line = next(line for line in run("compare", a, b, c, d).output.splitlines() if line.startswith("mine.exact"))
    assert line.split()[1:] == ["–", "50.0", "%", "100.0", "%", "(other", "rows", "or", "decoding)", "100.0", "%",
                                "better"]  # fmt: skip


def test_more_metrics_of_the_same_rows_are_the_same_rows(tmp_path: Path) -> None:
    """One metric more in a suite made all of it incomparable."""
    rows = [{"prompt": f"{n:02d}?", "answer": "yes"} for n in range(10)]
    a = evaluated(make_run(tmp_path / "a"), load_suite(str(write(tmp_path, rows, metrics=["exact"]))), 5)
    b = evaluated(make_run(tmp_path / "b"), load_suite(str(write(tmp_path, rows, metrics=["exact", "f1"]))), 5)
    lines = [line.split() for line in run("compare", a, b).output.splitlines() if line.startswith("mine.")]
    assert lines == [["mine.exact", "50.0", "%", "50.0", "%", "same"], ["mine.f1", "–", "50.0", "%"]]


def test_a_checkpoint_s_result_is_not_the_run_s(tmp_path: Path) -> None:
    """What step 10 answered was shown as what the run answers, since it was asked last."""
    suite = suite_of(tmp_path, 10)
    a = evaluated(make_run(tmp_path / "a"), suite, 8)
    (a / "checkpoints" / "step-10").mkdir()
    evaluated(a, suite, 1, part="checkpoints/step-10", name="mine")
    b = evaluated(make_run(tmp_path / "b"), suite, 8)
    line = next(line for line in run("compare", a, b).output.splitlines() if line.startswith("mine.exact"))
    assert line.split()[1:] == ["80.0", "%", "80.0", "%", "same"]
