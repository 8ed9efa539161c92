"""Whether a piece of code is grammatical, and where it is not. Knows the grammar's tolerance: it is no compiler."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from model_foundry.data.code.languages import Grammar, Language, find_language, load_grammar

if TYPE_CHECKING:
    import tree_sitter

MAX_QUOTED_CHARS = 40


def syntax_problem(code: str, language: str | Language) -> str | None:
    """The first syntax error of a program or a fragment: "line 3: missing 'end'"; None where there is none.

    Common indentation is no error, and a fragment (a table's field, a method's body) counts as whole when one of the
    language's `fragments` makes it so. Never raises on bad code.

    Raises:
        DataError: an unknown language.
        MissingExtraError: the grammar is not installed.
    """
    grammar = load_grammar(find_language(language))
    # JSON can hold half of a character, which no file can.
    code = code.encode("utf-8", "replace").decode()
    if not code.strip():
        return "line 1: no code"
    if not grammar.reads_as_code(code):
        return f"line 1: this does not read as {grammar.language.name}"
    plain = textwrap.dedent(code)
    root = _parsed(plain, grammar)
    if root.has_error:
        return None if _is_fragment(plain, grammar) else _first_error(root, plain.encode())
    problem = grammar.first_problem(root)
    return None if problem is None else "line {}: {}".format(*problem)


def _parsed(code: str, grammar: Grammar) -> tree_sitter.Node:
    # A reply's last line often lacks its line feed, which some grammars want.
    return grammar.parse((code if code.endswith("\n") else code + "\n").encode()).root


def _is_fragment(code: str, grammar: Grammar) -> bool:
    for fragment in grammar.language.fragments:
        root = _parsed(fragment.replace("{code}", code), grammar)
        if not root.has_error and grammar.first_problem(root) is None:
            return True
    return False


def _first_error(root: tree_sitter.Node, data: bytes) -> str:
    """Goes down to the first node that is missing or could not be placed. A loop, as trees may be deep."""
    node = root
    while not (node.is_error or node.is_missing):
        broken = next((child for child in node.children if child.has_error), None)
        if broken is None:
            break
        node = broken
    line = node.start_point[0] + 1
    if node.is_missing:
        return f"line {line}: missing '{node.type}'"
    text = data[node.start_byte :].decode(errors="replace").lstrip()
    shown = text.splitlines()[0].strip() if text else ""
    quoted = shown if len(shown) <= MAX_QUOTED_CHARS else f"{shown[:MAX_QUOTED_CHARS]}…"
    if node.child_count > 1 and node.end_byte >= len(data.rstrip()):
        return f"line {line}: what begins with '{quoted}' is not finished"
    return f"line {line}: unexpected '{quoted}'"
