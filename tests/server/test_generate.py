"""/generate and what tells how the server is: the answers, their usage, and every wrong request told apart."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import Served, serving

ASK = {"prompt": "Name three colours.", "max_tokens": 12}


def test_an_answer_names_its_model_and_counts_its_tokens(served: Served) -> None:
    answer = served.post("/generate", ASK).json()
    assert answer["text"]
    assert answer["model"] == "tuned"
    usage = answer["usage"]
    assert 0 < usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_health_has_status_time_and_version(served: Served) -> None:
    answer = served.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "healthy"
    assert answer.json()["timestamp"].endswith("+00:00")
    assert answer.json()["version"]
    assert served.get("/ready").status_code == 200


def test_stats_count_requests_and_metrics_say_the_same(served: Served) -> None:
    before = served.stats()
    served.post("/generate", ASK)
    after = served.stats()
    assert after["total_requests"] == before["total_requests"] + 1
    assert after["average_latency"] > 0
    assert after["requests_per_minute"] >= 1
    assert after["uptime"] > 0
    assert after["completion_tokens"] > before["completion_tokens"]
    text = served.get("/metrics").text
    assert 'foundry_requests_total{method="POST",route="/generate",status="200"}' in text
    assert 'foundry_tokens_total{kind="completion",model="tuned"}' in text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "x", "temperature": 2.1}, "temperature"),
        ({"prompt": "x", "temperature": True}, "temperature"),
        ({"prompt": "x", "top_p": 1.1}, "top_p"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "temprature": 1}, "temprature"),
        ({"prompt": "x", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "x" * 9000, "max_tokens": 5}, "prompt"),
    ],
)
def test_a_field_that_does_not_fit_is_named(served: Served, body: dict[str, Any], field: str) -> None:
    answer = served.post("/generate", body)
    assert answer.status_code == 422, answer.text
    assert field in [part for error in answer.json()["detail"] for part in error["loc"]]


def test_an_error_does_not_repeat_what_was_sent(served: Served) -> None:
    secret = "a-very-private-sentence"
    for path in ("/generate", "/v1/chat/completions"):
        answer = served.post(path, {"prompt": secret, "max_tokens": -1, "messages": secret, "model": 5})
        assert answer.status_code in (400, 422)
        assert secret not in answer.text


def test_another_content_type_and_broken_json_are_refused(served: Served) -> None:
    with served.client() as client:
        text = client.post("/generate", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
        form = client.post("/generate", data={"prompt": "x"})
        broken = client.post("/generate", content=b'{"prompt": ', headers={"Content-Type": "application/json"})
    assert (text.status_code, form.status_code, broken.status_code) == (422, 422, 422)


def test_an_unknown_model_and_route_are_404(served: Served) -> None:
    assert served.post("/generate", ASK | {"model": "gpt-9"}).status_code == 404
    assert served.get("/nothing").status_code == 404
    assert served.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert served.get("/generate").status_code == 405


def test_a_bad_request_leaves_the_next_one_alone(served: Served) -> None:
    expected = served.post("/generate", ASK).json()["text"]
    for body in ({}, {"prompt": ""}, ASK | {"temperature": 9}):
        assert served.post("/generate", body).status_code == 422
        assert served.post("/generate", ASK).json()["text"] == expected


def test_the_same_answer_alone_and_in_company(served: Served) -> None:
    alone = served.post("/generate", ASK).json()["text"]
    others = [{"prompt": f"Count to {number}", "max_tokens": 8, "temperature": 1.5} for number in range(12)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: served.post("/generate", body), [ASK, *others, ASK, ASK]))
    assert all(answer.status_code == 200 for answer in answers)
    assert [answers[place].json()["text"] for place in (0, -1, -2)] == [alone] * 3


def test_a_seed_repeats_and_no_seed_does_not(served: Served) -> None:
    body = ASK | {"temperature": 2.0, "max_tokens": 16}
    texts = [served.post("/generate", body | {"seed": -7}).json()["text"] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len({served.post("/generate", body).json()["text"] for _ in range(6)}) > 1


def test_the_stream_is_the_answer_in_pieces(served: Served) -> None:
    whole = served.post("/generate", ASK | {"max_tokens": 40}).json()
    with served.client() as client, client.stream("POST", "/generate/stream", json=ASK | {"max_tokens": 40}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert pieces[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len(pieces) > 5


def test_raw_continues_the_text_and_chat_asks_a_user_turn(served: Served) -> None:
    chat = served.post("/generate", ASK).json()["usage"]["prompt_tokens"]
    raw = served.post("/generate", ASK | {"raw": True}).json()["usage"]["prompt_tokens"]
    assert raw < chat
    assert served.post("/generate", ASK | {"raw": True, "system": "x"}).status_code == 422


def test_base_and_tuned_answer_differently(served: Served) -> None:
    texts = {name: served.post("/generate", ASK | {"model": name}).json()["text"] for name in ("tuned", "base")}
    assert texts["tuned"] != texts["base"]


def test_a_client_that_goes_away_frees_its_place(endless: Path) -> None:
    body = {"prompt": "Go on", "max_tokens": 1500}
    with serving(endless, batch__max_sequences=2) as each:
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout), each.client() as client:
                client.post("/generate", json=body, timeout=0.3)
            with each.client() as client, client.stream("POST", "/generate/stream", json=body) as answer:
                next(answer.iter_lines())
        each.wait_until_idle(seconds=10)
        assert each.stats()["completion_tokens"] < 1500, "it went on computing for nobody"
        assert each.post("/generate", ASK).status_code == 200


def test_an_answer_that_takes_too_long_is_a_504(endless: Path) -> None:
    body = {"prompt": "Go on", "max_tokens": 1500, "model": "base", "temperature": 0}
    with serving(endless, limits__request_seconds=0.5) as each:
        assert each.post("/generate", body).status_code == 504
        chat = {**body, "messages": [{"role": "user", "content": "Go on"}]}
        chat.pop("prompt")
        error = each.post("/v1/chat/completions", chat)
        assert (error.status_code, error.json()["error"]["code"]) == (504, "timeout")
        with (
            each.client() as client,
            client.stream("POST", "/v1/chat/completions", json=chat | {"stream": True}) as answer,
        ):
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        each.wait_until_idle(seconds=10)


def test_pages_and_description_are_there(served: Served) -> None:
    assert "<title>Model Foundry</title>" in served.get("/").text
    assert served.get("/docs").status_code == 200
    paths = served.get("/openapi.json").json()["paths"]
    assert {"/generate", "/generate/stream", "/v1/models", "/v1/chat/completions", "/v1/completions"} <= set(paths)
