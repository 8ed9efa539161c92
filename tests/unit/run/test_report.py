"""The report: complete without a network, honest about what is missing, and deaf to whatever people's texts hold."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from model_foundry.cli.report import command
from model_foundry.errors import RunError
from model_foundry.run.report import Report, read_report, write_page, write_report
from model_foundry.run.summary import summary_text
from model_foundry.types import Check

HOSTILE = "</title></style></table><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;\x00\x1b[31m\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def case(prompt: str, expected: str, before: str, after: str, change: str = "improved") -> dict[str, Any]:
    scores = [
        {"exact": float(text == expected), "f1": float(text == expected), "contains": 0.0} for text in (before, after)
    ]
    return {
        "prompt": prompt, "expected": expected, "before": before, "after": after,
        "before_scores": scores[0], "after_scores": scores[1], "change": change, "source": "heldout.jsonl:1",
    }  # fmt: skip


def example(**changes: Any) -> Report:
    cases = [
        case(f"What is fact {index}?", f"Answer {index}.", "I do not know that island.", f"Answer {index}.")
        for index in range(30)
    ]
    cases[3] = case("Which bell?", "Old Winifred.", "A bell.", "Old Winifred bell.", "worse")
    cases[4] = case("Which day?", "On Tuesdays.", "It sails daily.", "On Mondays.", "same")
    values: dict[str, Any] = {
        "run_id": "demo-20260101-120000",
        "checks": (
            Check("loss_fall", True, 0.9712, "> 50 %", "Training loss 3.1 → 0.09, each the mean of 20 steps."),
            Check("answers_improved", True, 0.93, "> 30 %, and beyond the noise floor of 12 %", "28 of 30 did."),
            Check("artefacts_load", True, "3 of 3", "all", "Loaded: adapter, state, tokenizer."),
        ),
        "training": {"model": "smollm2-135m-instruct", "method": "sft", "steps": 200, "first_loss": 3.1,
                     "last_loss": 0.09, "seconds": 125.2, "tokens_per_second": 631.0, "tokens": 78_284},
        "evaluation": {
            "metric": "f1", "num_cases": 30, "verdict": "improved",
            "before": {"exact": 0.0, "f1": 0.041, "contains": 0.0},
            "after": {"exact": 0.93, "f1": 0.951, "contains": 0.93}, "improved": 0.93, "same": 0.035, "worse": 0.035,
            "interval": [0.83, 1.0], "noise": {"worse": 0.03, "shuffled": 0.12}, "noise_floor": 0.12, "cases": cases,
        },
        "data": {"train": {"file": "examples/demo/train.jsonl", "rows": 397, "kept": 395, "dropped": 2,
                           "reasons": {"longer than 128 tokens": 2}, "tokens": 19_571, "trained_tokens": 2_574}},
        "memory": {"parts": {"weights": 270 << 20, "gradients": 19 << 20, "optimizer": 38 << 20,
                             "activations": 420 << 20},
                   "predicted_bytes": 747 << 20, "measured_bytes": 801 << 20, "lora_bytes": 801 << 20,
                   "full_bytes": 2100 << 20},
        "reproduce": {"commands": ["foundry train examples/demo/demo.yaml", "foundry verify run runs/demo"],
                      "config_digest": "9f" * 32, "seed": 1871},
        "machine": {"cpu": "Imaginary 9000", "cores": 2, "memory_bytes": 24 << 30, "torch": "2.13.0"},
        "notes": ("The run was resumed once, from step 50.",),
    }  # fmt: skip
    return Report(**(values | changes))


def records(num_steps: int = 200) -> list[dict[str, Any]]:
    steps = [
        {"kind": "step", "step": step, "epoch": step / 50,
         "loss": 3.2 * math.exp(-step / 30) + 0.02 * (step % 7) + 0.01,
         "learning_rate": 1e-3 * min(step / 5, 0.5 * (1 + math.cos(math.pi * step / num_steps))),
         "grad_norm": 4 * math.exp(-step / 40) + 0.05, "tokens": 400, "skipped": False, "clock": {"seconds": 0.6}}
        for step in range(1, num_steps + 1)
    ]  # fmt: skip
    validation = [
        {"kind": "validation", "step": step, "loss": 3 * math.exp(-step / 35) + 0.2} for step in range(0, 201, 50)
    ]
    return steps + validation


def write_run(folder: Path, report: Report | None = None, metrics: list[dict[str, Any]] | None = None) -> Path:
    """A run's folder as far as the report reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    lines = [json.dumps(record) + "\n" for record in (records() if metrics is None else metrics)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return write_report(folder, example() if report is None else report)


class Page(HTMLParser):
    """Reads a page the way a browser would: which elements there are, their attributes, their text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """A report that needs a network shows nothing on a train, and tells a stranger who reads it."""
    html = write_run(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.stack, "unclosed elements"
    assert not page.names & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_the_page_shows_what_the_run_measured(tmp_path: Path) -> None:
    text = Page(write_run(tmp_path).read_text(encoding="utf-8")).text
    for shown in (
        "Passed", "3 of 3 checks passed", "demo-20260101-120000", "0 % → 93 %", "2 min 05 s", "801 MiB",
        "97.1 %", "> 50 %", "Training loss 3.1 → 0.09", "Old Winifred bell.", "On Mondays.", "longer than 128 tokens",
        "19,571", "off by -7 %", "foundry verify run runs/demo", "Imaginary 9000", "24.0 GiB", "resumed once",
        "28 improved, 1 same, 1 worse", "Noise floor", "1871",
    ):  # fmt: skip
        assert shown in text, shown


def test_every_chart_is_well_formed_and_described(tmp_path: Path) -> None:
    """A chart that is broken XML, holds NaN or has no words for it shows nothing to some readers."""
    html = write_run(tmp_path).read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 20
        assert root.find("title") is not None
        assert "nan" not in chart.lower()
        numbers = [float(number) for number in re.findall(r'(?:x1|x2|cx)="([^"]+)"', chart)]
        assert all(0 <= number <= 520 for number in numbers)


def test_people_s_texts_cannot_become_markup(tmp_path: Path) -> None:
    """A model's answer, a file name, a check's evidence may hold any text; none of it may run or break out."""
    hostile = example(
        run_id=HOSTILE,
        checks=(Check(HOSTILE, False, HOSTILE, HOSTILE, HOSTILE),),
        training={HOSTILE: HOSTILE, "list": [HOSTILE], "model": HOSTILE},
        evaluation={
            "cases": [case(HOSTILE, HOSTILE, HOSTILE, HOSTILE)], "before": {HOSTILE: 0.0}, "after": {HOSTILE: 1.0},
            "improved": 1.0, "interval": [0.0, 1.0], "noise": {HOSTILE: 0.0}, "noise_floor": 0.0, "verdict": HOSTILE,
        },
        data={HOSTILE: {HOSTILE: {HOSTILE: 1}}},
        memory={"parts": {HOSTILE: 5}, "measured_bytes": 7, HOSTILE: HOSTILE},
        reproduce={"commands": [HOSTILE], HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )  # fmt: skip
    html = write_run(tmp_path, hostile).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.stack
    assert not page.names & {"script", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "\x00" not in html
    assert "\x1b" not in html
    assert page.text.count("<script>alert(1)</script>") > 10


def test_the_page_can_be_written_again_from_the_files_alone(tmp_path: Path) -> None:
    """Otherwise a report could not be refreshed after the process that measured has gone."""
    page = write_run(tmp_path)
    first = page.read_bytes()
    page.unlink()
    assert write_page(tmp_path).read_bytes() == first
    assert read_report(tmp_path) == example()


def test_report_json_has_the_promised_shape(tmp_path: Path) -> None:
    write_run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"run_id", "checks", "verdict", "training", "evaluation", "data", "memory"} <= report.keys()
    assert report["verdict"] == "passed"
    assert set(report["checks"][0]) == {"name", "passed", "value", "bound", "evidence"}
    assert {"before", "after", "cases"} <= report["evaluation"].keys()


def test_one_failed_check_fails_the_run() -> None:
    failed = Check("loss_fall", False, 0.01, "> 5 %", "It did not fall.")
    assert example(checks=(*example().checks, failed)).verdict == "failed"
    assert example(checks=()).verdict == "unchecked"


def test_an_empty_run_still_gets_a_page(tmp_path: Path) -> None:
    """A run without evaluation, memory or a single step must not end in an error after hours of work."""
    html = write_run(tmp_path, Report("bare"), metrics=[]).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.stack
    assert "Not checked" in page.text
    assert "Before and after" not in page.text


@pytest.mark.parametrize(
    "losses",
    [[2.0], [2.0, 2.0], [0.0, 0.0, 0.0], [None, None], [None, 1.0, None], [1e-9, 1e9], [-1.0, 1.0], [5.0] * 5000],
    ids=["one", "constant", "zero", "none finite", "one finite", "decades", "negative", "long"],
)
def test_odd_curves_are_drawn(losses: list[float | None], tmp_path: Path) -> None:
    """One step, a constant, nothing finite, eighteen decades: charts divided by zero or took the logarithm of it."""
    metrics = [
        {"kind": "step", "step": step, "loss": loss, "learning_rate": 0.0, "grad_norm": None, "skipped": loss is None}
        for step, loss in enumerate(losses, start=1)
    ]
    html = write_run(tmp_path, metrics=metrics).read_text(encoding="utf-8")
    assert not Page(html).stack
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)).lower()
    assert len(html) < 200_000


def test_a_spike_survives_the_thinning_of_a_long_curve(tmp_path: Path) -> None:
    """Showing every n-th of 10,000 steps would hide the one that broke the run."""
    metrics = [{"kind": "step", "step": step, "loss": 10.0 if step == 4321 else 1.0} for step in range(1, 10_001)]
    html = write_run(tmp_path, metrics=metrics).read_text(encoding="utf-8")
    chart = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)[0]
    heights = [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]+)"', chart)[0].split()]
    assert max(heights) - min(heights) > 150
    assert len(html) < 200_000


def test_numbers_that_json_lacks_are_missing_not_wrong(tmp_path: Path) -> None:
    report = example(
        checks=(Check("loss_fall", False, math.nan, "> 5 %", "diverged"),), training={"last_loss": math.inf}
    )
    text = Page(write_run(tmp_path, report).read_text(encoding="utf-8")).text
    assert json.loads((tmp_path / "report.json").read_text())["checks"][0]["value"] is None
    assert "nan" not in text.lower().replace("nanosecond", "")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"run_id": 1}', '{"run_id": "x", "checks": 5}', '{"run_id": "x", "checks": [{}]}', "\x00"],
)
def test_a_broken_report_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(RunError, match=r"report\.json"):
        read_report(tmp_path)


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not JSON"):
        write_report(tmp_path, example(training={"model": object()}))
    assert not list(tmp_path.iterdir())


def test_the_summary_says_why_a_check_failed() -> None:
    failed = Check("answers_improved", False, 0.1, "> 30 %", "3 of 30 held-out answers score higher.")
    text = summary_text(example(checks=(*example().checks, failed)), run_dir=Path("runs/demo"))
    assert "failed" in text.splitlines()[0]
    assert "3 of 30 held-out answers score higher." in text
    assert "runs/demo/report.html" in text
    assert "28 improved, 1 same, 1 worse" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_command_prints_and_rewrites(tmp_path: Path) -> None:
    page = write_run(tmp_path)
    page.unlink()
    result = CliRunner().invoke(command, [str(tmp_path)], standalone_mode=False)
    assert result.exception is None
    assert result.return_value == 0
    assert "loss fall" in result.output
    assert str(page) in result.output
    assert page.exists()
    as_json = CliRunner().invoke(command, [str(tmp_path), "--json"], standalone_mode=False)
    assert json.loads(as_json.output)["run_id"] == "demo-20260101-120000"


def test_the_command_ends_with_1_when_a_check_failed(tmp_path: Path) -> None:
    write_run(tmp_path, example(checks=(Check("loss_fall", False, 0.01, "> 5 %", "It did not fall."),)))
    assert CliRunner().invoke(command, [str(tmp_path)], standalone_mode=False).return_value == 1


@pytest.mark.parametrize("started", [False, True])
def test_a_folder_without_a_report_is_said_in_one_line(started: bool, tmp_path: Path) -> None:
    if started:
        (tmp_path / "run.json").write_text("{}")
    result = CliRunner().invoke(command, [str(tmp_path)], standalone_mode=False)
    assert isinstance(result.exception, RunError)
    assert ("foundry resume" if started else "foundry runs") in str(result.exception)


def test_preference_runs_show_their_rewards(tmp_path: Path) -> None:
    """Prevents rewards that are recorded and never seen, and token losses' unit on a pair's loss."""
    steps = [
        {
            "kind": "step", "step": step, "loss": 0.7 - step / 40, "learning_rate": 1e-5, "grad_norm": 1.0,
            "rewards/chosen": step / 10, "rewards/rejected": -step / 10, "rewards/margins": step / 5,
            "rewards/accuracies": min(1.0, step / 8), "logps/chosen": -20.0, "logps/rejected": -30.0 - step,
        }
        for step in range(1, 21)
    ]  # fmt: skip
    held_out = {key: value for key, value in steps[-1].items() if "/" in key}
    lines = [*steps, {"kind": "validation", "step": 20, "loss": 0.3, **held_out}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(tmp_path, example(training={"method": "dpo", "first_loss": 0.69, "last_loss": 0.2}))
    page = (tmp_path / "report.html").read_text()
    for title in ("Rewards", "Reward margin", "Pairs with the better answer ahead", "Answers"):
        assert f"<title>{title}</title>" in page
    assert "better answer, held out" in page
    assert "loss of a pair" in page
    assert "nats a token" not in page
