"""`foundry data extract CONFIG | FOLDER...`: the units of a corpus of code as JSON Lines, and what was left out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model_foundry.errors import DataError, UsageError

if TYPE_CHECKING:
    from model_foundry.config.corpus import CorpusSection
    from model_foundry.data.code import Corpus
    from model_foundry.data.code.corpus import OnProgress

SECONDS_BETWEEN_LINES = 5.0
NUM_EXAMPLES = 2


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [FOLDER]... [KEY=VALUE]...")
@click.option("--language", metavar="NAME", help="The language; without it and a CONFIG, that of the files found.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the units here, one a line.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(arguments: tuple[str, ...], language: str | None, out: Path | None, as_json: bool) -> None:
    """Take functions, methods, callbacks and signals out of folders of code, with their comments.

    CONFIG is a domain (configs/domains/*.yaml), FOLDER a folder or file in the place of its corpus.roots. Every file
    and unit that is left out is counted with its reason.
    """
    from model_foundry.cli.corpora import open_corpus

    section, roots = _arguments(arguments, language)
    start = time.monotonic()
    corpus = open_corpus(section, roots=roots, on_progress=_progress())
    _write(corpus, out)
    facts = _facts(corpus, section, out, seconds=time.monotonic() - start)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for line in _lines(facts):
        click.echo(line)


def _arguments(arguments: Sequence[str], language: str | None) -> tuple[CorpusSection, list[Path]]:
    """The corpus section and the folders that go before its own."""
    from model_foundry.cli.arguments import load_command_config, split_arguments, warn
    from model_foundry.config.generate import GenerateConfig

    names, overrides = split_arguments(arguments)
    configs = [name for name in names if Path(name).suffix in (".yaml", ".yml")]
    roots = [Path(name).expanduser() for name in names if name not in configs]
    if not configs and not roots and not any(item.startswith("corpus.roots=") for item in overrides):
        raise UsageError(
            "no CONFIG and no FOLDER is given", hint="For example: foundry data extract src/ --out units.jsonl"
        )
    says_language = configs or any(item.startswith("corpus.language=") for item in overrides)
    if language is None and not says_language and roots:
        language = _language_of(roots)
    overrides += [] if language is None else [f"corpus.language={language}"]
    resolved = load_command_config(GenerateConfig, [*configs, *overrides], os.environ)
    warn(resolved)
    return resolved.config.corpus, roots


def _language_of(roots: Sequence[Path]) -> str:
    """The built-in language that has files below `roots`.

    Raises:
        UsageError: none has, or several have.
    """
    from model_foundry.data.code.languages import LANGUAGES
    from model_foundry.data.code.units import Skipped
    from model_foundry.data.code.walk import FileRules, list_files

    found = {
        name: sum(1 for _ in list_files(roots, FileRules(language.suffixes), Skipped()))
        for name, language in LANGUAGES.items()
    }
    present = [name for name, count in found.items() if count]
    if len(present) == 1:
        return present[0]
    places = ", ".join(map(str, roots))
    if not present:
        raise UsageError(
            f"there is no file of {' or '.join(LANGUAGES)}", where=places, hint="Give other folders or a CONFIG"
        )
    counts = ", ".join(f"{found[name]:,} files of {name}" for name in present)
    raise UsageError(f"there are {counts}", where=places, hint=f"Choose one with --language {present[0]}")


def _write(corpus: Corpus, out: Path | None) -> None:
    """Read the corpus, and write its units to `out` if there is one: all of them or nothing."""
    from dataclasses import asdict

    import orjson

    with _output(out) as write:
        for unit in corpus.units:
            write(orjson.dumps(asdict(unit)) + b"\n")
        # Inside, so that nothing is put in the place of units that an earlier reading found.
        if not corpus.counts.num_units:
            _refuse_empty(corpus)


def _refuse_empty(corpus: Corpus) -> None:
    counts, name = corpus.counts, corpus.language.name
    what = f"no unit of {name} meets the rules" if counts.num_files else f"no {name} file could be read"
    reasons = {**counts.skipped_files.counts, **counts.skipped_units.counts}
    left_out = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.items())
    raise DataError(
        what + (f" (left out {left_out})" if left_out else ""),
        where=", ".join(map(str, corpus.roots)),
        hint=f"Give folders with {' or '.join(corpus.language.suffixes)} files, another --language, or wider rules",
    )


@contextmanager
def _output(out: Path | None) -> Iterator[Any]:
    from model_foundry.checkpoint.atomic import atomic_file

    if out is None:
        yield lambda line: None
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            yield file.write
    except OSError as error:
        raise DataError(f"the file cannot be written: {error.strerror}", where=str(out)) from error


def _facts(corpus: Corpus, section: CorpusSection, out: Path | None, *, seconds: float) -> dict[str, Any]:
    counts = corpus.counts
    return {
        "language": corpus.language.name,
        "about": section.about,
        "num_concepts": len(section.concepts),
        "roots": [str(root) for root in corpus.roots],
        "out": None if out is None else str(out),
        "num_files": counts.num_files,
        "num_bytes": counts.num_bytes,
        "num_error_files": counts.num_error_files,
        "encodings": dict(counts.encodings),
        "num_units": counts.num_units,
        "num_unit_bytes": counts.num_unit_bytes,
        "num_commented": counts.num_commented,
        "kinds": dict(counts.kinds.most_common()),
        "skipped_files": dict(counts.skipped_files.counts),
        "skipped_units": dict(counts.skipped_units.counts),
        "examples": dict(corpus.examples),
        "seconds": round(seconds, 3),
    }


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The table that a person reads."""
    about = f": {facts['about']}" if facts["about"] else ""
    concepts = f", {facts['num_concepts']} concepts" if facts["num_concepts"] else ""
    yield f"{facts['language']}{about}{concepts}"
    num_files, errors = facts["num_files"], facts["num_error_files"]
    seconds = max(facts["seconds"], 1e-3)
    yield f"files        {num_files:,} read, {facts['num_bytes'] / 1e6:.2f} MB in {seconds:.1f} s"
    yield f"             {errors:,} with syntax errors ({errors / num_files:.1%})"
    encodings = {name: count for name, count in facts["encodings"].items() if name != "utf-8"}
    if encodings:
        yield "encodings    " + ", ".join(f"{name} {count:,}" for name, count in encodings.items()) + ", the rest utf-8"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in facts["kinds"].items())
    yield f"units        {facts['num_units']:,}{f': {kinds}' if kinds else ''}"
    yield f"             {facts['num_unit_bytes'] / 1e6:.2f} MB, {facts['num_commented']:,} with a comment"
    for what in ("files", "units"):
        for reason, count in facts[f"skipped_{what}"].items():
            examples = ", ".join(facts["examples"][reason][:NUM_EXAMPLES])
            yield f"left out     {count:,} {what}: {reason} (as {examples})"
    if facts["out"] is not None:
        yield f"written to   {facts['out']}"


def _progress() -> OnProgress:
    """Says on stderr how far the reading is: a changing line on a terminal, a line every few seconds elsewhere."""
    from model_foundry.run.progress import duration

    start = said = time.monotonic()
    is_terminal = sys.stderr.isatty()
    pause = 0.2 if is_terminal else SECONDS_BETWEEN_LINES

    def progress(num_bytes: int, num_all_bytes: int, num_units: int) -> None:
        nonlocal said
        now, is_last = time.monotonic(), num_bytes >= num_all_bytes
        if now - said < pause and not (is_last and is_terminal and said > start):
            return
        said = now
        rate = num_bytes / (now - start)
        left = "" if is_last else f", {duration((num_all_bytes - num_bytes) / rate)} left"
        text = (
            f"{num_bytes / 1e6:.1f} of {num_all_bytes / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {num_units:,} units{left}"
        )
        line = f"\r\x1b[K{text}" if is_terminal else text
        click.echo(line, err=True, nl=is_last or not is_terminal)

    return progress
