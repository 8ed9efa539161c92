"""The evaluation page: whole, escaped, and its filter works in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_foundry.evals.page import render_evaluation
from model_foundry.evals.suite import load_suite
from model_foundry.recipes.suites import assess
from tests.chromium import BINARY, Browser
from tests.unit.evals.scripted_target import ScriptedTarget
from tests.unit.evals.test_kinds import ask
from tests.unit.evals.test_suite import write

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Eight questions: two got better, four got worse, one of them into a text that is markup, two stay."""
    rows = [{"prompt": f"{n} {EVIL if n == 3 else ''}", "answer": "yes"} for n in range(8)]
    suite = load_suite(str(write(tmp_path, rows, metrics=["exact", "f1"], guard={"exact": 0.0}, about=EVIL)))
    before = ScriptedTarget(lambda prompt, *_: "no" if prompt[0] in "01" else "yes")
    after = ScriptedTarget(lambda prompt, *_: EVIL if prompt[0] == "3" else "" if prompt[0] in "456" else "yes")
    results = [{suite.name: ask(suite, each)} for each in (before, after)]
    found = assess([suite], before=results[0], after=results[1], bounds={})
    return json.loads(json.dumps({"model": EVIL, "against": "base", **found.as_dict()}))


def test_nothing_from_outside_is_markup(values: dict[str, Any]) -> None:
    page = render_evaluation(values)
    assert "<img" not in page
    assert page.count("<script>") == 1
    assert "http" not in page.replace("http-equiv", "")


def test_a_page_of_one_model_alone(values: dict[str, Any]) -> None:
    for suite in values["suites"].values():
        suite |= {"before": None, "changes": {}, "row_changes": {}}
    page = render_evaluation(values | {"against": None})
    assert "95 % interval" in page
    assert "<select>" not in page


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    each = Browser(tmp_path / "profile")
    yield each
    each.close()


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="no Chromium here; Debian's: apt-get install chromium")
def test_rows_are_filtered_by_which_way_they_changed(values: dict[str, Any], tmp_path: Path, browser: Browser) -> None:
    """Prevents a script that its own content security policy blocks, and a filter that hides the wrong rows."""
    (tmp_path / "page.html").write_text(render_evaluation(values))
    browser.open((tmp_path / "page.html").as_uri())
    shown = "[...document.querySelectorAll('.row')].filter(row => !row.hidden).length"
    assert browser.run(shown) == 8
    for way, number in (("better", 2), ("worse", 4), ("same", 2), ("all", 8)):
        browser.run(f"document.querySelector('button[value={way}]').click()")
        assert browser.run(shown) == number
    browser.run("let box = document.querySelector('input'); box.value = 'OWNED'; box.dispatchEvent(new Event('input'))")
    assert browser.run(shown) == 1
    assert browser.run("document.title").startswith("NOT JUDGED" if values["ship"] is None else values["verdict"])
    assert not browser.problems
    assert len(browser.requests) <= 1
