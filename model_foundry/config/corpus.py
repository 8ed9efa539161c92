"""The section of a configuration that says which code to read: a language, folders, and what of them counts.

A domain (`configs/domains/*.yaml`) is such a section and the words its prompts need; a new domain is a new YAML file.
Knows nothing of grammars or files: names, globs and bounds only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.section import CodePath, PositiveInt, Section, broken_rule

BUILT_IN_LANGUAGES = ("lua", "gdscript")


class GrammarSection(Section):
    """How a language is read. For a built-in one, what is given here is added or replaces; for another, all of it."""

    package: str | None = None
    """Importable package of a tree-sitter grammar, for example tree_sitter_lua."""
    suffixes: tuple[str, ...] = ()
    """Endings of the language's files, for example .lua."""
    units: Mapping[str, str] = Field(default_factory=dict)
    """Kind of unit -> tree-sitter query in which @unit marks the code and @name its name."""
    contexts: str | None = None
    """Query in which @context marks what units stand in (a class) and @name its name."""
    comment_nodes: tuple[str, ...] = ()
    """Node types of comments."""
    doc_prefixes: tuple[str, ...] = ()
    """What a line of a doc comment starts with, for example ---."""
    line_prefixes: tuple[str, ...] = ()
    """What a line of an ordinary comment starts with, for example --."""
    block_comment: str | None = None
    """Regular expression of a whole block comment; its group `text` is what the comment says."""
    long_text: str | None = None
    """Regular expression of strings and comments over several lines."""
    leading_nodes: tuple[str, ...] = ()
    """Node types that stand between a comment and its unit and belong to the unit (annotations)."""
    callback_names: str | None = None
    """Regular expression over a unit's last name; functions that it matches are callbacks."""
    declarations: tuple[str, ...] = ()
    """Kinds that are one line by nature; corpus.min_lines is not asked of them."""
    restarts: str | None = None
    """Regular expression of what, at the beginning of a line, can only begin something new at the top level."""
    fragments: tuple[str, ...] = ()
    """Programs in which {code} may stand so that a fragment is checked as one, tried in order after the code alone."""


class CorpusSection(Section):
    language: str = "lua"
    """lua, gdscript, or another name that corpus.grammar describes."""
    about: str = ""
    """One line on what this code is for; prompts quote it."""
    concepts: Mapping[str, str] = Field(default_factory=dict)
    """The domain's words -> one line on each; prompts explain the code with them."""
    roots: tuple[CodePath, ...] = ()
    """Folders or files to read."""
    include: tuple[str, ...] = ()
    """Read only files whose path below their root matches one of these globs; none: every file of the language."""
    exclude: tuple[str, ...] = ()
    """Leave out files whose path below their root matches one of these globs."""
    kinds: tuple[str, ...] = ()
    """Kinds of unit to take (lua: function, method, callback; gdscript: signal too); none: every kind."""
    comments: tuple[Literal["doc", "line", "block"], ...] = ("doc", "line", "block")
    """Which comments before a unit are its documentation: doc (--- or ##), line (-- or #), block (--[[ ]])."""
    require_comment: bool = False
    """Leave out units that have no comment."""
    min_lines: PositiveInt = 3
    """Shortest unit in lines; declarations of one line (signals) are exempt."""
    max_lines: PositiveInt = 200
    """Longest unit in lines; of a longer one, the units inside it are taken."""
    max_chars: PositiveInt = 12_000
    """Longest unit in characters."""
    max_file_bytes: PositiveInt = 1_000_000
    """Largest file that is read."""
    skip_generated: bool = True
    """Leave out files that say they are generated, and minified ones."""
    skip_duplicates: bool = True
    """Take the same code once."""
    grammar: GrammarSection = GrammarSection()
    """How the language is read, where it is not built in or reads differently."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.max_lines < self.min_lines:
            raise broken_rule("max_lines", f"corpus.max_lines {self.max_lines} is less than min_lines {self.min_lines}")
        if self.language in BUILT_IN_LANGUAGES:
            return self
        missing = [name for name in ("package", "suffixes", "units") if not getattr(self.grammar, name)]
        if missing:
            known = ", ".join(BUILT_IN_LANGUAGES)
            fields = ", ".join(f"corpus.grammar.{name}" for name in missing)
            raise broken_rule("language", f"the language {self.language} is not built in ({known}): give {fields}")
        return self
