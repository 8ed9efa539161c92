"""Our renderer and transformers' `apply_chat_template` give the same ids, prompts and assistant masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message

pytestmark = pytest.mark.slow  # importing transformers takes seconds

PIECES = ["Hello", "  two spaces", "trailing  ", "\n\n", "\n", "a <", "> b", "<b>", "émoji 🎉", "数学", "\t{'a': 1}"]
PIECES += ["1234567", " ", "don't", "\u200b", "e\u0301", "\u2581", "\r\n", "x" * 40, ""]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
CONVERSATIONS = st.tuples(st.one_of(st.none(), TEXTS), st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
TOOLS = """
{%- if tools %}{{- '<|im_start|>tools\\n' }}{% for tool in tools %}{{- tool | tojson(indent=2) + '\\n' }}{% endfor %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set ns.count = ns.count + 1 %}
        {{- '<|im_start|>assistant ' ~ ns.count ~ '\\n' }}
        {%- generation %}
        {{- message.content | trim }}
        {%- for call in message.tool_calls or [] %}{{- '\\n' + call.function | tojson }}{% endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>%s\\n' % message.role + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' ~ (ns.count + 1) ~ '\\n' }}{% endif %}
"""


def messages_of(conversation: tuple[str | None, list[tuple[str, str]]]) -> list[Message]:
    system, turns = conversation
    messages = [] if system is None else [Message("system", system)]
    for asked, answered in turns:
        messages += [Message("user", asked), Message("assistant", answered)]
    return messages


def peer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def assert_same(renderer: Renderer, theirs: Any, messages: list[Message], **options: Any) -> None:
    dicts = [message.as_dict() for message in messages]
    options |= {"chat_template": renderer.template_text, "tokenizer_adds_bos": renderer.tokenizer.adds_bos}
    ids = theirs.apply_chat_template(dicts, tokenize=True, return_dict=False, **options)
    assert renderer.render(messages).tokens.tolist() == ids
    prompt = theirs.apply_chat_template(
        dicts[:-1], tokenize=True, return_dict=False, add_generation_prompt=True, **options
    )
    assert renderer.prompt(messages[:-1]).tolist() == prompt


@pytest.fixture(scope="session")
def chatml_peer(chatml_folder: Path) -> Any:
    return peer(chatml_folder)


@pytest.fixture(scope="session")
def sentencepiece_peer(sentencepiece_folder: Path) -> Any:
    return peer(sentencepiece_folder)


@pytest.mark.parametrize("template", ["auto", "chatml", "llama3", "alpaca"])
def test_ids_and_prompts_are_the_same(chatml_folder: Path, chatml_peer: Any, template: str) -> None:
    renderer = Renderer(Tokenizer.load(chatml_folder), template)

    @given(conversation=CONVERSATIONS)
    @settings(max_examples=40, deadline=None)
    def check(conversation: tuple[str | None, list[tuple[str, str]]]) -> None:
        assert_same(renderer, chatml_peer, messages_of(conversation))

    check()


def test_ids_and_prompts_are_the_same_with_sentencepiece(sentencepiece_folder: Path, sentencepiece_peer: Any) -> None:
    renderer = Renderer(Tokenizer.load(sentencepiece_folder))

    @given(conversation=CONVERSATIONS)
    @settings(max_examples=40, deadline=None)
    def check(conversation: tuple[str | None, list[tuple[str, str]]]) -> None:
        assert_same(renderer, sentencepiece_peer, messages_of(conversation))

    check()


def test_tools_calls_and_assistant_masks_are_the_same(chatml_folder: Path, chatml_peer: Any, tmp_path: Path) -> None:
    """`{% generation %}` blocks train what transformers' assistant mask marks."""
    path = tmp_path / "tools.jinja"
    path.write_text(TOOLS, encoding="utf-8")
    renderer = Renderer(Tokenizer.load(chatml_folder), str(path))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <b>"}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "é", "parameters": {}}}]
    messages = [
        Message("user", "How is it?"),
        Message("assistant", " Let me see. ", {"tool_calls": [call]}),
        Message("tool", "rain", {"name": "weather"}),
        Message("assistant", "It rains.", {"reasoning_content": None}),
    ]
    theirs = chatml_peer.apply_chat_template(
        [message.as_dict() for message in messages],
        tools=tools,
        chat_template=TOOLS,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = renderer.render(messages, tools=tools)
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.weights.tolist() == theirs["assistant_masks"]


def test_plain_encoding_is_the_same(chatml_folder: Path, chatml_peer: Any) -> None:
    tokenizer = Tokenizer.load(chatml_folder)
    text = "Some text, naïve 数学 🎉\n\n  indented"
    assert tokenizer.encode(text) == chatml_peer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == chatml_peer.decode(chatml_peer.encode(text))
