"""Syntax by the grammar, and languages that a YAML file describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.cli.corpora import open_corpus
from model_foundry.config.generate import GenerateConfig
from model_foundry.config.load import load_config
from model_foundry.data.code import LANGUAGES, find_language, make_language, syntax_problem
from model_foundry.data.code.languages import load_grammar
from model_foundry.errors import ConfigError, DataError

FINE = {
    "lua": [
        "local x = 1",
        "\tlocal function indented()\n\t\treturn 1\n\tend",
        "onClick = function(self)\n  return 1\nend",
        "['a key'] = function() end",
        "function(a) return a end",
        "goto done ::done::",
        "local a <const> = 5 // 2",
    ],
    "gdscript": [
        "func f():\n\treturn 1",
        "\tfunc in_class(n):\n\t\thp -= n",
        "\tvar body_alone = 1\n\tbody_alone += 1\n",
        "func f():\n    pass\n    return\n",
        "yield(get_tree(), 'idle_frame')",
        "onready var x = $A/B",
        "@onready var x: Node = %A",
        "export(int, 1, 5) var y = 3 setget set_y, get_y",
        "func f() -> Array[int]:\n\tawait get_tree().process_frame\n\treturn []",
        "tool\nextends Node",
        "@abstract func f()",
    ],
}
BROKEN = {
    ("lua", "function f()\n  return 1\n"): "line 2: missing 'end'",
    ("lua", "local t = {1, 2"): "line 1: missing '}'",
    (
        "lua",
        "function f()\n  if x then\n    return 1\nend\n",
    ): "line 1: what begins with 'function f()' is not finished",
    ("lua", "x = 1\ny = = 2\n"): "line 2: unexpected '= 2'",
    ("lua", "function f() end end"): "line 1: unexpected 'end'",
    ("lua", "```lua\nprint(1)\n```"): "line 2: unexpected 'print(1)'",
    ("lua", "  \n"): "line 1: no code",
    ("lua", "\tend"): "line 1: unexpected 'end'",
    ("lua", "local x = 1\ny = end"): "line 2: a keyword where a name belongs",
    (
        "lua",
        "Sorry, I can't write (this). It isn't code: see above!\n" * 40,
    ): "line 1: this does not read as lua",
    ("gdscript", "func f(\n\tpass"): "line 1: what begins with 'func f(' is not finished",
    ("gdscript", "func f():\n"): "line 1: a body with nothing in it",
    ("gdscript", "x = 1\nif x:\n"): "line 2: a body with nothing in it",
    ("gdscript", "Here is the code"): "line 1: unexpected 'the code'",
}


@pytest.mark.parametrize("language, code", [(language, code) for language, codes in FINE.items() for code in codes])
def test_programs_and_fragments_of_both_generations_are_fine(language: str, code: str) -> None:
    assert syntax_problem(code, language) is None


@pytest.mark.parametrize("language, code", BROKEN)
def test_an_error_is_named_by_line(language: str, code: str) -> None:
    assert syntax_problem(code, language) == BROKEN[language, code]


@given(st.text(max_size=200), st.sampled_from(["lua", "gdscript"]))
def test_any_text_gets_an_answer(code: str, language: str) -> None:
    problem = syntax_problem(code, language)
    assert problem is None or problem.startswith("line ")


def test_lone_surrogates_are_no_crash() -> None:
    """A model's JSON may hold half of a character."""
    assert syntax_problem("x = '\ud83d'", "lua") is None


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(DataError, match="no language 'lau'"):
        find_language("lau")


def test_a_built_in_language_changes_only_where_something_is_given() -> None:
    changed = make_language("lua", callback_names="tick", package=None, suffixes=())
    assert changed == dataclasses.replace(LANGUAGES["lua"], callback_names="tick")


MISTAKES = {
    "query": ({"units": {"x": "(no_such_node) @unit"}}, "the query cannot be read"),
    "pattern": ({"callback_names": "("}, "the pattern cannot be read"),
    "package": ({"package": "tree_sitter_nothing"}, "cannot be imported"),
    "no grammar": ({"package": "json"}, "holds no usable tree-sitter grammar"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_description_that_cannot_be_used_is_named(name: str) -> None:
    given, what = MISTAKES[name]
    with pytest.raises(DataError, match=what):
        load_grammar(make_language("lua", **given))  # pyright: ignore[reportArgumentType]


DOMAIN = """\
inherits: {base}
corpus:
  about: Lua lenses of a game that does not exist
  roots: [scripts]
  exclude: [old/]
  kinds: [lens, function]
  min_lines: 1
  concepts:
    lens: turns light into an event
  grammar:
    units:
      lens: '((function_call name: (identifier) @_call arguments: (arguments (string content: (_) @name)
        (table_constructor))) @unit (#eq? @_call "lens"))'
"""
LENSES = """\
-- Widens.
lens("wide", {
  open = function(light) return light * 2 end,
})
function plain() end
"""


def test_a_third_domain_is_a_yaml_file_and_nothing_else(tmp_path: Path) -> None:
    """Other folders, other words and a kind of unit that no table here knows."""
    (tmp_path / "scripts" / "old").mkdir(parents=True)
    (tmp_path / "scripts" / "a.lua").write_text(LENSES)
    (tmp_path / "scripts" / "old" / "b.lua").write_text(LENSES)
    base = Path(__file__).parents[3] / "configs" / "domains" / "base.yaml"
    (tmp_path / "mine.yaml").write_text(DOMAIN.format(base=base))
    config = load_config(GenerateConfig, path=tmp_path / "mine.yaml").config
    corpus = open_corpus(config.corpus)
    found = [(unit.kind, unit.name, unit.comment) for unit in corpus.units]
    assert found == [("lens", "wide", "Widens."), ("function", "plain", "")]
    assert corpus.skipped == {"inside another unit": 1, "excluded by old/": 1}


def test_a_language_without_a_table_is_a_yaml_file_as_well(tmp_path: Path) -> None:
    """The grammar package and the queries are all that a language is."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.game").write_text(
        "-- Said.\nfunction f(a)\n  return a\nend\n-- callable\nfunction g() end\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "corpus:\n  language: gamelua\n  roots: [src]\n  min_lines: 1\n  grammar:\n    package: tree_sitter_lua\n"
        "    suffixes: [.game]\n    units:\n      function: '(function_declaration name: (_) @name) @unit'\n"
        "    comment_nodes: [comment]\n    line_prefixes: [--]\n"
    )
    corpus = open_corpus(load_config(GenerateConfig, path=tmp_path / "mine.yaml").config.corpus)
    assert [(unit.language, unit.name, unit.comment) for unit in corpus.units] == [
        ("gamelua", "f", "Said."),
        ("gamelua", "g", "callable"),
    ]


def test_a_new_language_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("corpus:\n  language: gamelua\n  grammar:\n    package: tree_sitter_lua\n")
    with pytest.raises(ConfigError, match=r"give corpus\.grammar\.suffixes, corpus\.grammar\.units"):
        load_config(GenerateConfig, path=tmp_path / "mine.yaml")
