"""Special tokens from a template: found where they are written, and not guessed where they may be text."""

from __future__ import annotations

import pytest

from model_foundry.errors import DataError, TemplateError
from model_foundry.rendering.builtin_templates import read_template
from model_foundry.tokenizer.special import special_tokens
from tests.conftest import CHATML


def test_without_a_template_there_are_end_of_text_and_padding() -> None:
    special = special_tokens()
    assert special.tokens == ("<|endoftext|>", "<|pad|>")
    assert special.named == {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


def test_tokens_of_the_built_in_templates() -> None:
    assert special_tokens(CHATML).tokens[2:] == ("<|im_start|>", "<|im_end|>")
    llama = special_tokens(read_template("llama3").source)
    assert set(llama.tokens[2:]) == {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    assert llama.named["bos_token"] == "<|begin_of_text|>"
    assert special_tokens(read_template("alpaca").source, allow_plain=True).named["bos_token"] == "<|endoftext|>"


def test_comments_and_names_are_not_written() -> None:
    assert special_tokens("{# <|old|> #}{{ '<|new|>' ~ messages[0].content }}text <|data|>").tokens[2:] == (
        "<|data|>",
        "<|new|>",
    )


def test_tokens_put_together_are_found_where_they_were_printed() -> None:
    """`'<|' + role + '|>'` is in no string of the source: users could write such a token as text that is trained."""
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    assert special_tokens(template).tokens[2:] == ()
    assert special_tokens(template, printed=["<|user|>Question<|assistant|>"]).tokens[2:] == (
        "<|user|>",
        "<|assistant|>",
    )


@pytest.mark.parametrize("shape", ["[INST]", "</s>", "<start_of_turn>", "<<SYS>>", "<think>"])
def test_what_may_be_text_must_be_decided(shape: str) -> None:
    template = f"{{{{ '{shape}' + messages[0].content }}}}"
    with pytest.raises(TemplateError, match="one token or plain text") as caught:
        special_tokens(template)
    assert shape in caught.value.what
    assert shape in special_tokens(template, extra=[shape]).tokens
    plain = special_tokens(template, allow_plain=True)
    assert shape not in plain.tokens
    assert plain.plain == (shape,)


def test_generation_blocks_and_loop_controls_are_read() -> None:
    template = "{% for m in messages %}{%- generation -%}<|a|>{%- endgeneration %}{% break %}{% endfor %}"
    assert special_tokens(template).tokens[2:] == ("<|a|>",)


def test_roles_nobody_fills_are_refused() -> None:
    with pytest.raises(TemplateError, match="cls_token"):
        special_tokens("{{ cls_token }}")


def test_a_broken_template_is_named_by_its_line() -> None:
    with pytest.raises(TemplateError, match="line 2"):
        special_tokens("text\n{% if %}")


@pytest.mark.parametrize("token", ["", "a", " <|x|>", "<|x|>\n", "\U0010fffe\U0010ffffx"])
def test_tokens_that_would_cut_ordinary_text_are_refused(token: str) -> None:
    with pytest.raises(DataError, match="special token"):
        special_tokens(extra=[token])
