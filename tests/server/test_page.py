"""The page at / in a real browser: asked as a person asks, by keyboard, and looked at for what it loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chromium import BINARY, Browser
from tests.serving import Served, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Chromium here; Debian's: apt-get install chromium"),
]
KEY = "a-long-enough-key-of-my-own"
PROMPT = "Name a colour."


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    each = Browser(tmp_path / "profile")
    yield each
    each.close()


def texts(browser: Browser, kind: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('.talk .{kind}')].map((node) => node.textContent)")


def ask(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('prompt').focus()")
    browser.type(text)
    browser.press_enter()
    browser.wait_for("document.getElementById('send').disabled")
    browser.wait_for("!document.getElementById('send').disabled")


def test_base_and_tuned_answer_side_by_side(served: Served, browser: Browser) -> None:
    browser.open(served.url)
    browser.wait_for("document.querySelectorAll('select.model')[1].options.length === 2")
    assert browser.run("[...document.querySelectorAll('select.model')].map((node) => node.value)") == ["base", "tuned"]
    browser.run("document.getElementById('max').value = 12")
    ask(browser, PROMPT)
    expected = [
        served.post("/generate", {"prompt": PROMPT, "max_tokens": 12, "model": name}).json()["text"]
        for name in ("base", "tuned")
    ]
    assert texts(browser, "assistant") == expected
    assert texts(browser, "user") == [PROMPT, PROMPT]
    rates = browser.run("[...document.querySelectorAll('.rate')].map((node) => node.textContent)")
    assert all("tokens/s" in rate for rate in rates)
    ask(browser, "And another?")
    assert len(texts(browser, "assistant")) == 4, "the talk goes on"
    assert browser.problems == []
    assert all(url.startswith((served.url, "data:", "about:")) for url in browser.requests), browser.requests


def test_what_a_model_or_a_person_writes_stays_text(served: Served, browser: Browser) -> None:
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    browser.open(served.url)
    browser.wait_for("document.querySelectorAll('select.model')[1].options.length === 2")
    browser.run("document.getElementById('max').value = 4")
    ask(browser, attack)
    assert texts(browser, "user")[0] == attack
    assert browser.run("document.title") == "Model Foundry"
    assert browser.run("document.querySelectorAll('.talk img, .talk script').length") == 0


def test_stop_ends_an_answer_and_frees_its_place(endless: Path, browser: Browser) -> None:
    with serving(endless) as each:
        browser.open(each.url)
        browser.wait_for("document.querySelector('select.model').options.length === 1")
        assert browser.run("document.querySelectorAll('.column')[1].hidden"), "one model, one column"
        browser.run("document.getElementById('max').value = 1500; document.getElementById('prompt').value = 'Go on'")
        browser.run("document.getElementById('ask').requestSubmit()")
        browser.wait_for("document.querySelector('.talk .assistant')?.textContent.length > 5")
        browser.run("document.getElementById('stop').click()")
        browser.wait_for("!document.getElementById('send').disabled")
        assert texts(browser, "note") == ["stopped"]
        each.wait_until_idle(seconds=10)


def test_a_key_is_asked_for_and_used(tiny: Path, browser: Browser) -> None:
    with serving(tiny / "base", environ={"FOUNDRY_API_KEY": KEY}) as each:
        browser.open(each.url)
        browser.wait_for("document.getElementById('state').textContent.includes('wants a key')")
        browser.run(f"document.getElementById('key').value = '{KEY}'")
        browser.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        browser.wait_for("document.getElementById('state').textContent.startsWith('base')")
        browser.run("document.getElementById('max').value = 4")
        ask(browser, PROMPT)
        assert len(texts(browser, "assistant")) == 1
        assert texts(browser, "error") == []


def test_an_error_is_shown_where_the_answer_would_be(served: Served, browser: Browser) -> None:
    browser.open(served.url)
    browser.wait_for("document.querySelectorAll('select.model')[1].options.length === 2")
    browser.run("document.getElementById('max').value = 999999")
    ask(browser, PROMPT)
    assert all("max_tokens" in text for text in texts(browser, "error"))
    assert len(texts(browser, "error")) == 2


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_is_wider_than_the_window(served: Served, browser: Browser, width: int) -> None:
    browser.resize(width, 720)
    for path in ("/", "/docs"):
        browser.open(served.url + path)
        browser.wait_for("document.body.innerText.length > 40")
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), path
        assert browser.run("document.documentElement.scrollHeight <= window.innerHeight + 1") or path == "/docs"


def test_the_description_lists_every_route(served: Served, browser: Browser) -> None:
    browser.open(served.url + "/docs")
    browser.wait_for("document.body.innerText.includes('POST /v1/chat/completions')")
    assert "max_tokens" in browser.run("document.body.innerText")
    assert browser.problems == []
