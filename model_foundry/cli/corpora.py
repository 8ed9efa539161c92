"""A corpus of code from what a configuration says of it, for the verbs that read one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model_foundry.errors import DataError

if TYPE_CHECKING:
    from model_foundry.config.corpus import CorpusSection, GrammarSection
    from model_foundry.data.code import Corpus, Language
    from model_foundry.data.code.corpus import OnProgress


def open_corpus(corpus: CorpusSection, *, roots: Sequence[Path] = (), on_progress: OnProgress | None = None) -> Corpus:
    """The corpus of a configuration, not read yet.

    Args:
        roots: folders to read in the place of the configuration's.

    Raises:
        DataError: no folder, or one that is not there; a kind, a glob or a query that means nothing.
        MissingExtraError: the grammar is not installed.
    """
    from model_foundry.data.code import UnitRules, read_corpus

    folders = tuple(roots) or corpus.roots
    if not folders:
        raise DataError("no folder of code is named", hint="Give folders, or set corpus.roots=[FOLDER]")
    rules = UnitRules(
        kinds=corpus.kinds,
        comments=corpus.comments,
        require_comment=corpus.require_comment,
        min_lines=corpus.min_lines,
        max_lines=corpus.max_lines,
        max_chars=corpus.max_chars,
        skip_duplicates=corpus.skip_duplicates,
    )
    return read_corpus(
        [folder.expanduser() for folder in folders],
        open_language(corpus.language, corpus.grammar),
        include=corpus.include,
        exclude=corpus.exclude,
        max_file_bytes=corpus.max_file_bytes,
        skip_generated=corpus.skip_generated,
        rules=rules,
        on_progress=on_progress,
    )


def open_language(name: str, grammar: GrammarSection) -> Language:
    """The language of a configuration: built in, changed by what it gives, or described there altogether."""
    from model_foundry.data.code import make_language

    return make_language(
        name,
        units=grammar.units,
        package=grammar.package,
        suffixes=grammar.suffixes,
        contexts=grammar.contexts,
        comment_nodes=grammar.comment_nodes,
        leading_nodes=grammar.leading_nodes,
        doc_prefixes=grammar.doc_prefixes,
        line_prefixes=grammar.line_prefixes,
        block_comment=grammar.block_comment,
        long_text=grammar.long_text,
        callback_names=grammar.callback_names,
        declarations=grammar.declarations,
        restarts=grammar.restarts,
        fragments=grammar.fragments,
    )
