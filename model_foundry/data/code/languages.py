"""A language is data: a grammar package, and tree-sitter queries that say what its units, contexts and comments are.

Adding one here, or in a domain's YAML under `corpus.grammar`, needs no other change. Knows nothing of files.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from model_foundry.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import tree_sitter

    Captures = dict[str, list[tree_sitter.Node]]

MAX_DEPTH = 256
MAX_OPEN_MATCHES = 4096
TRIED_BYTES = 32_768
BYTES_PER_ERROR = 100
MIN_ERRORS = 20
CONTEXTS, COMMENTS, ERRORS = "contexts", "comment nodes", "errors"


@dataclass(frozen=True, slots=True)
class Language:
    """How a language's files are read.

    Attributes:
        package: importable package of the grammar, with a function `language`.
        suffixes: endings of its files, lower case.
        units: (kind, query) pairs. `@unit` marks the code, `@name` its name. Of two matches with one name the longer
            counts, of two with one place the earlier pair; units inside a taken unit are part of it.
        contexts: query; `@context` is what units stand in, its first line is quoted; `@file` is said of every unit.
        comment_nodes: node types of comments.
        leading_nodes: node types that may stand between a comment and its unit and belong to the unit (annotations).
        doc_prefixes, line_prefixes: what a comment's line starts with, doc before ordinary.
        block_comment: pattern of a whole block comment; group `text` is what it says.
        long_text: pattern of strings and comments over several lines (their text is no code).
        callback_names: pattern over a unit's last name; functions that it matches are callbacks.
        declarations: kinds that are one line by nature.
        restarts: pattern of what, at the beginning of a line, can only begin something new at the top level.
        fragments: programs in which {code} may stand to be whole.
        problems: (what it is, query) pairs for faults that the grammar lets pass; `@problem` marks the place.
    """

    name: str
    package: str
    suffixes: tuple[str, ...]
    units: tuple[tuple[str, str], ...]
    contexts: str = ""
    comment_nodes: tuple[str, ...] = ("comment",)
    leading_nodes: tuple[str, ...] = ()
    doc_prefixes: tuple[str, ...] = ()
    line_prefixes: tuple[str, ...] = ()
    block_comment: str = ""
    long_text: str = ""
    callback_names: str = ""
    declarations: tuple[str, ...] = ()
    restarts: str = ""
    fragments: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind that its units can be of."""
        named = [kind for kind, _ in self.units] + (["callback"] if self.callback_names else [])
        return tuple(dict.fromkeys(named))


_REGISTERING = "(^|[.:_])(register|connect|subscribe|listen|hook|bind|on_|add_|add[A-Z]|on[A-Z]|delayed|schedule)"

LUA = Language(
    name="lua",
    package="tree_sitter_lua",
    suffixes=(".lua",),
    units=(
        ("method", "(function_declaration name: (method_index_expression) @name) @unit"),
        ("function", "(function_declaration name: [(identifier) (dot_index_expression)] @name) @unit"),
        (
            "function",
            "(variable_declaration (assignment_statement (variable_list . name: (_) @name .)"
            " (expression_list . value: (function_definition) .))) @unit",
        ),
        (
            "function",
            "(assignment_statement (variable_list . name: (_) @name .)"
            " (expression_list . value: (function_definition) .)) @unit",
        ),
        ("function", "(field name: (_) @name value: (function_definition)) @unit"),
        ("function", "(chunk (return_statement (expression_list . (function_definition) .)) @unit)"),
        # registerCallback("onDestroyed", function() … end)
        (
            "callback",
            "(function_call arguments: (arguments . (string content: (_) @name) (function_definition))) @unit",
        ),
        # core.register_on_joinplayer(function(player) … end)
        (
            "callback",
            "((function_call name: (_) @name arguments: (arguments (function_definition))) @unit"
            f' (#match? @name "{_REGISTERING}"))',
        ),
    ),
    contexts="""
        (variable_declaration (assignment_statement (expression_list . value: (table_constructor) .))) @context
        (assignment_statement (expression_list . value: (table_constructor) .)) @context
        (field name: (_) value: (table_constructor)) @context
        (chunk (comment content: (_) @file (#match? @file "^ *namespace +[A-Za-z_]")))
    """,
    doc_prefixes=("---", "--!"),
    line_prefixes=("--",),
    block_comment=r"--\[(?P<level>=*)\[(?P<text>.*?)\](?P=level)\]",
    long_text=r"\[(?P<depth>=*)\[.*?\](?P=depth)\]",
    callback_names="on[A-Z_]\\w*",
    restarts=r"^(?:(?:local\s+)?function\b|(?:local\s+)?[A-Za-z_][\w.]*\s*=\s*function\b)",
    fragments=("return {code}", "return { {code} }"),
    problems=(
        (
            "a keyword where a name belongs",
            '((identifier) @problem (#match? @problem "^(and|break|do|else|elseif|end|for|function|if|in|local|not|or'
            '|repeat|return|then|until|while)$"))',
        ),
    ),
)

_GODOT_VIRTUALS = (
    "ready|process|physics_process|enter_tree|exit_tree|input|unhandled_input|unhandled_key_input|shortcut_input"
    "|gui_input|notification|draw|get_property_list|validate_property|property_can_revert|property_get_revert"
    "|get_configuration_warnings?|integrate_forces|run|initialize|finalize|iteration|idle|to_string|get|set"
    "|can_drop_data|drop_data|get_drag_data|make_custom_tooltip|mouse_enter|mouse_exit|input_event"
)

GDSCRIPT = Language(
    name="gdscript",
    package="tree_sitter_gdscript",
    suffixes=(".gd",),
    units=(
        ("signal", "(signal_statement name: (_) @name) @unit"),
        ("method", "(class_body (function_definition name: (_) @name) @unit)"),
        ("method", '(class_body (constructor_definition "_init" @name) @unit)'),
        ("function", "(function_definition name: (_) @name) @unit"),
        ("function", '(constructor_definition "_init" @name) @unit'),
    ),
    contexts="""
        (class_definition) @context
        (source (class_name_statement) @file)
        (source (extends_statement) @file)
    """,
    leading_nodes=("annotation", "annotations"),
    doc_prefixes=("##",),
    line_prefixes=("#",),
    long_text=r'"""(?:[^\\]|\\.)*?"""',
    callback_names=f"_on_\\w+|_({_GODOT_VIRTUALS})",
    declarations=("signal",),
    restarts=r"^(?:(?:static|remote|remotesync|master|puppet)\s+)?func\b|^(?:class|signal)\b|^@",
    problems=(
        ("a body with nothing in it", '((body) @problem (#match? @problem "^\\\\s*$"))'),
        (
            "a keyword where a name belongs",
            '([(identifier) (name)] @problem (#match? @problem "^(and|break|const|continue|elif|else|for|func|if|in|not'
            '|or|pass|return|var|while)$"))',
        ),
    ),
)

LANGUAGES: dict[str, Language] = {"lua": LUA, "gdscript": GDSCRIPT}
"""The languages that are built in, by name."""


def find_language(name: str | Language) -> Language:
    """The language of that name.

    Raises:
        DataError: there is none.
    """
    if isinstance(name, Language):
        return name
    if name not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise DataError(f"there is no language {name!r}", hint=f"Choose {known}, or describe it under corpus.grammar")
    return LANGUAGES[name]


def make_language(name: str, *, units: Mapping[str, str] | None = None, **given: Any) -> Language:
    """A language from a name and what a YAML file says of it; a built-in one is changed only where something is given.

    Args:
        units: kind -> query. For a built-in language these come before its own.

    Raises:
        DataError: a new language without package, suffixes or units.
    """
    given = {key: value for key, value in given.items() if value}
    added = tuple((units or {}).items())
    if name in LANGUAGES:
        built_in = LANGUAGES[name]
        return replace(built_in, units=(*added, *built_in.units), **given)
    if not added or not {"package", "suffixes"} <= given.keys():
        raise DataError(f"the language {name!r} is not built in: it needs a package, suffixes and units")
    return Language(name=name, units=added, **given)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language ready for use: its grammar loaded, its queries compiled into one, so that a tree is walked once.

    Attributes:
        roles: for each pattern of `query`: a kind of unit, or one of CONTEXTS, COMMENTS, ERRORS.
        problems: what it is -> query, asked only where code is judged.
    """

    language: Language
    parser_language: tree_sitter.Language
    query: tree_sitter.Query
    roles: tuple[str, ...]
    problems: tuple[tuple[str, tree_sitter.Query], ...]
    block_comment: re.Pattern[str] | None
    long_text: re.Pattern[str] | None
    restarts: re.Pattern[str] | None
    callback_names: re.Pattern[str] | None

    def parse(self, data: bytes) -> Parsed:
        """The tree of UTF-8 source, whatever it is. Slow where nothing is code: ask `reads_as_code` first."""
        import tree_sitter

        root = tree_sitter.Parser(self.parser_language).parse(data).root_node
        found = [Match(index, self.roles[index], captures) for index, captures in _matches(self.query, root)]
        num_errors = sum(match.role == ERRORS for match in found)
        is_code = num_errors <= max(MIN_ERRORS, len(data) // BYTES_PER_ERROR)
        return Parsed(root, found, is_code)

    def first_problem(self, root: tree_sitter.Node) -> tuple[int, str] | None:
        """(line, what it is) of the first fault that the grammar lets pass."""
        return min(
            (
                (node.start_point[0] + 1, what)
                for what, query in self.problems
                for _, captures in _matches(query, root)
                for node in captures["problem"]
            ),
            default=None,
        )

    def reads_as_code(self, text: str) -> bool:
        """False where the grammar stumbles more than once in 100 bytes, as over prose or another language.

        Its recovery takes time quadratic in such text, so a long text is tried by its beginning first; then without its
        long strings, in which the beginning may be cut.
        """
        if self._begins_as_code(text.encode()):
            return True
        rest = text if self.long_text is None else self.long_text.sub("", text)
        return rest != text and self._begins_as_code(rest.encode())

    def _begins_as_code(self, data: bytes) -> bool:
        num_bytes = TRIED_BYTES
        while num_bytes < len(data):
            if not self.parse(data[: data.rfind(b"\n", 0, num_bytes) + 1 or num_bytes]).is_code:
                return False
            num_bytes *= 4
        return len(data) > TRIED_BYTES or self.parse(data).is_code


def _matches(query: tree_sitter.Query, root: tree_sitter.Node) -> list[tuple[int, Captures]]:
    import tree_sitter

    # Both bounds keep the time linear where a file nests a hundred thousand deep.
    cursor = tree_sitter.QueryCursor(query, match_limit=MAX_OPEN_MATCHES)
    cursor.set_max_start_depth(MAX_DEPTH)
    return cursor.matches(root)


class Match(NamedTuple):
    """A pattern of the query by its number and its role, and the nodes that it names."""

    index: int
    role: str
    captures: Captures


@dataclass(frozen=True, slots=True)
class Parsed:
    """A tree and what the queries found in it.

    Attributes:
        matches: those that begin at most `MAX_DEPTH` nodes deep.
        is_code: whether the grammar's errors are few enough.
    """

    root: tree_sitter.Node
    matches: list[Match]
    is_code: bool


@lru_cache(maxsize=16)
def load_grammar(language: Language) -> Grammar:
    """Import the grammar and compile the queries.

    Raises:
        MissingExtraError: tree-sitter or the built-in language's grammar is not installed.
        DataError: a grammar package that is none, a query or a pattern that cannot be read.
    """
    parser_language = _import_grammar(language)
    comments = " ".join(f"({kind})" for kind in language.comment_nodes + language.leading_nodes)
    parts = [*language.units]
    parts += [(CONTEXTS, language.contexts)] if language.contexts else []
    parts += [(COMMENTS, f"[{comments}] @comment")] if comments else []
    parts.append((ERRORS, "(ERROR) @error"))
    roles: list[str] = []
    for role, text in parts:
        roles += [role] * _query(language, parser_language, role, text).pattern_count
    return Grammar(
        language=language,
        parser_language=parser_language,
        query=_query(language, parser_language, "queries", "\n".join(text for _, text in parts)),
        roles=tuple(roles),
        problems=tuple((what, _query(language, parser_language, what, text)) for what, text in language.problems),
        block_comment=_pattern(language, "block_comment", language.block_comment, re.DOTALL),
        long_text=_pattern(language, "long_text", language.long_text, re.DOTALL),
        restarts=_pattern(language, "restarts", language.restarts, re.MULTILINE),
        callback_names=_pattern(language, "callback_names", language.callback_names),
    )


def _import_grammar(language: Language) -> tree_sitter.Language:
    try:
        import tree_sitter
    except ImportError as error:
        raise MissingExtraError("tree-sitter", "code") from error
    try:
        module = importlib.import_module(language.package)
    except ImportError as error:
        if language.name in LANGUAGES and LANGUAGES[language.name].package == language.package:
            raise MissingExtraError(language.package.replace("_", "-"), "code") from error
        hint = f"Install it with: pip install {language.package.replace('_', '-')}"
        raise DataError(f"the grammar {language.package} cannot be imported: {error}", hint=hint) from error
    try:
        return tree_sitter.Language(module.language())
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"the package {language.package} holds no usable tree-sitter grammar: {error}") from error


def _query(language: Language, grammar: tree_sitter.Language, field: str, text: str) -> tree_sitter.Query:
    import tree_sitter

    try:
        return tree_sitter.Query(grammar, text)
    except (tree_sitter.QueryError, ValueError) as error:
        where = f"corpus.grammar of {language.name}, {field}"
        raise DataError(f"the query cannot be read: {error}", where=where) from error


def _pattern(language: Language, field: str, text: str, flags: int = 0) -> re.Pattern[str] | None:
    try:
        return re.compile(text, flags) if text else None
    except re.error as error:
        raise DataError(f"the pattern cannot be read: {error}", where=f"{language.name}, {field}") from error


def check_kinds(language: Language, kinds: Sequence[str]) -> None:
    """Raises: DataError naming a kind that the language does not have."""
    unknown = [kind for kind in kinds if kind not in language.kinds]
    if unknown:
        known = ", ".join(language.kinds)
        raise DataError(f"{language.name} has no units of kind {', '.join(unknown)}", hint=f"Its kinds are {known}")
