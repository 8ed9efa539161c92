"""Faulty copies of a module, one small fault each, made on its syntax tree. Reads source, runs nothing.

The faults are those of DeMillo, Lipton and Sayward (1978) that fit Python: another operator, another comparison, a
constant off by one, a condition turned round, a statement left out.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift,
}  # fmt: skip
_HARMLESS_CALLS = ("logger.",)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: where, what it does to which line, and the whole faulty source as a tree."""

    line: int
    what: str
    source: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """The same while the line's text is, wherever it moves to."""
        return f"{self.what} | {self.source}"


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a module; annotations, docstrings, messages of errors and logging are left alone."""
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text, filename=str(path))
    found = []
    for number, node in enumerate(_mutable(tree)):
        for choice, (what, _) in enumerate(_faults(node)):
            changed = copy.deepcopy(tree)
            target = next(each for place, each in enumerate(_mutable(changed)) if place == number)
            _replace(changed, target, _faults(target)[choice][1])
            line = getattr(node, "lineno", 0)
            found.append(Mutant(line, what, lines[line - 1].strip(), ast.fix_missing_locations(changed)))
    return found


def _mutable(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that a fault can be put into, in a fixed order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise) or _is_text(node) or _is_harmless(node):
            continue
        if isinstance(node, ast.arg):  # its annotation
            continue
        if isinstance(node, ast.ClassDef):
            for part in node.body:  # not the decorator: whether a class has slots is no fault
                yield from _inside(part)
            continue
        if _faults(node):
            yield node
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from _inside(node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*node.args.defaults, *(each for each in node.args.kw_defaults if each), *node.body):
                yield from _inside(part)
        else:
            yield from _mutable(node)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """As `_mutable`, the node itself included."""
    yield from _mutable(ast.Module([node], []))  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def _is_text(node: ast.AST) -> bool:
    """Docstrings and f-strings, which are said and not computed with."""
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
        return True
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith(_HARMLESS_CALLS)


def _faults(node: ast.AST) -> list[tuple[str, ast.AST]]:
    """(what it does, what stands in the node's place) for each fault of this node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        other = _COMPARISONS[type(node.ops[0])]
        return [(f"{_sign(node.ops[0])} → {_sign(other())}", ast.Compare(node.left, [other()], node.comparators))]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS and not _is_type(node):
        new = _OPERATORS[type(node.op)]
        return [(f"{_sign(node.op)} → {_sign(new())}", ast.BinOp(node.left, new(), node.right))]
    if isinstance(node, ast.BoolOp):
        new_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return [(f"{_sign(node.op)} → {_sign(new_op)}", ast.BoolOp(new_op, node.values))]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return [(f"without {_sign(node.op)}", node.operand)]
    if isinstance(node, ast.IfExp):
        return [("branches exchanged", ast.IfExp(node.test, node.orelse, node.body))]
    if isinstance(node, ast.Constant):
        return _constant_faults(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [("call left out", ast.Pass())]
    if isinstance(node, ast.AugAssign):
        return [("left out", ast.Pass())]
    return []


def _constant_faults(node: ast.Constant) -> list[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        return [(f"{node.value} → {not node.value}", ast.Constant(not node.value))]
    if isinstance(node.value, int | float):
        return [(f"{node.value} → {node.value + 1}", ast.Constant(node.value + 1))]
    return []


def _is_type(node: ast.BinOp) -> bool:
    """`int | None`, which is no computation."""
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(each, ast.Constant) and each.value is None for each in (node.left, node.right)
    )


def _sign(operator: ast.AST) -> str:
    return type(operator).__name__


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    """Put `new` where `old` stands."""
    ast.copy_location(new, old)
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
                return
            if isinstance(value, list) and any(each is old for each in value):
                value[[each is old for each in value].index(True)] = new
                return
