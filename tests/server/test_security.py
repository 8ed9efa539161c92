"""Keys, rates and addresses: who is let in, and what those who are not get to hear."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from model_foundry.server.security import add_key
from tests.serving import Served, serving
from tests.tiny_runs import assert_one_paragraph, foundry_here

ASK = {"prompt": "Name a colour.", "max_tokens": 2}
ENVIRONMENT_KEY = "a-long-enough-key-of-my-own"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {
        "alice": add_key(path, "alice", rate=None, burst=None, admin=False),
        "slow": add_key(path, "slow", rate=6, burst=2, admin=False),
        "root": add_key(path, "root", rate=None, burst=None, admin=True),
    }
    return {"file": str(path), **made}


@pytest.fixture(scope="module")
def guarded(tiny: Path, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    shelf = tmp_path_factory.mktemp("shelf")
    (shelf / "second").symlink_to(tiny / "final" / "adapter")  # a link is not on offer
    (shelf / "third").mkdir()
    for path in (tiny / "final" / "adapter").iterdir():
        (shelf / "third" / path.name).write_bytes(path.read_bytes())
    (shelf / "broken").mkdir()
    with serving(
        tiny / "final" / "adapter",
        served_name="tuned",
        environ={"FOUNDRY_API_KEY": ENVIRONMENT_KEY},
        access__keys_file=keys["file"],
        access__adapter_folder=shelf,
        access__cors_origins="[https://app.example]",
    ) as each:
        yield each


def test_the_file_holds_no_key(keys: dict[str, str]) -> None:
    text = Path(keys["file"]).read_text()
    assert keys["alice"] not in text
    assert keys["alice"].removeprefix("mf-") not in text
    assert Path(keys["file"]).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer mf-wrong-key-that-nobody-has", "invalid_api_key"),
        ("Bearer", "malformed_api_key"),
        ("Basic YWxpY2U6eA==", "malformed_api_key"),
        ("mf-naked", "malformed_api_key"),
        ("Bearer " + "x" * 5000, "malformed_api_key"),
        ("Bearer \xe9\xff", "invalid_api_key"),
    ],
)
def test_no_wrong_and_malformed_keys_are_401(guarded: Served, header: str | None, code: str) -> None:
    headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
    with guarded.client() as client:
        for path in ("/generate", "/v1/chat/completions", "/adapters"):
            answer = client.post(path, json=ASK, headers=headers)
            assert answer.status_code == 401, answer.text
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/stats", headers=headers).status_code == 401
        assert client.get("/metrics", headers=headers).status_code == 401
        error = client.get("/v1/models", headers=headers).json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", code)
        assert client.get("/health", headers=headers).status_code == 200


def test_two_authorization_headers_are_not_guessed_between(guarded: Served, keys: dict[str, str]) -> None:
    headers = [("Authorization", f"Bearer {keys['alice']}"), ("Authorization", "Bearer other")]
    with guarded.client() as client:
        assert client.post("/generate", json=ASK, headers=headers).status_code == 401


def test_keys_of_the_file_and_of_the_environment_are_let_in(guarded: Served, keys: dict[str, str]) -> None:
    for key in (keys["alice"], keys["root"], ENVIRONMENT_KEY):
        assert guarded.post("/generate", ASK, key=key).status_code == 200


def test_a_key_over_its_rate_gets_429_and_others_do_not(guarded: Served, keys: dict[str, str]) -> None:
    codes = [guarded.post("/generate", ASK, key=keys["slow"]).status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    limited = guarded.get("/v1/models", key=keys["slow"])
    assert limited.status_code == 429
    assert 1 <= int(limited.headers["retry-after"]) <= 10
    assert guarded.post("/generate", ASK, key=keys["alice"]).status_code == 200
    with (
        pytest.raises(openai.RateLimitError),
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=keys["slow"], max_retries=0) as client,
    ):
        client.models.list()


def test_nobody_can_tell_what_another_key_has_asked(guarded: Served, keys: dict[str, str]) -> None:
    """vLLM CVE-2025-46570: a prompt that another client had sent was answered sooner, and counted as cached."""
    secret = {"prompt": "The merger of A and B will be announced on Monday. " * 12, "max_tokens": 1}

    def cached(name: str) -> int:
        usage = guarded.post("/generate", secret, key=keys[name]).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert (cached("alice"), cached("root")) == (0, 0)
    assert cached("alice") > 64, "one's own is found"


def test_adapters_come_and_go_by_an_admins_word(guarded: Served, keys: dict[str, str]) -> None:
    root = keys["root"]
    assert guarded.post("/adapters", {"name": "third"}, key=keys["alice"]).status_code == 403
    assert guarded.get("/adapters", key=root).json() == {"served": ["tuned"], "available": ["broken", "third"]}
    assert guarded.post("/adapters", {"name": "mine", "folder": "third"}, key=root).status_code == 201
    answers = [guarded.post("/generate", ASK | {"model": name}, key=root).json() for name in ("mine", "tuned")]
    assert answers[0]["text"] == answers[1]["text"], "the same weights under another name"
    assert answers[0]["model"] == "mine"
    assert guarded.post("/adapters", {"name": "mine", "folder": "third"}, key=root).status_code == 409
    assert guarded.post("/adapters", {"name": "other", "folder": "broken"}, key=root).status_code == 422
    with guarded.client(root) as client:
        assert client.delete("/adapters/mine").status_code == 200
        assert client.delete("/adapters/mine").status_code == 404
        assert client.delete("/adapters/tuned").status_code == 409
    assert guarded.post("/generate", ASK | {"model": "mine"}, key=root).status_code == 404


@pytest.mark.parametrize(
    "folder", ["../final/adapter", "..", ".", "/etc", "third/", "third/../third", "second", "", "a\x00b", "%2e%2e", "~"]
)
def test_no_path_from_the_network_reaches_the_file_system(guarded: Served, keys: dict[str, str], folder: str) -> None:
    answer = guarded.post("/adapters", {"name": "evil", "folder": folder}, key=keys["root"])
    assert answer.status_code in (404, 422)
    assert "evil" not in guarded.get("/adapters", key=keys["root"]).json()["served"]
    named = guarded.post("/adapters", {"name": folder}, key=keys["root"])
    assert named.status_code in (404, 422)


def test_only_named_origins_may_ask_from_a_browser(guarded: Served, served: Served, keys: dict[str, str]) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    with guarded.client() as client:
        allowed = client.options("/generate", headers=asked)
        other = client.options("/generate", headers=asked | {"Origin": "https://evil.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in other.headers
    with served.client() as client:  # where none is named
        answer = client.post("/generate", json=ASK, headers={"Origin": "https://app.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_name_that_points_here_is_not_enough(served: Served) -> None:
    """DNS rebinding: a web page on evil.example, whose name has been made to mean 127.0.0.1, asks."""
    with served.client() as client:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example:1", ""):
            assert client.post("/generate", json=ASK, headers={"Host": host}).status_code in (400, 403), host
        for host in ("localhost", f"127.0.0.1:{served.port}", "[::1]:80"):
            assert client.post("/generate", json=ASK, headers={"Host": host}).status_code == 200, host


def test_logs_hold_neither_prompts_nor_keys(
    guarded: Served, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "my-private-question"

    def access_lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "model_foundry.server.access"]

    with caplog.at_level("DEBUG", logger="model_foundry"):
        guarded.post("/generate", {"prompt": secret, "max_tokens": 2}, key=keys["alice"])
        guarded.post("/generate", {"prompt": secret, "max_tokens": -2}, key=keys["alice"])
        guarded.get(f"/{secret}?key={secret}", key="mf-" + secret)
        deadline = time.monotonic() + 10
        while len(access_lines()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # a line is written after its answer has gone
    lines = access_lines()
    assert len(lines) == 3
    assert [json.loads(line)["client"] for line in lines[:2]] == ["key alice"] * 2
    assert [json.loads(line)["status"] for line in lines] == [200, 422, 401]
    everything = "\n".join(record.getMessage() for record in caplog.records)
    assert secret not in everything
    assert keys["alice"] not in everything


def test_pages_say_that_nothing_else_may_run_in_them(guarded: Served) -> None:
    headers = guarded.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "server" not in headers


def test_a_public_address_without_a_key_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOUNDRY_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        done = foundry_here("serve", tiny / "base", f"host={host}")
        assert_one_paragraph(done, code=2, words=(host, "without a key", "foundry serve keys add"))


def test_a_short_key_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_API_KEY", "short")
    assert_one_paragraph(foundry_here("serve", tiny / "base"), code=2, words=("FOUNDRY_API_KEY", "16"))


def test_keys_are_added_listed_and_removed(tmp_path: Path) -> None:
    file = f"--file={tmp_path / 'k' / 'keys.json'}"
    added = foundry_here("serve", "keys", "add", "bob", "--requests-per-minute", "30", file)
    assert added.returncode == 0
    assert added.stdout.startswith("mf-")
    assert len(added.stdout.strip()) > 40
    listed = foundry_here("serve", "keys", "list", file)
    assert "bob" in listed.stdout
    assert "30 a minute" in listed.stdout
    assert added.stdout.strip() not in listed.stdout
    assert_one_paragraph(foundry_here("serve", "keys", "add", "bob", file), code=2, words=("bob", "already"))
    assert_one_paragraph(foundry_here("serve", "keys", "add", "../x", file), code=2, words=("../x",))
    assert foundry_here("serve", "keys", "remove", "bob", file).returncode == 0
    assert_one_paragraph(foundry_here("serve", "keys", "remove", "bob", file), code=2, words=("bob",))


def test_a_damaged_file_of_keys_is_told(tiny: Path, tmp_path: Path) -> None:
    for text in (
        "",
        "{",
        "[]",
        '{"format": 9, "keys": {}}',
        '{"format": 1, "keys": {"a": {"sha256": "x", "created": ""}}}',
    ):
        path = tmp_path / "keys.json"
        path.write_text(text)
        done = foundry_here("serve", tiny / "base", f"access.keys_file={path}")
        assert_one_paragraph(done, code=2, words=(str(path),))
