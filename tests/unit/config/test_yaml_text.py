"""YAML without surprises: numbers are numbers, words are words, nothing is run, nothing is quietly dropped."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.config.tree import Branch, Leaf, Origin, leaves, to_plain
from model_foundry.config.yaml_text import read_value, read_yaml, resolve_plain
from model_foundry.errors import ConfigError

OVERRIDE = Origin("override", "k=v")


def parse(text: str) -> Branch:
    return read_yaml(text, origin_at=lambda line: Origin("file", "x.yaml", line))


def value(text: str) -> Any:
    return to_plain(read_value(text, OVERRIDE))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("5e-5", 5e-5),  # PyYAML's YAML 1.1 reads these two as text
        ("1E4", 1e4),
        ("1e-4", 1e-4),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),  # octal in YAML 1.1
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("no", "no"),  # false in YAML 1.1
        ("on", "on"),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("1_000", "1_000"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("9" * 5000, "9" * 5000),  # more digits than int() takes
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars(text: str, expected: Any) -> None:
    found = resolve_plain(text)
    assert found == expected
    assert type(found) is type(expected)


def test_not_a_number_is_read() -> None:
    assert math.isnan(resolve_plain(".nan"))


def test_files_read_numbers_with_an_exponent_as_numbers() -> None:
    assert to_plain(parse("a: 5e-5\nb: 1e-4\nc: '5e-5'\n")) == {"a": 5e-5, "b": 1e-4, "c": "5e-5"}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_comes_back_from_an_override(number: float) -> None:
    assert value(repr(number)) == number
    assert isinstance(value(repr(number)), float)


@given(st.integers())
def test_every_integer_comes_back_from_an_override(number: int) -> None:
    assert value(str(number)) == number


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    """An override may hold anything a shell passes: colons, hashes, half a list."""
    read_value(text, OVERRIDE)
    node = read_value(text, OVERRIDE, text_only=True)
    assert isinstance(node, Leaf)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[1, 2e-3, a]", [1, 2e-3, "a"]),
        ("{r: 8, use_dora: true}", {"r": 8, "use_dora": True}),
        ('"007"', "007"),
        ("'a b'", "a b"),
        ("a: b # c", "a: b # c"),
        ("[1] is this a list?", "[1] is this a list?"),
        ('"yes", she said', '"yes", she said'),
        ("[1, 2", "[1, 2"),
        ("[" * 1500, "[" * 1500),
        ("!!python/object:os.system x", "!!python/object:os.system x"),
    ],
)
def test_override_values(text: str, expected: Any) -> None:
    assert value(text) == expected


def test_brackets_in_a_text_field_are_text() -> None:
    assert to_plain(read_value("[1, 2]", OVERRIDE, text_only=True)) == "[1, 2]"
    assert to_plain(read_value("{a}", OVERRIDE, text_only=True)) == "{a}"
    assert to_plain(read_value('"[1]"', OVERRIDE, text_only=True)) == "[1]"


def test_every_value_knows_its_line() -> None:
    found = dict(leaves(parse("# comment\nseed: 1\ntraining:\n  epochs: 2\n\n  save_at: [1,\n    2]\n")))
    assert {path: leaf.origin.line for path, leaf in found.items()} == {
        "seed": 2,
        "training.epochs": 4,
        "training.save_at": 6,
    }


@pytest.mark.parametrize(
    "text, what, line",
    [
        ("", "the file is empty", 1),
        ("# only a comment\n", "the file is empty", 1),
        ("- 1\n- 2\n", "found a list", 1),
        ("\njust words\n", "found a single value", 2),
        ("a: 1\nb: 2\na: 3\n", "given twice", 3),
        ("a:\n  b: 1\n  b: 2\n", "given twice", 3),
        ("a: 1\n---\nb: 2\n", "single document", 2),
        ("a:\n\tb: 1\n", "cannot start any token", 2),
        ("a: b: c\n", "mapping values are not allowed", 1),
        ("a: [1, 2\nb: 3\n", "not YAML", 2),
        ("a: !!python/object/apply:os.system ['true']\n", "is not allowed", 1),
        ("a: !!int '5'\n", "is not allowed", 1),
        ("b: &b {x: 1}\na:\n  <<: *b\n", "merge keys", 3),
        ("a: &a [*a]\n", "repeat each other", 1),
        ("? [1]\n: 2\n", "a key must be a word", 1),
        ("a: *nowhere\n", "undefined alias", 1),
    ],
)
def test_what_is_not_a_configuration_is_an_error_with_its_line(text: str, what: str, line: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert what in caught.value.what
    assert caught.value.where is not None
    assert caught.value.where.split(":")[:2] in (["x.yaml"], ["x.yaml", str(line)])


def test_aliases_that_multiply_are_stopped() -> None:
    """A billion laughs: nine lines that expand to a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError):
        parse("\n".join(lines))


def test_aliases_that_nest_are_stopped() -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]
    with pytest.raises(ConfigError, match="repeat each other"):
        parse("\n".join(lines))


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(ConfigError, match="too deeply"):
        parse("a: " + "[" * 1500 + "]" * 1500)


def test_anchors_may_be_used_twice() -> None:
    assert to_plain(parse("a: &v [1, 2]\nb: *v\n")) == {"a": [1, 2], "b": [1, 2]}


@given(st.text())
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        parse(text)
