"""The real `openai` client against the server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving import Served

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
ASK: dict[str, Any] = {"model": "tuned", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none-needed", max_retries=0) as each:
        yield each


def test_models_are_listed_with_their_base(client: Any) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tuned", "base"}
    assert getattr(models["tuned"], "parent", None) == "base"
    assert client.models.retrieve("base").id == "base"


def test_a_chat_is_the_answer_of_generate(served: Served, client: Any) -> None:
    body = {"prompt": "Name a colour.", "system": "Be brief.", "max_tokens": 12}
    whole = client.chat.completions.create(**ASK)
    assert whole.choices[0].message.content == served.post("/generate", body).json()["text"]
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_streamed_chat_joins_to_the_whole_one_with_its_usage(client: Any) -> None:
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_answers_differ_and_come_back_with_their_seed(client: Any) -> None:
    hot = ASK | {"temperature": 2.0, "n": 3, "seed": 11}
    first = [choice.message.content for choice in client.chat.completions.create(**hot).choices]
    assert len(set(first)) == 3
    assert [choice.message.content for choice in client.chat.completions.create(**hot).choices] == first
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**hot, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == first
    # The first of several is the one that the seed gives alone.
    assert client.chat.completions.create(**hot | {"n": 1}).choices[0].message.content == first[0]


def test_logprobs_are_of_the_tokens_chosen(client: Any) -> None:
    choice = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content).startswith((choice.message.content or "")[:4])
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob), "greedy takes the likeliest"


def test_an_answer_ends_before_a_stop_string_that_spans_tokens(client: Any) -> None:
    long = ASK | {"max_tokens": 40}
    text = client.chat.completions.create(**long).choices[0].message.content or ""
    stop = text[8:13]
    cut = client.chat.completions.create(**long, stop=[stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    chunks = client.chat.completions.create(**long, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut.message.content


def test_completions_take_text_and_tokens(client: Any, served: Served) -> None:
    tokenizer = served.opened.catalog.default.renderer.tokenizer
    ids = tokenizer.encode("The fox jumps")
    ask: dict[str, Any] = {"model": "tuned", "max_tokens": 8, "temperature": 0}
    by_text = client.completions.create(prompt="The fox jumps", **ask)
    by_ids = client.completions.create(prompt=ids, **ask)
    both = client.completions.create(prompt=["The fox jumps", "naïve"], **ask, logprobs=2)
    assert by_text.choices[0].text == by_ids.choices[0].text == both.choices[0].text
    assert len(both.choices) == 2
    logprobs = both.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 8
    assert all(len(each) <= 2 for each in logprobs.top_logprobs or [])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"n": 900}, "n"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_not_done_is_refused_by_name(client: Any, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK | change)
    assert refused.value.param == param
    assert refused.value.code


def test_neutral_values_of_what_is_not_done_are_let_through(client: Any) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}}
    plain = client.chat.completions.create(**ASK).choices[0].message.content
    assert client.chat.completions.create(**ASK, **neutral, user="me").choices[0].message.content == plain


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ASK | {"model": "gpt-9"})
    assert missing.value.code == "model_not_found"
