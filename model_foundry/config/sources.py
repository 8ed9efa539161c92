"""The layers a configuration is made of: profiles and files with their parents, the environment, overrides.

Each becomes a tree of values with origins. Knows the schema only to name environment variables and text fields.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from model_foundry.config.fields import schema_fields, schema_sections, section_of
from model_foundry.config.section import Section
from model_foundry.config.suggest import ALIASES, close
from model_foundry.config.tree import Branch, Leaf, Node, Origin, find, merge, nested
from model_foundry.config.yaml_text import read_value, read_yaml
from model_foundry.errors import ConfigError, UsageError

MAX_FILE_BYTES = 1_000_000
PROFILE_FOLDER = Path(__file__).parent / "profiles"


def profile_names() -> list[str]:
    """The profiles that `inherits` takes by name."""
    return sorted(path.stem for path in PROFILE_FOLDER.glob("*.yaml"))


def read_file(path: Path, schema: type[BaseModel], *, chain: tuple[Path, ...] = ()) -> Branch:
    """A file laid over everything it inherits.

    Args:
        chain: the files that led here, to name a cycle.

    Raises:
        ConfigError: a file that is missing, is not UTF-8, is not a YAML mapping, or inherits itself.
    """
    profile = path.stem if path.parent == PROFILE_FOLDER else None

    def origin_at(line: int) -> Origin:
        if profile is not None:
            return Origin("profile", profile, line, path.parent)
        return Origin("file", str(path), line, path.parent)

    tree = read_yaml(_read_text(path), origin_at=origin_at)
    parents = tree.children.get("inherits")
    own = Branch({key: _section(key, node, schema) for key, node in tree.children.items() if key != "inherits"})
    below = Branch()
    for name in _parent_names(parents):
        assert isinstance(parents, Leaf)
        parent = _parent_path(name, parents.origin, path)
        links = [*(link.resolve() for link in chain), path.resolve()]
        if parent.resolve() in links:
            cycle = [*chain, path][links.index(parent.resolve()) :]
            raise ConfigError(
                f"the files inherit each other: {' -> '.join(map(str, [*cycle, parent]))}", where=parents.origin.place
            )
        below = lay(below, read_file(parent, schema, chain=(*chain, path)), schema)
    return lay(below, own, schema)


def lay(below: Branch, above: Branch, schema: type[BaseModel]) -> Branch:
    """A layer over another: merged, and what `below` says in another way than `above` does (`Section.alternatives`:
    so many epochs, so many steps) gives way, remembered as what it hides.
    """
    return _settled(merge(below, above), above, schema)


def _settled(merged: Branch, above: Branch, schema: type[BaseModel]) -> Branch:
    children = dict(merged.children)
    for name, info in schema.model_fields.items():
        section, node, over = section_of(info.annotation), children.get(name), above.children.get(name)
        if section is not None and isinstance(node, Branch) and isinstance(over, Branch):
            children[name] = _settled(node, over, section)
    names = schema.alternatives if issubclass(schema, Section) else ()
    given = [name for name in names if isinstance(leaf := above.children.get(name), Leaf) and leaf.value is not None]
    for name in names:
        # One that has a default of its own gives way by itself, and stays as it was written.
        gives_way = schema.model_fields[name].default is None
        if given and gives_way and name not in above.children and isinstance(gone := children.pop(name, None), Leaf):
            leaf = children[given[0]]
            assert isinstance(leaf, Leaf)
            children[given[0]] = replace(leaf, hides=(*leaf.hides, gone.origin, *gone.hides))
    return Branch(children, merged.origin)


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ConfigError("is a folder, not a configuration file", where=str(path), hint="Name a .yaml file in it")
        if size > MAX_FILE_BYTES:
            raise ConfigError(f"holds {size:,} bytes: too many for a configuration", where=str(path))
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), hint=_nearby(path)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"not UTF-8 (byte {error.object[error.start]:#04x})", where=f"{path}:{line}", hint="Save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    like = close(path.name, names, cutoff=0.5)
    if like:
        return f"Did you mean {folder / like}?"
    shown = "The working directory" if folder == Path() else str(folder)
    return f"{shown} holds {', '.join(names[:5])}" if names else f"{shown} holds no .yaml file"


def _parent_names(parents: Node | None) -> list[str]:
    if parents is None:
        return []
    value = parents.value if isinstance(parents, Leaf) else None
    listed = value if isinstance(value, list) else [value]
    names = [name for name in listed if isinstance(name, str) and name]
    if len(names) < len(listed):
        raise ConfigError(
            "inherits takes a profile, a path, or a list of these",
            where=parents.origin.place,
            hint=f"Profiles: {', '.join(profile_names())}",
        )
    return names


def _parent_path(name: str, origin: Origin, child: Path) -> Path:
    if name in profile_names():
        return PROFILE_FOLDER / f"{name}.yaml"
    parent = Path(os.path.normpath(child.parent / Path(name).expanduser()))
    if parent.is_file():
        return parent
    like = close(name, profile_names())
    hint = f"Did you mean the profile {like}?" if like and "/" not in name else _nearby(parent)
    raise ConfigError(f"inherits {name}, and there is no file {parent}", where=origin.place, hint=hint)


def _section(key: str, node: Node, schema: type[BaseModel]) -> Node:
    """`training:` with nothing below it is a section that sets nothing; a written-out null stays null.

    `model: NAME` is short for `model: {name: NAME}`, and for any other section that has a name.
    """
    if isinstance(node, Leaf) and node.text == "" and key in schema_sections(schema):
        return Branch({}, node.origin)
    return Branch({"name": node}, node.origin) if _is_name(key, node, schema) else node


def _is_name(key: str, node: Node, schema: type[BaseModel]) -> bool:
    """Whether a plain text stands where a section with a name is expected."""
    is_plain = isinstance(node, Leaf) and isinstance(node.value, str | int | float) and not isinstance(node.value, bool)
    return is_plain and f"{key}.name" in schema_fields(schema)


def read_environment(environ: Mapping[str, str], schema: type[BaseModel]) -> tuple[Branch, list[str]]:
    """Fields set as SECTION_FIELD or FOUNDRY_FIELD, and warnings about names that nearly are."""
    by_variable = {spec.variable: spec for spec in schema_fields(schema).values()}
    tree, warnings = Branch(), []
    for name in sorted(environ):
        spec = by_variable.get(name)
        if spec is None:
            meant = _variable_like(name, schema, list(by_variable))
            if meant:
                warnings.append(f"environment variable {name} sets nothing; did you mean {meant}?")
        elif not environ[name].strip():
            warnings.append(f"environment variable {name} is empty and sets nothing")
        else:
            origin = Origin("environment", name)
            node = read_value(environ[name], origin, text_only=spec.text_only)
            tree = merge(tree, nested(tuple(spec.path.split(".")), node, origin))
    return tree, warnings


def _variable_like(name: str, schema: type[BaseModel], known: Sequence[str]) -> str | None:
    for section in [*(path.upper() for path in schema_sections(schema)), "FOUNDRY"]:
        prefix, word = f"{section}_", name.removeprefix(f"{section}_")
        if word == name:
            continue
        names = [variable.removeprefix(prefix) for variable in known if variable.startswith(prefix)]
        alias = ALIASES.get(word.lower(), "").upper()
        like = alias if alias in names else close(word, names, cutoff=0.8)
        if like:
            return f"{prefix}{like}"
    return None


_OVERRIDE = re.compile(r"([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)=(.*)", re.DOTALL)


def is_override(argument: str) -> bool:
    """True for `key=value` with a dotted key; a path that holds `=` after a slash isn't one."""
    return _OVERRIDE.fullmatch(argument) is not None


def read_overrides(overrides: Sequence[str], schema: type[BaseModel]) -> tuple[Branch, list[str]]:
    """`key=value` arguments, the last one winning, and warnings about keys given twice.

    Raises:
        UsageError: an argument that isn't `key=value`.
    """
    fields, tree, warnings = schema_fields(schema), Branch(), []
    for argument in overrides:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            raise UsageError(f"'{argument}' is not key=value", hint="For example training.learning_rate=5e-5")
        key, text = match.groups()
        origin = Origin("override", _shown(argument))
        node = read_value(text, origin, text_only=key in fields and fields[key].text_only)
        path = (*key.split("."), "name") if _is_name(key, node, schema) else tuple(key.split("."))
        before = find(tree, path)
        if isinstance(before, Leaf) and isinstance(node, Leaf):
            warnings.append(f"override {before.origin.name} gives way to {origin.name}")
        tree = merge(tree, nested(path, node, origin))
    return tree, warnings


def _shown(argument: str) -> str:
    text = argument.replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:80]}…"
