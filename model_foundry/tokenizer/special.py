"""Which special tokens a new tokenizer needs: those its chat template writes, end of text, and padding.

Reads a template's source and what it printed; never runs it. Knows the shapes that control tokens have; does not know
vocabularies or how they are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jinja2
from jinja2 import nodes

from model_foundry.errors import DataError, TemplateError
from model_foundry.tokenizer.plain import RESERVED

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

# <|im_start|>, and DeepSeek's <｜User｜>. Nothing else is written so.
CONTROL_SHAPE = re.compile(r"<\|[^\s<>|]{1,64}\|>|<｜[^<>｜]{1,64}｜>")
# <s>, </think>, [INST], <<SYS>>: control tokens of some models, plain text in others.
_DOUBTFUL_SHAPE = re.compile(r"<{1,2}/?[A-Za-z][\w:-]{0,40}>{1,2}|\[/?[A-Z][A-Z_]{1,40}\]")
_BEGINNINGS = ("<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<｜begin▁of▁sentence｜>")
_ROLES_WE_FILL = {"bos_token", "eos_token", "pad_token"}
_OTHER_ROLES = {"unk_token", "sep_token", "cls_token", "mask_token"}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens of a new tokenizer.

    Attributes:
        tokens: in the order of their ids, which are the first.
        named: roles: eos_token, pad_token, and bos_token where the template asks for one.
        plain: what the template writes that looks like a control token and is to be plain text.
    """

    tokens: tuple[str, ...] = (END_OF_TEXT, PADDING)
    named: Mapping[str, str] = field(default_factory=lambda: {"eos_token": END_OF_TEXT, "pad_token": PADDING})
    plain: tuple[str, ...] = ()


def special_tokens(
    template: str | None = None, *, printed: Iterable[str] = (), extra: Sequence[str] = (), allow_plain: bool = False
) -> SpecialTokens:
    """The tokens for a template.

    Args:
        template: its Jinja source, or None for a tokenizer without one.
        printed: what the template wrote of sample conversations: tokens it puts together (`'<|' + role + '|>'`).
        extra: more tokens, by hand.
        allow_plain: what has the look of `<s>` or `[INST]` and is not among `extra` is plain text.

    Raises:
        TemplateError: the source is not valid Jinja, asks for a role nobody fills, or writes what may or may not be a
            control token. DataError: an extra token cannot be one.
    """
    for token in extra:
        _check(token)
    written, roles = ([], set()) if template is None else _written(template)
    found = [token for text in [*written, *printed] for token in CONTROL_SHAPE.findall(text)]
    tokens = tuple(dict.fromkeys([END_OF_TEXT, PADDING, *found, *extra]))
    doubtful = dict.fromkeys(shape for text in written for shape in _DOUBTFUL_SHAPE.findall(_without(text, tokens)))
    if doubtful and not allow_plain:
        names = ", ".join(doubtful)
        raise TemplateError(
            f"the chat template writes {names}, and nothing says whether that is one token or plain text",
            hint="Name each that is a control token with --special, and add --allow-plain if others are text",
        )
    if unknown := sorted(roles & _OTHER_ROLES):
        what = f"the chat template writes {', '.join(unknown)}, which a new tokenizer does not have"
        raise TemplateError(what, hint=f"Use {', '.join(sorted(_ROLES_WE_FILL))} or write the tokens themselves")
    named = {"eos_token": END_OF_TEXT, "pad_token": PADDING}
    beginning = next((token for token in _BEGINNINGS if token in tokens), None)
    if beginning is not None or "bos_token" in roles:
        # A beginning of its own would stand untrained before every chat; end-of-text also separates documents.
        named["bos_token"] = beginning or END_OF_TEXT
    return SpecialTokens(tokens, named, tuple(doubtful))


def _written(template: str) -> tuple[list[str], set[str]]:
    """The strings in a template, and the token roles it reads."""
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(template))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid: {error.message}", where=f"line {error.lineno}") from error
    texts = [data.data for data in tree.find_all(nodes.TemplateData)]
    texts += [constant.value for constant in tree.find_all(nodes.Const) if isinstance(constant.value, str)]
    names = {name.name for name in tree.find_all(nodes.Name)}
    return texts, names & (_ROLES_WE_FILL | _OTHER_ROLES)


def _without_generation(template: str) -> str:
    """The template without the marks of `{% generation %}` blocks, which plain Jinja does not know."""
    return re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)


def _without(text: str, tokens: Iterable[str]) -> str:
    for token in sorted(tokens, key=len, reverse=True):
        text = text.replace(token, " ")
    return text


def _check(token: str) -> None:
    problem = None
    if len(token) < 2:
        problem = "is too short: every text with this character would be cut there"
    elif token != token.strip():
        problem = "begins or ends with white space"
    elif RESERVED in token:
        problem = "holds characters that are kept for our own use"
    if problem is not None:
        raise DataError(f"the special token {token!r} {problem}", hint="Write it like <|this|>")
