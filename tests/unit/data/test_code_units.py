"""Units of code: what is taken from a file, byte for byte, and what is left out with which reason."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.data.code import LANGUAGES, CodeUnit, UnitRules, read_corpus, syntax_problem
from model_foundry.data.code.extract import extract_units
from model_foundry.data.code.languages import load_grammar
from model_foundry.data.code.units import Skipped
from model_foundry.errors import DataError

FIXTURES = Path(__file__).parents[3] / "examples" / "code"


def units_of(text: str, language: str = "lua", **rules: Any) -> tuple[dict[str, CodeUnit], dict[str, int]]:
    skipped = Skipped()
    found = extract_units(
        text,
        path="a/file",
        grammar=load_grammar(LANGUAGES[language]),
        rules=UnitRules(**rules),
        skipped=skipped,
        seen=set(),
    )
    assert found is not None
    return {unit.name: unit for unit in found.units}, dict(skipped.counts)


def fixtures(language: str) -> dict[str, CodeUnit]:
    units = list(read_corpus([FIXTURES / language], language).units)
    assert len({unit.name for unit in units}) >= len(units) - 2  # _ready and the like stand in several files
    return {f"{unit.path}:{unit.name}": unit for unit in units}


LUA_FORMS = """\
local function localForm() return 1 end
function globalForm() return 1 end
function Table.member() return 1 end
function Table.deep.member2() return 1 end
function Table:method() return 1 end
local assigned = function() return 1 end
Table.assigned = function() return 1 end
Table["by.text"] = function() return 1 end
local T = {
  field = function() return 1 end,
  ["text field"] = function() return 1 end,
}
registerCallback("onThing", function() return 1 end)
player:registerCallback("onOther", function(a) return a end)
core.register_on_joinplayer(function(player) return player end)
return function() return 1 end
"""


def test_every_form_of_a_lua_function_is_a_unit() -> None:
    """A form that no query knows would silently shrink every corpus that is written in that style."""
    units, skipped = units_of(LUA_FORMS)
    assert {name: unit.kind for name, unit in units.items()} == {
        "localForm": "function",
        "globalForm": "function",
        "Table.member": "function",
        "Table.deep.member2": "function",
        "Table:method": "method",
        "assigned": "function",
        "Table.assigned": "function",
        'Table["by.text"]': "function",
        "field": "function",
        "text field": "function",
        "onThing": "callback",
        "onOther": "callback",
        "core.register_on_joinplayer": "callback",
        "file": "function",
    }
    assert not skipped
    assert units["field"].context == "local T"
    assert units["field"].code == "  field = function() return 1 end"


def test_a_call_that_registers_nothing_is_no_callback() -> None:
    units, _ = units_of("table.sort(list, function(a, b)\n  return a < b\nend)\npcall(function()\n  x()\nend)\n")
    assert not units


GDSCRIPT_FORMS = """\
class_name Door extends StaticBody2D
signal opened(by: Node)
func _init(): pass
func _ready(): pass
func _on_area_entered(area): pass
func _private(): pass
static func make() -> Door: return null
@rpc("any_peer")
func sync(): pass
@export func odd(): pass
remote func old(): pass
class Lock extends RefCounted:
\tfunc _init(key): pass
\tfunc turn(): pass
"""


def test_gdscript_kinds_follow_the_engine_s_conventions() -> None:
    units = list(
        extract_units(
            GDSCRIPT_FORMS,
            path="door.gd",
            grammar=load_grammar(LANGUAGES["gdscript"]),
            rules=UnitRules(),
            skipped=Skipped(),
            seen=set(),
        ).units  # pyright: ignore[reportOptionalMemberAccess]
    )
    assert [(unit.kind, unit.name) for unit in units] == [
        ("signal", "opened"),
        ("function", "_init"),
        ("callback", "_ready"),
        ("callback", "_on_area_entered"),
        ("function", "_private"),
        ("function", "make"),
        ("function", "sync"),
        ("function", "odd"),
        ("function", "old"),
        ("method", "_init"),
        ("method", "turn"),
    ]
    by_name = {unit.name: unit for unit in units}
    assert by_name["sync"].code == '@rpc("any_peer")\nfunc sync(): pass', "an annotation is part of what it annotates"
    assert by_name["odd"].code == "@export func odd(): pass"
    assert by_name["turn"].code == "\tfunc turn(): pass", "indentation stays, or the lines of a body stop agreeing"
    assert by_name["turn"].context == "class_name Door extends StaticBody2D, class Lock extends RefCounted"


def test_fixtures_hold_what_they_are_meant_to_show() -> None:
    lua = fixtures("lua")
    wave = lua["sector/ambush.lua:Ambush.spawnWave"]
    assert wave.comment.startswith("Spawns one wave around the middle of the sector.\nThe strength follows")
    assert wave.context == "namespace Ambush"
    assert (wave.first_line, wave.last_line) == (44, 57)
    strength = lua["sector/ambush.lua:Ambush.waveStrength"].comment
    assert strength.splitlines() == [
        "@param x integer sector coordinate",
        "@param y integer sector coordinate",
        "@param number integer",
        "@return number",
    ]
    assert lua["lib/loot.lua:onOpened"].context == "local handlers"
    assert lua["lib/loot.lua:onOpened"].kind == "callback"
    assert lua["lib/loot.lua:Loot.drop"].comment == ""
    gdscript = fixtures("gdscript")
    hurt = gdscript["scenes/player.gd:take_damage"]
    assert hurt.comment == "Takes damage unless the character was hurt a moment ago.\nReturns whether it counted."
    assert gdscript["godot3/door.gd:_on_Area2D_body_entered"].kind == "callback"
    assert (
        'yield(get_tree().create_timer(seconds_open), "timeout")'
        in gdscript["godot3/door.gd:_on_Area2D_body_entered"].code
    )
    assert gdscript["scenes/player.gd:health_changed"].comment.startswith("Emitted when damage was taken")


@pytest.mark.parametrize("language", ["lua", "gdscript"])
def test_a_unit_is_its_lines_of_the_file_byte_for_byte(language: str) -> None:
    for unit in read_corpus([FIXTURES / language], language).units:
        text = (FIXTURES / language / unit.path).read_bytes().decode()
        lines = text.splitlines(keepends=True)[unit.first_line - 1 : unit.last_line]
        assert "".join(lines).startswith(unit.code)
        assert "".join(lines).removeprefix(unit.code).strip(" ,)\n") == ""
        assert unit.sha256 == hashlib.sha256(unit.code.encode()).hexdigest()
        assert syntax_problem(unit.code, language) is None, unit.place


def test_mixed_line_endings_stay_as_they_are() -> None:
    text = "-- first\r\nfunction a()\r\n  return 1\nend\r\n\n-- second\nfunction b()\n  return 2\r\nend\n"
    units, _ = units_of(text)
    assert units["a"].code == "function a()\r\n  return 1\nend"
    assert units["b"].code == "function b()\n  return 2\r\nend"
    assert (units["a"].comment, units["b"].comment) == ("first", "second")
    assert (units["b"].first_line, units["b"].last_line) == (7, 9)


def test_a_syntax_error_costs_its_own_unit_only() -> None:
    """A corpus always has a broken file; dropping all of it, or taking broken code as an answer, are both wrong."""
    text = "function a()\n  return 1\nend\nfunction broken()\n  x = = 2\nend\nfunction c()\n  return 3\nend\n"
    units, skipped = units_of(text)
    assert list(units) == ["a", "c"]
    assert skipped == {"syntax error": 1}
    text = "func a():\n\treturn 1\n\nfunc broken(:\n\tx = = 2\n\nfunc c():\n\treturn 3\n"
    units, skipped = units_of("extends Node\n" + text, "gdscript")
    assert list(units) == ["a", "c"], "an open bracket swallows what follows, unless the text is read without it"
    assert skipped == {"syntax error": 1}
    assert (units["c"].code, units["c"].first_line, units["c"].context) == (
        "func c():\n\treturn 3",
        8,
        "extends Node",
    )


def test_a_missing_end_does_not_hide_the_functions_it_swallows() -> None:
    units, skipped = units_of("function a()\n  if x then\n  return 1\nend\nfunction b()\n  return 2\nend\n")
    assert list(units) == ["b"]
    assert "inside another unit" not in skipped


def test_code_is_taken_once_and_the_outer_unit_wins() -> None:
    text = "function outer()\n  local function inner()\n    return 1\n  end\n  return inner\nend\n"
    units, skipped = units_of(text)
    assert list(units) == ["outer"]
    assert skipped == {"inside another unit": 1}
    units, skipped = units_of(text, max_lines=4)
    assert list(units) == ["inner"], "of a unit that is too long, those inside are taken"
    assert skipped == {"over 4 lines": 1}


def test_rules_leave_out_with_their_reason() -> None:
    text = "-- said\nfunction a()\n  return 1\nend\nfunction b() end\nfunction T:c()\n  return 3\nend\n"
    assert list(units_of(text, kinds=("method",))[0]) == ["T:c"]
    assert units_of(text, kinds=("method",))[1] == {"of kind function": 2}
    assert units_of(text, min_lines=2)[1] == {"under 2 lines": 1}
    assert units_of(text, require_comment=True)[1] == {"without a comment": 2}
    assert units_of(text, max_chars=20)[1] == {"over 20 characters": 2}
    assert units_of(text + text, skip_duplicates=True)[1] == {"the same code as an earlier unit": 3}
    units, _ = units_of("signal x\nfunc f(): pass\n", "gdscript", min_lines=2)
    assert list(units) == ["x"], "a signal is one line by nature"


COMMENTS = {
    "-- plain\n": "plain",
    "--- doc\n---@param x number\n": "doc\n@param x number",
    "--[[ block ]]\n": " block ".strip(),
    "--[==[\n  two\n    lines ]] here\n]==]\n": "two\nlines ]] here",
    "-- far\n\n": "",
    "x = 1 -- trailing\n": "",
    "-- a\n-- b\n": "a\nb",
    "-- a\n--[[ b ]]\n--- c\n": "a\nb\nc",
    "---------- Title ----------\n-- text\n": "Title\ntext",
    "----------\n": "",
    "-- luacheck: ignore\n-- why\n": "why",
    "    -- deeper\n": "",
    "-- Copyright 2020 Somebody\n": "",
    "#!/usr/bin/lua\n-- said\n": "said",
    "-- licensed elsewhere\n\n-- said\n": "said",
}


@pytest.mark.parametrize("before", COMMENTS)
def test_the_comment_right_before_a_unit_is_its_own(before: str) -> None:
    units, _ = units_of(before + "function f(x)\n  return x\nend\n")
    assert units["f"].comment == COMMENTS[before]


def test_comment_styles_are_chosen() -> None:
    text = "--[[ block ]]\n-- line\n--- doc\nfunction f() end\n"
    assert units_of(text, comments=("doc",))[0]["f"].comment == "doc"
    assert units_of(text, comments=("block", "doc"))[0]["f"].comment == "block\ndoc"
    assert units_of(text, comments=())[0]["f"].comment == ""


def test_a_comment_at_the_end_of_a_body_is_not_the_next_function_s() -> None:
    units, _ = units_of("func a():\n\tpass\n\t# todo in a\nfunc b():\n\tpass\n# of c\nfunc c():\n\tpass\n", "gdscript")
    assert (units["b"].comment, units["c"].comment) == ("", "of c")
    assert units["a"].code == "func a():\n\tpass\n\t# todo in a"


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="no units of kind clas"):
        read_corpus([FIXTURES], "lua", rules=UnitRules(kinds=("clas",)))


SNIPPETS = [
    "-- c\n", "--[[ d\n]]\n", "\n", "\r\n", "local x = 'ä€😀'\n", "function f{}()\n  return '数'\nend\n",
    "T.g{} = function(a)\r\n  return a\r\nend\r\n", "local t{} = { h = function()\n end }\n", "x = = 1\n", "end\n",
]  # fmt: skip


@pytest.mark.slow
@given(st.lists(st.sampled_from(SNIPPETS), max_size=12))
@settings(max_examples=60, deadline=None)
def test_whatever_stands_around_it_a_unit_is_a_slice_of_the_text(parts: list[str]) -> None:
    """Broken neighbours, other alphabets and line endings must not move a unit's borders by a byte."""
    text = "".join(part.replace("{}", str(number)) for number, part in enumerate(parts))
    units, _ = units_of(text)
    for unit in units.values():
        line = text.split("\n")[unit.first_line - 1]
        assert unit.code in text
        assert line.startswith(unit.code.split("\n")[0])
        assert unit.code.count("\n") == unit.num_lines - 1
        assert syntax_problem(unit.code, "lua") is None
