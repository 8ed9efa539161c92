"""Every configuration field is read: one that nothing reads is a promise that nobody keeps."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from model_foundry.config.architecture import ArchitectureSection
from model_foundry.config.commands import COMMAND_SCHEMAS
from model_foundry.config.fields import schema_fields

PACKAGE = Path(__file__).parents[2] / "model_foundry"


@cache
def read_paths() -> frozenset[str]:
    """Every attribute read outside config/, with what stands before it: `config.training.epochs` and `training.epochs`.

    `section = config.training; section.epochs` is `section.epochs`; names given to a section in an assignment or by an
    annotation (`section: TrainingSection`) stand for it.
    """
    found: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "config":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _section_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                before = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                found.add(f"{names.get(before, before)}.{node.attr}")
    return frozenset(found)


def _section_names(tree: ast.Module) -> dict[str, str]:
    """Local names of sections: by assignment from an attribute, and by the annotation of a parameter."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            names |= {target.id: node.value.attr for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    names |= {
                        t.id: v.attr for t, v in pairs if isinstance(t, ast.Name) and isinstance(v, ast.Attribute)
                    }
        elif isinstance(node, ast.arg) and node.annotation is not None:
            kind = ast.unparse(node.annotation).rpartition(".")[2].strip("'\"")
            if kind.endswith("Section"):
                names[node.arg] = kind.removesuffix("Section").lower()
    return names


def is_read(dotted: str) -> bool:
    section, _, name = dotted.rpartition(".")
    if section == "model" and name in ArchitectureSection.model_fields:  # pretraining's model section is one of those
        return f"architecture.{name}" in read_paths()
    if section:
        return f"{section.rpartition('.')[2]}.{name}" in read_paths()
    return f"config.{name}" in read_paths()


FIELDS = [(command, path) for command, schema in COMMAND_SCHEMAS.items() for path in schema_fields(schema)]


@pytest.mark.parametrize("command, path", FIELDS, ids=lambda value: str(value))
def test_a_field_is_read_somewhere(command: str, path: str) -> None:
    assert is_read(path), f"nothing outside config/ reads {path} (foundry {command}): read it or take it out"


def test_the_search_does_not_find_what_is_not_there() -> None:
    """If the pattern matched anything, every field would seem to be read."""
    assert not is_read("training.no_such_field")
    assert len(FIELDS) > 60
