"""Values with their origin, as a tree, and how one layer of them lies over another.

Knows no schema and no file format: a `Branch` is a mapping, a `Leaf` is anything else (lists and null included).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written.

    Attributes:
        kind: the layer it belongs to.
        name: file path, profile name, environment variable, or the override as it was typed.
        line: line in the file or profile, counted from 1.
        folder: the file's folder, against which its relative paths are read.
    """

    kind: Literal["profile", "file", "environment", "override", "default"]
    name: str = ""
    line: int | None = None
    folder: Path | None = None

    @property
    def provenance(self) -> str:
        """Short form for `Resolved.provenance`."""
        match self.kind:
            case "file":
                return f"file {self.name}:{self.line}"
            case "profile" | "environment":
                return f"{self.kind} {self.name}"
            case _:
                return self.kind

    @property
    def place(self) -> str:
        """What an error points at."""
        match self.kind:
            case "file":
                return f"{self.name}:{self.line}"
            case "profile":
                return f"profile {self.name}, line {self.line}"
            case "environment":
                return f"environment variable {self.name}"
            case "override":
                return f"override {self.name}"
            case _:
                return self.kind


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value that layers replace whole.

    Attributes:
        text: the scalar as it was typed and unquoted (`007`), None when it was quoted or isn't a scalar.
        hides: origins of the values below that this one replaced, nearest first.
    """

    value: Any
    origin: Origin
    text: str | None = None
    hides: tuple[Origin, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """A mapping that layers merge key by key."""

    children: Mapping[str, Node] = field(default_factory=dict)
    origin: Origin = Origin("default")


Node: TypeAlias = "Branch | Leaf"


def merge(below: Branch, above: Branch) -> Branch:
    """Lay `above` over `below`: mappings merge, everything else (lists and null included) replaces."""
    children: dict[str, Node] = dict(below.children)
    for key, node in above.children.items():
        under = children.get(key)
        if isinstance(under, Branch) and isinstance(node, Branch):
            children[key] = merge(under, node)
        elif isinstance(under, Leaf) and isinstance(node, Leaf):
            children[key] = replace(node, hides=(*node.hides, under.origin, *under.hides))
        else:
            children[key] = node
    return Branch(children, above.origin if above.children else below.origin)


def to_plain(node: Node) -> Any:
    """The values alone."""
    if isinstance(node, Leaf):
        return node.value
    return {key: to_plain(child) for key, child in node.children.items()}


def nested(path: tuple[str, ...], node: Node, origin: Origin) -> Branch:
    """A tree that holds `node` at `path` and nothing else."""
    for key in reversed(path):
        node = Branch({key: node}, origin)
    assert isinstance(node, Branch)
    return node


def leaves(branch: Branch, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every leaf with its dotted path, in the order written."""
    for key, node in branch.children.items():
        path = f"{prefix}{key}"
        if isinstance(node, Leaf):
            yield path, node
        else:
            yield from leaves(node, f"{path}.")


def find(branch: Branch, path: tuple[str, ...]) -> Node:
    """The node at `path`, or the nearest one above it."""
    node: Node = branch
    for key in path:
        if not isinstance(node, Branch) or key not in node.children:
            break
        node = node.children[key]
    return node


def map_leaves(branch: Branch, change: Any, prefix: str = "") -> Branch:
    """The same tree with `change(dotted path, leaf)` in place of every leaf."""
    children: dict[str, Node] = {}
    for key, node in branch.children.items():
        path = f"{prefix}{key}"
        children[key] = change(path, node) if isinstance(node, Leaf) else map_leaves(node, change, f"{path}.")
    return Branch(children, branch.origin)
