"""YAML read with line numbers and without surprises.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: `5e-5` is a number, `no` and `on` are words, `010` is ten.
Duplicate keys, merge keys, tags and self-references are errors. Knows nothing of the configuration's fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from model_foundry.config.tree import Branch, Leaf, Node, Origin, to_plain
from model_foundry.errors import ConfigError

MAX_DEPTH = 50
MAX_NODES = 100_000
"""More values than any configuration has; stops aliases that multiply ("a billion laughs")."""

_TAG = "tag:yaml.org,2002:"
_PLAIN = "?"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Composes nodes only: nothing is constructed, so no tag can run anything."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count the nesting, so that a bracket typed a thousand times is an error and not a crash."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply to be a configuration")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Mark plain scalars, so that quoted ones stay text."""
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else super().resolve(kind, value, implicit)


def resolve_plain(text: str) -> Any:
    """The value of an unquoted scalar: null, true or false, int, float, else the text itself."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        try:
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        except ValueError:  # more digits than Python converts: no number anyone means
            return text
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=(?i:inf|nan)$)", "", text))
    return text


def read_yaml(text: str, *, origin_at: Callable[[int], Origin]) -> Branch:
    """Parse a document that is a mapping.

    Args:
        origin_at: gives the origin of a value from its line, counted from 1.

    Raises:
        ConfigError: not YAML, not one mapping, a duplicate key, a tag, an alias to itself.
    """
    try:
        root = _Loader(text).get_single_node()
        if root is None:
            raise ConfigError("the file is empty", where=origin_at(1).name, hint="Write at least one key: value line")
        converted = _Converter(origin_at).convert(root, origin_at(_line(root)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _syntax_error(error, origin_at(mark.line + 1 if mark else 1)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}".replace("\n", " "), where=origin_at(1).name) from None
    if isinstance(converted, Leaf):
        kind = "a list" if isinstance(converted.value, list) else "a single value"
        raise ConfigError(
            f"expected a mapping of key: value lines, found {kind}",
            where=converted.origin.place,
            hint="Write for example `seed: 1` on a line of its own",
        )
    return converted


def read_value(text: str, origin: Origin, *, text_only: bool = False) -> Node:
    """Parse what follows `key=`: a flow list or mapping, a quoted scalar, or the plain text as it stands.

    Text that starts like a list or a quotation but isn't one (`[1] is a list?`) stays text.

    Args:
        text_only: the key takes text, so brackets and braces mean themselves.
    """
    if text[:1] in (("'", '"') if text_only else ("[", "{", "'", '"')):
        try:
            root = _Loader(text).get_single_node()
            if root is not None:
                return _Converter(lambda _line: origin).convert(root, origin)
        except (yaml.YAMLError, ConfigError):
            return Leaf(text, origin)
    return Leaf(resolve_plain(text), origin, text)


class _Converter:
    def __init__(self, origin_at: Callable[[int], Origin]) -> None:
        self.origin_at = origin_at
        self.num_nodes = 0
        self.open: set[int] = set()

    def convert(self, node: yaml.Node, origin: Origin) -> Node:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES or len(self.open) > MAX_DEPTH or id(node) in self.open:
            raise ConfigError("aliases (*name) repeat each other without end", where=origin.place)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
                return self._mapping(node, origin)
            if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
                return Leaf([to_plain(self.convert(item, self._origin(item))) for item in node.value], origin)
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, origin)
        finally:
            self.open.discard(id(node))
        raise ConfigError(f"the tag {node.tag} is not allowed", where=origin.place, hint="Write plain values")

    def _origin(self, node: yaml.Node) -> Origin:
        return self.origin_at(_line(node))

    def _mapping(self, node: yaml.MappingNode, origin: Origin) -> Branch:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self._origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
                raise ConfigError("a key must be a word", where=place.place)
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                raise ConfigError(
                    "merge keys (<<) are not read", where=place.place, hint="Put what is shared in a file to inherit"
                )
            if key in children:
                first = children[key].origin.place
                raise ConfigError(f"the key '{key}' is given twice (first at {first})", where=place.place)
            children[key] = self.convert(value_node, place)
        return Branch(children, origin)

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Leaf:
        if node.tag == _PLAIN:
            return Leaf(resolve_plain(node.value), origin, node.value)
        if node.tag == f"{_TAG}str":
            return Leaf(node.value, origin)
        raise ConfigError(f"the tag {node.tag} is not allowed", where=origin.place, hint="Write plain values")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_error(error: yaml.MarkedYAMLError, origin: Origin) -> ConfigError:
    problem = (error.problem or "cannot be read").replace("\n", " ")
    hint = None
    if "'\\t'" in problem:
        hint = "Indent with spaces: YAML takes no tabs"
    elif "single document" in (error.context or ""):
        hint = "Keep one document a file: remove the --- line"
    elif "mapping values are not allowed" in problem:
        hint = "Put a text that holds ': ' in quotes"
    context = f"{error.context}, " if error.context else ""
    return ConfigError(f"not YAML: {context}{problem}".replace("\n", " "), where=origin.place, hint=hint)
