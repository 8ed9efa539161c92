"""Prove from a chat template's source that it only puts contents in place: it never looks into one.

Then what it writes is the same for all conversations with the same roles, but for the contents themselves. The proof
walks the template's syntax tree and gives up at the first thing that it does not know, so most templates that tidy
contents up are not proved; no template is proved wrongly. Knows Jinja; does not know messages, tokens or roles.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from jinja2 import nodes

from model_foundry.rendering.sandbox import parse_template

CONTENT = "content"

_TYPE_TESTS = frozenset({"boolean", "defined", "iterable", "mapping", "none", "number", "sequence", "string"})
_TYPE_TESTS |= {"undefined"}
_METHODS = frozenset({*dir(dict), *dir(list), *dir(str)})


class _Kind(Enum):
    """What an expression's value may be."""

    PLAIN = auto()  # nothing that depends on what contents say
    LIST = auto()  # messages
    MESSAGE = auto()
    TEXT = auto()  # contents and other text side by side, which may only be joined and written out


_PLAIN, _LIST, _MESSAGE, _TEXT = _Kind


class _NotProvedError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Opacity:
    """A proof. `names`: every name and text constant of the template; a field not among them is never read."""

    names: frozenset[str]


def prove_opaque(source: str) -> Opacity | None:
    """The proof that a template never looks into a content, or None."""
    tree = parse_template(source)
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    walker = _Walker()
    try:
        # Twice, so that a name is known for what it is in whatever order the template uses it.
        walker.statements(tree.body)
        walker.statements(tree.body)
    except _NotProvedError:
        return None
    return Opacity(frozenset(names))


class _Walker:
    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {"messages": _LIST}

    # -- statements --------------------------------------------------------------------------------------------------

    def statements(self, body: list[nodes.Node]) -> None:
        for node in body:
            self._statement(node)

    def _statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for child in node.nodes:
                self._require(child, _PLAIN, _TEXT)
        elif isinstance(node, nodes.If):
            self._require(node.test, _PLAIN, _LIST, _MESSAGE)
            for body in (node.body, node.elif_, node.else_):
                self.statements(list(body))
        elif isinstance(node, nodes.For):
            self._loop(node)
        elif isinstance(node, nodes.Assign):
            self._assign(node.target, self._kind(node.node))
        elif isinstance(node, nodes.Macro):
            self._macro(node)
        elif isinstance(node, nodes.Scope):
            self.statements(node.body)
        elif not isinstance(node, (nodes.Break, nodes.Continue)):
            raise _NotProvedError

    def _loop(self, node: nodes.For) -> None:
        kind = self._require(node.iter, _PLAIN, _LIST)
        if node.recursive:
            raise _NotProvedError
        self._assign(node.target, _MESSAGE if kind == _LIST else _PLAIN)
        if node.test is not None:
            self._require(node.test, _PLAIN)
        self.statements(node.body)
        self.statements(node.else_)

    def _assign(self, target: nodes.Node, kind: _Kind) -> None:
        if isinstance(target, nodes.Name):
            if target.name == "loop":
                raise _NotProvedError
            self._kinds[target.name] = _either(self._kinds.get(target.name, _PLAIN), kind)
        elif kind != _PLAIN:
            raise _NotProvedError

    def _macro(self, node: nodes.Macro) -> None:
        """What a macro writes is taken for plain, so no message may come near it."""
        for name in node.find_all(nodes.Name):
            if self._kinds.get(name.name, _PLAIN) != _PLAIN:
                raise _NotProvedError
        self.statements(node.body)

    # -- expressions -------------------------------------------------------------------------------------------------

    def _require(self, node: nodes.Node, *allowed: _Kind) -> _Kind:
        kind = self._kind(node)
        if kind not in allowed:
            raise _NotProvedError
        return kind

    def _kind(self, node: nodes.Node) -> _Kind:
        if isinstance(node, nodes.Name):
            if node.name == "loop":  # it knows its neighbours, so only its fields may be used
                raise _NotProvedError
            return self._kinds.get(node.name, _PLAIN)
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._field(node)
        if isinstance(node, nodes.Filter):
            return self._filter(node)
        if isinstance(node, nodes.Test):
            return self._test(node)
        if isinstance(node, (nodes.Add, nodes.Concat)):
            return _either(*(self._require(child, _PLAIN, _TEXT) for child in node.iter_child_nodes()))
        if isinstance(node, nodes.CondExpr):
            self._require(node.test, _PLAIN, _LIST, _MESSAGE)
            otherwise = _PLAIN if node.expr2 is None else self._kind(node.expr2)
            return _either(self._kind(node.expr1), otherwise)
        if isinstance(node, (nodes.And, nodes.Or)):
            allowed = (_PLAIN, _LIST, _MESSAGE)
            return _either(self._require(node.left, *allowed), self._require(node.right, *allowed))
        if isinstance(node, nodes.Not):
            self._require(node.node, _PLAIN, _LIST, _MESSAGE)
            return _PLAIN
        if isinstance(node, nodes.Compare) and self._asks_for_field(node):
            return _PLAIN
        if isinstance(node, (nodes.Expr, nodes.Helper)):
            self._all_plain(node)
            return _PLAIN
        raise _NotProvedError

    def _all_plain(self, node: nodes.Node) -> None:
        for child in node.iter_child_nodes():
            self._require(child, _PLAIN)

    def _field(self, node: nodes.Getattr | nodes.Getitem) -> _Kind:
        key = node.attr if isinstance(node, nodes.Getattr) else None
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            key = node.arg.value
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            if not isinstance(key, str):
                raise _NotProvedError
            return _MESSAGE if key in ("previtem", "nextitem") else _PLAIN
        owner = self._require(node.node, _PLAIN, _LIST, _MESSAGE)
        if owner == _PLAIN:
            self._all_plain(node)
            return _PLAIN
        if isinstance(key, str):
            if key in _METHODS:  # messages.copy() would be as good as messages
                raise _NotProvedError
            return _TEXT if key == CONTENT and owner == _MESSAGE else _PLAIN
        if owner == _LIST and isinstance(node, nodes.Getitem) and _is_number(node.arg):
            return _LIST if isinstance(node.arg, nodes.Slice) else _MESSAGE
        raise _NotProvedError

    def _filter(self, node: nodes.Filter) -> _Kind:
        if node.node is None:
            raise _NotProvedError
        kind = self._kind(node.node)
        if kind == _PLAIN:
            self._all_plain(node)
            return _PLAIN
        if node.args or node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise _NotProvedError
        if kind == _LIST and node.name in ("length", "count"):
            return _PLAIN
        if kind == _LIST and node.name in ("first", "last"):
            return _MESSAGE
        # Of a content and nothing else: white space of the template beside it would be trimmed for one content only.
        if kind == _TEXT and node.name == "trim" and isinstance(node.node, (nodes.Getattr, nodes.Getitem)):
            return _TEXT
        raise _NotProvedError

    def _test(self, node: nodes.Test) -> _Kind:
        if self._kind(node.node) == _PLAIN:
            self._all_plain(node)
        elif node.name not in _TYPE_TESTS:
            raise _NotProvedError
        return _PLAIN

    def _asks_for_field(self, node: nodes.Compare) -> bool:
        """`'tool_calls' in message`"""
        if not isinstance(node.expr, nodes.Const) or len(node.ops) != 1 or node.ops[0].op not in ("in", "notin"):
            return False
        return self._kind(node.ops[0].expr) in (_LIST, _MESSAGE)


def _either(*kinds: _Kind) -> _Kind:
    """The kind of a value that may be any of these."""
    found = set(kinds) - {_PLAIN}
    if len(found) > 1:
        raise _NotProvedError
    return found.pop() if found else _PLAIN


def _is_number(node: nodes.Node) -> bool:
    """Whether an index can only be a number (or a slice), so that it names messages and no field of one."""
    if isinstance(node, nodes.Slice):
        return all(_is_number(child) for child in node.iter_child_nodes())
    if isinstance(node, nodes.Const):
        return isinstance(node.value, int)
    if isinstance(node, (nodes.Add, nodes.Sub)):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, (nodes.Neg, nodes.Pos)):
        return _is_number(node.node)
    if not isinstance(node, nodes.Getattr) or node.attr not in ("index", "index0", "length"):
        return False
    return isinstance(node.node, nodes.Name) and node.node.name == "loop"
