"""The inspector's page: complete without a network, and deaf to whatever the rows hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.data.gate.judge import judge, make_subject
from model_foundry.data.gate.reading import read_attentively
from model_foundry.data.inspection import inspect_rows
from model_foundry.rendering import Renderer
from model_foundry.run.charts import Columns, column_chart
from model_foundry.run.inspection_page import render_inspection
from model_foundry.tokenizer import Tokenizer
from tests.unit.data.gate_sets import conversations, write_rows
from tests.unit.run.test_report import HOSTILE, Page


@pytest.fixture(scope="module")
def page(chatml_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    hostile = {
        "messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": f"🎉\t\r\n{HOSTILE}"}]
    }
    empty = {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": ""}], HOSTILE: HOSTILE}
    path = write_rows(tmp_path_factory.mktemp("page") / "rows.jsonl", [hostile, empty, *conversations(60), hostile])
    path.write_bytes(path.read_bytes() + b'{"half": ')
    subject = make_subject(read_attentively(path), Renderer(Tokenizer.load(chatml_folder)), max_length=512)
    return render_inspection(inspect_rows(subject, judge(subject), num_shown=40))


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    read = Page(page)
    assert not read.stack
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in read.tags)
    assert not [
        value for _, attributes in read.tags for name, value in attributes.items()
        if name in ("src", "href") or name.startswith("on") or "http" in (value or "")
    ]  # fmt: skip
    assert "default-src 'none'" in page


def test_rows_stand_on_the_page_as_text(page: str) -> None:
    read = Page(page)
    shown = read.text.replace("\u2423", "").replace("↵\n", "\n")
    assert "<script>alert(1)</script>" in shown
    assert "🎉" in shown
    assert "40 of 63 rows, spread evenly over the file" in shown
    kinds = [attributes["class"] for tag, attributes in read.tags if tag == "span" and "data-id" in attributes]
    assert {"t", "t y", "t s", "t y s"} == set(kinds)
    ids = {attributes["data-id"] for tag, attributes in read.tags if tag == "span" and "data-id" in attributes}
    assert all(value is not None and value.isdigit() for value in ids)


def test_the_page_says_what_failed_and_what_is_left_out(page: str) -> None:
    text = Page(page).text
    assert "Refused" in text
    assert "Cannot be read: 1 row" in text
    assert "rows.jsonl:64" in text
    assert "checks failed" in text


def test_a_histogram_counts_every_row_in_words_and_columns() -> None:
    chart = column_chart(
        (0, 10, 20, 30), [Columns("kept", (3, 0, 2)), Columns("lost", (0, 0, 1), "fail")],
        title="Rows <by> length", x_label="tokens", y_label="rows", marker=(20, "limit & more"),
    )  # fmt: skip
    assert chart.count("<rect") == 3
    assert "0 to 9 tokens, kept: 3" in chart
    assert "20 and more tokens, lost: 1" in chart
    assert "Rows &lt;by&gt; length" in chart
    assert "limit &amp; more" in chart
    nothing = column_chart((0, 1), [Columns("kept", (0,))], title="Rows", x_label="tokens", y_label="rows")
    assert "nothing was recorded" in nothing
