"""Layers merge key by key: no key of a lower layer is lost, none of an upper one is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from model_foundry.config.tree import Branch, Leaf, Node, Origin, leaves, merge, to_plain

KEYS = st.sampled_from(["a", "b", "c", "seed"])
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from(["", "x", "y"])
    | st.lists(st.integers(0, 3), max_size=3)
)
FLAT = st.dictionaries(KEYS, VALUES, max_size=3)
PLAIN = st.dictionaries(KEYS, VALUES | FLAT | st.dictionaries(KEYS, VALUES | FLAT, max_size=2), max_size=4)


def tree(plain: dict[str, Any], name: str = "x") -> Branch:
    origin = Origin("file", name, 1)

    def node(value: Any) -> Node:
        return tree(value, name) if isinstance(value, dict) else Leaf(value, origin)

    return Branch({key: node(value) for key, value in plain.items()}, origin)


@given(PLAIN)
def test_nothing_below_or_above_changes_nothing(plain: dict[str, Any]) -> None:
    assert to_plain(merge(Branch(), tree(plain))) == plain
    assert to_plain(merge(tree(plain), Branch())) == plain
    assert to_plain(merge(tree(plain), tree(plain))) == plain


@given(PLAIN, PLAIN)
def test_every_upper_leaf_survives_and_no_other_lower_leaf_is_lost(
    below: dict[str, Any], above: dict[str, Any]
) -> None:
    merged = dict(leaves(merge(tree(below), tree(above))))
    upper, lower = dict(leaves(tree(above))), dict(leaves(tree(below)))
    for path, leaf in upper.items():
        assert merged[path].value == leaf.value
    for path, leaf in lower.items():
        covered = any(path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.") for key in upper)
        replaced_by_section = to_plain_at(above, path)
        if not covered and not replaced_by_section:
            assert merged[path].value == leaf.value


def to_plain_at(plain: dict[str, Any], path: str) -> bool:
    """Whether `plain` has a mapping exactly at the path (an empty one hides a lower leaf as well)."""
    value: Any = plain
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return isinstance(value, dict)


@given(PLAIN, PLAIN)
def test_merging_leaves_its_arguments_alone(below: dict[str, Any], above: dict[str, Any]) -> None:
    first, second = tree(below), tree(above)
    merge(first, second)
    assert to_plain(first) == below
    assert to_plain(second) == above


def test_lists_and_null_replace_whole() -> None:
    merged = merge(tree({"a": [1, 2, 3], "b": {"c": 1}}), tree({"a": [9], "b": None}))
    assert to_plain(merged) == {"a": [9], "b": None}


def test_a_hidden_value_leaves_its_origin_behind() -> None:
    merged = merge(merge(tree({"a": 1}, "one"), tree({"a": 2}, "two")), tree({"a": 3}, "three"))
    (leaf,) = [leaf for _, leaf in leaves(merged)]
    assert [origin.name for origin in (leaf.origin, *leaf.hides)] == ["three", "two", "one"]
