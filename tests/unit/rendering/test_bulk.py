"""The fast way gives what the renderer gives; templates that look into contents are never taken for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from model_foundry.errors import DataError, FoundryError, TemplateError
from model_foundry.rendering import Rendered, Renderer
from model_foundry.rendering.bulk import BulkRenderer, EncodedRow, token_dtype
from model_foundry.rendering.opaque import prove_opaque
from model_foundry.rendering.skeleton import build_skeleton
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message
from tests.conftest import CHATML

pytestmark = pytest.mark.slow

TrainOn = Literal["assistant", "last_assistant", "all"]
PIECES = ["Hello", "  two spaces", "trailing  ", "\n\n", "\n", "a <", "> b", "<|im_end|>", "<|im_", "émoji 🎉", "数学"]
PIECES += ["\t{'a': 1}", "1234567", " ", "don't", "\u200b", "\u3000", "\x0b", "\r\n", "x" * 80, "", "</s>", "[INST]"]
PIECES += ["\U000f0000", "\u2003", "<think>", "</think>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
CONVERSATIONS = st.tuples(st.none() | TEXTS, st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.role + ':' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
)
REWRITING = (  # as Qwen3: an earlier turn is not written as the last one
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}"
)
TRIMMED = CHATML.replace("message['content']", "(message['content'] | trim)").replace(
    "'\n' }}{% endfor", "'\n' }}{% endfor"
)


def packed(row: Rendered, renderer: Renderer) -> EncodedRow:
    edges = np.flatnonzero(np.diff(row.weights, prepend=0.0, append=0.0)).tolist()
    spans = tuple(zip(edges[::2], edges[1::2], strict=True))
    ids = row.tokens.astype(token_dtype(renderer.tokenizer)).tobytes()
    return EncodedRow(ids, len(row.tokens), spans, row.escaped)


def messages_of(conversation: tuple[str | None, list[tuple[str, str]]]) -> list[Message]:
    system, turns = conversation
    messages = [] if system is None else [Message("system", system)]
    for asked, answered in turns:
        messages += [Message("user", asked), Message("assistant", answered)]
    return messages


def template_file(folder: Path, text: str) -> str:
    path = folder / "custom.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


TEMPLATES = {
    "model": "auto", "chatml": "chatml", "llama3": "llama3", "alpaca": "alpaca",
    "generation": GENERATION, "rewriting": REWRITING, "no end": NO_END, "trimmed": TRIMMED,
}  # fmt: skip


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_those_of_the_renderer(chatml_folder: Path, tmp_path: Path, name: str, train_on: TrainOn) -> None:
    """Packed shards must train exactly what the slow way trains, control tokens in people's text included."""
    given_template = TEMPLATES[name]
    template = template_file(tmp_path, given_template) if "{%" in given_template else given_template
    renderer = Renderer(Tokenizer.load(chatml_folder), template)
    bulk = BulkRenderer(renderer, train_on=train_on)

    @given(conversation=CONVERSATIONS)
    @settings(max_examples=15, deadline=None)
    def check(conversation: tuple[str | None, list[tuple[str, str]]]) -> None:
        messages = messages_of(conversation)
        expected = packed(renderer.render(messages, train_on=train_on), renderer)
        assert bulk.render(messages) == expected
        assert bulk.render_all([(messages, None), (messages[:1], None), (messages, None)])[::2] == [expected] * 2

    check()


@pytest.mark.parametrize("trims", [True, False])
def test_offsets_that_leave_spaces_out_train_the_same(chatml_folder: Path, tmp_path: Path, trims: bool) -> None:
    """RoBERTa's way: a token's space is not part of it, and white space alone lies nowhere."""
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    backend.save(str(folder / "tokenizer.json"))
    text = CHATML.replace("'<|im_end|>' + '\n'", "' <|im_end|> '")
    renderer = Renderer(Tokenizer.load(folder), template_file(tmp_path, text))
    bulk = BulkRenderer(renderer)

    @given(conversation=CONVERSATIONS)
    @settings(max_examples=40, deadline=None)
    def check(conversation: tuple[str | None, list[tuple[str, str]]]) -> None:
        messages = messages_of(conversation)
        expected = packed(renderer.render(messages), renderer)
        assert bulk.render(messages) == expected
        assert bulk.render_all([(messages, None)]) == [expected]

    check()


def test_what_is_wrong_with_a_row_stands_in_its_place(chatml_folder: Path, tmp_path: Path) -> None:
    """One bad row in a block must not take the others with it."""
    text = CHATML.replace("{% for", "{{ raise_exception('no tools') if messages[0].role == 'tool' }}{% for", 1)
    bulk = BulkRenderer(Renderer(Tokenizer.load(chatml_folder), template_file(tmp_path, text)))
    good = [Message("user", "x"), Message("assistant", "y")]
    found = bulk.render_all([(good, None), ([Message("tool", "x"), *good], None), (good, None)])
    assert found[0] == found[2] == bulk.render(good)
    assert isinstance(found[1], TemplateError)
    assert "no tools" in found[1].what
    texts = bulk.text_all(["one", "half \ud800", "naïve", "one"])
    assert isinstance(texts[1], DataError)
    assert [texts[0], texts[2]] == [bulk.text("one"), bulk.text("naïve")]
    assert bulk.text_all([]) == bulk.render_all([]) == []


def test_more_control_tokens_than_there_are_marks_go_one_by_one(chatml_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    tokens = [f"<|role{number}|>" for number in range(30)]
    backend.add_special_tokens(tokens)
    backend.save(str(folder / "tokenizer.json"))
    text = "".join(tokens) + "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}"
    renderer = Renderer(Tokenizer.load(folder), template_file(tmp_path, text))
    bulk = BulkRenderer(renderer, train_on="all")
    row = [Message("user", "one two")]
    assert bulk.render_all([(row, None)]) == [packed(renderer.render(row, train_on="all"), renderer)]


def test_rows_are_those_of_the_renderer_with_sentencepiece(sentencepiece_folder: Path) -> None:
    """No cut is known for these tokenizers; the template is still run once for all rows."""
    renderer = Renderer(Tokenizer.load(sentencepiece_folder))
    bulk = BulkRenderer(renderer)

    @given(conversation=CONVERSATIONS)
    @settings(max_examples=15, deadline=None)
    def check(conversation: tuple[str | None, list[tuple[str, str]]]) -> None:
        messages = messages_of(conversation)
        assert bulk.render(messages) == packed(renderer.render(messages), renderer)

    check()


def test_texts_are_those_of_the_renderer(chatml_folder: Path, sentencepiece_folder: Path) -> None:
    renderers = [Renderer(Tokenizer.load(folder), "alpaca") for folder in (chatml_folder, sentencepiece_folder)]
    bulks = [BulkRenderer(renderer) for renderer in renderers]

    @given(text=TEXTS)
    @settings(max_examples=60, deadline=None)
    def check(text: str) -> None:
        for renderer, bulk in zip(renderers, bulks, strict=True):
            assert bulk.text_row(text) == packed(renderer.text_row(text), renderer)
            assert np.frombuffer(bulk.text(text), dtype=bulk.dtype).tolist() == renderer.tokenizer.encode(text)
            assert bulk.text_all([text, "", text])[::2] == [bulk.text(text)] * 2

    check()


def test_half_a_character_is_refused_as_by_the_tokenizer(chatml_folder: Path) -> None:
    bulk = BulkRenderer(Renderer(Tokenizer.load(chatml_folder)))
    with pytest.raises(DataError, match="character 5 of the text is half a character"):
        bulk.text_row("one \ud800 two")
    with pytest.raises(DataError, match="half a character"):
        bulk.render([Message("user", "one \ud800 two"), Message("assistant", "x")])


def test_fields_that_the_template_reads_and_tools_go_through_it(chatml_folder: Path, tmp_path: Path) -> None:
    """A skeleton knows roles and contents; a row with more must not lose it."""
    text = "{{ tools | length if tools }}{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    template = template_file(tmp_path, text)
    renderer = Renderer(Tokenizer.load(chatml_folder), template)
    bulk = BulkRenderer(renderer, train_on="all")
    for extra in ({}, {"name": "Ann"}, {"colour": "red"}, {"colour": "<|im_end|>"}, {"thinking": "so"}):
        row = [Message("user", "x", extra)]
        for tools in (None, [{"name": "f"}]):
            slow = renderer.render(row, train_on="all", tools=tools)
            assert bulk.render(row, tools=tools) == packed(slow, renderer), (extra, tools)


def test_a_template_that_refuses_a_row_refuses_it_here_too(chatml_folder: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ raise_exception('no tools') if m.role == 'tool' }}{{ m.content }}{% endfor %}"
    bulk = BulkRenderer(Renderer(Tokenizer.load(chatml_folder), template_file(tmp_path, text)), train_on="all")
    assert bulk.render([Message("user", "x")]).num_tokens
    with pytest.raises(TemplateError, match="no tools"):
        bulk.render([Message("tool", "x")])


def test_a_difference_between_the_two_ways_is_an_error(chatml_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern of a tokenizer to come may break the proof; then nothing must be trained."""
    renderer = Renderer(Tokenizer.load(chatml_folder))
    bulk = BulkRenderer(renderer)
    assert bulk._of_template is not None
    assert bulk._of_text is not None
    row = [Message("user", "one"), Message("assistant", "two three")]
    bulk.render(row)
    bulk._of_template._known["two"] = b"\1\0"
    bulk._of_text._known["two"] = b"\1\0"
    bulk._of_template._short.clear()
    with pytest.raises(FoundryError, match="two ways of encoding a conversation"):
        bulk.render(row)
    blocks = BulkRenderer(renderer)
    assert blocks._template_blocks is not None
    blocks.render_all([(row, None)])
    blocks._template_blocks._table._ids[:] = 1
    with pytest.raises(FoundryError, match="two ways of encoding a conversation"):
        blocks.render_all([(row, None)])
    with pytest.raises(FoundryError, match="two ways of encoding a text"):
        bulk.text("two three")


LOOKS_INSIDE = {
    "length": "{% for m in messages %}{{ m.content | length }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "a method": "{% for m in messages %}{{ m.content.strip() }}{% endfor %}",
    "a slice": "{% for m in messages %}{{ m['content'][:3] }}{% endfor %}",
    "truth": "{% for m in messages %}{% if m.content %}x{% endif %}{% endfor %}",
    "or": "{% for m in messages %}{{ m.content or 'nothing' }}{% endfor %}",
    "comparison": "{% for m in messages %}{{ 'x' if m.content == 'y' else 'z' }}{% endfor %}",
    "search": "{% for m in messages %}{% if '</think>' in m.content %}x{% endif %}{% endfor %}",
    "a variable": "{% set c = messages[0].content %}{{ c | trim }}",
    "a joined text": "{% for m in messages %}{{ (m.role + m.content) | trim }}{% endfor %}",
    "a filter's argument": "{% for m in messages %}{{ 'abc' | replace('a', m.content) }}{% endfor %}",
    "an argument": "{% macro w(x) %}{{ x | upper }}{% endmacro %}{% for m in messages %}{{ w(m.content) }}{% endfor %}",
    "a macro": "{% macro w() %}{{ messages[0].content }}{% endmacro %}{{ w() | upper }}",
    "the whole message": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "printed": "{{ messages }}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}",
    "fields": "{% for m in messages %}{% for k in m %}{{ m[k] | upper }}{% endfor %}{% endfor %}",
    "a copy": "{% for m in messages.copy() %}{{ m.content | upper }}{% endfor %}",
    "a copy by name": "{% for m in messages['copy']() %}{{ m.content | upper }}{% endfor %}",
    "number of fields": "{% for m in messages %}{{ m | length }}{% endfor %}",
    "an unknown field": "{% set key = 'content' %}{% for m in messages %}{{ m[key] | upper }}{% endfor %}",
    "a namespace": "{% set n = namespace() %}{% for m in messages %}{% set n.x = m.content %}{% endfor %}{{ n.x }}",
    "a namespace's start": "{% set ns = namespace(m=messages) %}{{ ns.m[0].content | upper }}",
    "a list": "{% for m in messages %}{% set l = [m.content] %}{{ l | join }}{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem.content | upper }}{% endfor %}",
    "the loop": "{% for m in messages %}{% set l = loop %}{{ l.previtem.content | upper }}{% endfor %}",
    "changed": "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "a loop over characters": "{% for m in messages %}{% for c in m.content %}{{ c }}-{% endfor %}{% endfor %}",
    "a selection": "{% for m in messages | selectattr('content') %}x{% endfor %}",
    "a block": "{% set x %}{{ messages[0].content }}{% endset %}{{ x | upper }}",
    "a filter block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "a later name": "{% for m in messages %}{{ c | upper }}{% set c = m.content %}{% endfor %}{% set d = c %}",
    "a set of both": "{% set x = messages %}{% set x = x[0].content %}{{ x }}",
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKS_INSIDE)
def test_a_template_that_looks_into_contents_is_not_taken_for_opaque(name: str) -> None:
    """Its output depends on what people write, so one rendering cannot serve all rows."""
    assert prove_opaque(LOOKS_INSIDE[name]) is None


OPAQUE = {
    "chatml": CHATML,
    "smollm2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ 'S<|im_end|>' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    ),
    "trim": "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
    "first system": (
        "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set rest = messages[1:] %}"
        "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ s }}"
        "{% for m in rest %}{{ m.content }}{% endfor %}"
    ),
    "alternation": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
        "{% endif %}{{ m.content ~ eos_token }}{% endfor %}"
    ),
    "asks for fields": (
        "{% for m in messages %}{% if 'tool_calls' in m and m.tool_calls is defined %}{{ m.tool_calls | tojson }}"
        "{% elif m.content is string and m.content is not none %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "generation": GENERATION,
    "last": "{{ (messages | last).content }}{{ messages[-1].role }}{{ messages | length }}",
    "neighbour": (
        "{% for m in messages %}{{ 'y' if loop.previtem and loop.previtem.role == 'x' }}{{ m.content }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_templates_as_people_have_them_are_proved(name: str) -> None:
    """A proof that never succeeds would be right and of no use."""
    assert prove_opaque(OPAQUE[name]) is not None


def test_roles_that_hide_their_turns_have_no_skeleton(chatml_folder: Path, tmp_path: Path) -> None:
    """Where a turn ends then depends on what it says, which only the renderer can see."""
    tokenizer = Tokenizer.load(chatml_folder)
    for text in (NO_END, REWRITING):
        renderer = Renderer(tokenizer, template_file(tmp_path, text))
        assert build_skeleton(renderer, ("user", "assistant", "user", "assistant"), train_on="assistant") is None
        assert build_skeleton(renderer, ("user", "assistant", "user", "assistant"), train_on="all") is not None
    assert build_skeleton(Renderer(tokenizer), ("user",) * 5000, train_on="all") is None


def test_a_content_written_many_times_is_left_to_the_renderer(chatml_folder: Path, tmp_path: Path) -> None:
    """The renderer bounds what a hostile template makes of one message; filling in would not."""
    renderer = Renderer(Tokenizer.load(chatml_folder), template_file(tmp_path, "{{ messages[0].content }}" * 5))
    assert build_skeleton(renderer, ("user",), train_on="all") is None
