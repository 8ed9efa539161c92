"""A corpus of code: folders and a language in, units out, one file in memory at a time, everything left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from model_foundry.data.code.extract import FileUnits, extract_units
from model_foundry.data.code.languages import Language, check_kinds, find_language, load_grammar
from model_foundry.data.code.units import CodeUnit, Skipped, UnitRules
from model_foundry.data.code.walk import MAX_FILE_BYTES, FileRules, SourceFile, list_files, read_source

OnProgress = Callable[[int, int, int], None]
"""Called after every file: bytes done, bytes in all, units so far."""


class Corpus:
    """The units of some folders. Every reading of `units` goes through the files again, in the same order.

    The counts are those of the last complete reading; asked for before any, they make one.

    Raises:
        DataError: a root that is not there, a glob or a kind that means nothing.
        MissingExtraError: the grammar is not installed.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        language: str | Language,
        *,
        files: FileRules | None = None,
        rules: UnitRules | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.roots = tuple(Path(root) for root in roots)
        self.language = find_language(language)
        marks = self.language.doc_prefixes + self.language.line_prefixes
        self._files = replace(files or FileRules(()), suffixes=self.language.suffixes)
        if marks:
            self._files = replace(self._files, comment_marks=marks)
        self._rules = rules or UnitRules()
        self._on_progress = on_progress
        self._counts: CorpusCounts | None = None
        check_kinds(self.language, self._rules.kinds)

    @property
    def units(self) -> Iterator[CodeUnit]:
        """The units, by file and line."""
        return self._read()

    @property
    def counts(self) -> CorpusCounts:
        """What the last complete reading met."""
        if self._counts is None:
            for _ in self._read():
                pass
        assert self._counts is not None
        return self._counts

    @property
    def num_files(self) -> int:
        """Files that were read."""
        return self.counts.num_files

    @property
    def skipped(self) -> Mapping[str, int]:
        """Files and units left out, by reason, most frequent first."""
        return {**self.counts.skipped_files.counts, **self.counts.skipped_units.counts}

    @property
    def examples(self) -> Mapping[str, list[str]]:
        """The first files and units of each reason."""
        return {**self.counts.skipped_files.examples, **self.counts.skipped_units.examples}

    def _read(self) -> Iterator[CodeUnit]:
        grammar = load_grammar(self.language)
        counts = CorpusCounts()
        seen: set[bytes] = set()
        num_all_bytes = self._total_bytes() if self._on_progress else 0
        num_done_bytes = 0
        for file in list_files(self.roots, self._files, counts.skipped_files):
            num_done_bytes += file.num_bytes
            found = self._read_file(file, counts)
            if found is not None:
                result = extract_units(
                    found, path=file.name, grammar=grammar, rules=self._rules, skipped=counts.skipped_units, seen=seen
                )
                yield from counts.add_file(file, result, self.language)
            if self._on_progress is not None:
                self._on_progress(num_done_bytes, num_all_bytes, counts.num_units)
        self._counts = counts

    def _read_file(self, file: SourceFile, counts: CorpusCounts) -> str | None:
        source = read_source(file, self._files)
        if isinstance(source, str):
            counts.skipped_files.add(source, file.name)
            return None
        counts.encodings[source.encoding] += 1
        return source.text

    def _total_bytes(self) -> int:
        return sum(file.num_bytes for file in list_files(self.roots, self._files, Skipped()))


class CorpusCounts:
    """What one reading of a corpus met."""

    def __init__(self) -> None:
        self.num_files = 0
        self.num_bytes = 0
        self.num_error_files = 0
        self.num_units = 0
        self.num_unit_bytes = 0
        self.num_commented = 0
        self.kinds: Counter[str] = Counter()
        self.encodings: Counter[str] = Counter()
        self.skipped_files = Skipped()
        self.skipped_units = Skipped()

    def add_file(self, file: SourceFile, result: FileUnits | None, language: Language) -> Iterator[CodeUnit]:
        """Count a file that was read, and pass on its units."""
        if result is None:
            self.skipped_files.add(f"does not read as {language.name}", file.name)
            return
        self.num_files += 1
        self.num_bytes += file.num_bytes
        self.num_error_files += result.has_error
        for unit in result.units:
            self.num_units += 1
            self.num_unit_bytes += len(unit.code.encode())
            self.num_commented += bool(unit.comment)
            self.kinds[unit.kind] += 1
            yield unit


def read_corpus(
    roots: Sequence[Path],
    language: str | Language,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    skip_generated: bool = True,
    rules: UnitRules | None = None,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """The units of the files below `roots`.

    Args:
        roots: folders, or single files.
        include, exclude: globs over the path below the root (`walk.glob_pattern`).
        max_file_bytes: larger files are counted and left out.
        rules: which units are taken; default: all.
        on_progress: called after every file with bytes done, bytes in all and units so far.

    Raises:
        DataError: a root that is not there, an unknown language or kind, a glob or a query that means nothing.
        MissingExtraError: tree-sitter or the grammar is not installed.
    """
    language = find_language(language)
    files = FileRules(
        suffixes=language.suffixes,
        include=tuple(include),
        exclude=tuple(exclude),
        max_file_bytes=max_file_bytes,
        skip_generated=skip_generated,
    )
    return Corpus(roots, language, files=files, rules=rules, on_progress=on_progress)
