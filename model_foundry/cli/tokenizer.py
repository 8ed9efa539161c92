"""`foundry tokenizer train` and `foundry tokenizer report`: make a vocabulary, and say how well one fits a text."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model_foundry.errors import DataError, TemplateError, UnsafeTemplateError, UsageError

if TYPE_CHECKING:
    from model_foundry.data.formats import Parsed
    from model_foundry.tokenizer.quality import HeldOut, Quality
    from model_foundry.tokenizer.special import SpecialTokens
    from model_foundry.tokenizer.training import Progress, TrainedTokenizer

SECONDS_BETWEEN_LINES = 5.0
NUM_LONGEST_SHOWN = 5
_NO_SIZE_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".parquet")  # whose size says little about the text in them

_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Question"),),
    (("user", "Question"), ("assistant", "Answer")),
    (("system", "System"), ("user", "Question"), ("assistant", "Answer"), ("user", "Question")),
    (("user", "Question"), ("assistant", "Answer"), ("tool", "Result"), ("assistant", "Answer")),
)


@click.group()
def command() -> None:
    """Train a vocabulary, and report how well one fits."""


# -- train -------------------------------------------------------------------------------------------------------------


@command.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE|FOLDER...", type=click.Path(path_type=Path))
@click.option("--vocab-size", type=int, required=True, metavar="N", help="Tokens in all, special ones and bytes too.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The folder to write.")
@click.option("--template", metavar="NAME|FILE", help="chatml, llama3, alpaca or a .jinja file, to be saved with it.")
@click.option("--round-to", type=int, default=1, metavar="64|128", help="Round the size up to a multiple of this.")
@click.option("--special", "extra", multiple=True, metavar="TOKEN", help="One more special token; may be repeated.")
@click.option("--allow-plain", is_flag=True, help="Tags of the template that no --special names are plain text.")
@click.option("--min-frequency", type=int, default=2, metavar="N", help="Merge only pairs seen so often. Default: 2.")
@click.option("--max-length", type=int, metavar="N", help="The model's context in tokens, to be written down.")
@click.option("--skip-unreadable", is_flag=True, help="Count rows that cannot be read instead of stopping there.")
@click.option("--overwrite", is_flag=True, help="Replace a tokenizer that is in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def train(
    files: tuple[Path, ...], vocab_size: int, out: Path, template: str | None, round_to: int,
    extra: tuple[str, ...], allow_plain: bool, min_frequency: int, max_length: int | None,
    skip_unreadable: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Learn a byte-level BPE vocabulary from files of text or rows.

    The tokens of a chat template are special tokens, with <|endoftext|> and <|pad|>. The folder loads in transformers,
    and its words are cut as llama.cpp cuts them for qwen2, so that it can become GGUF.
    """
    from model_foundry.rendering import Renderer
    from model_foundry.tokenizer.training import train_tokenizer

    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("there is something already", where=str(out), hint="Name another folder, or add --overwrite")
    source, special = _template(template, extra, allow_plain=allow_plain)
    corpus = _Corpus(files, skip_unreadable=skip_unreadable)
    done = train_tokenizer(
        (held_out.text for held_out in corpus),
        vocab_size=vocab_size,
        special=special,
        chat_template=source,
        round_to=round_to,
        min_frequency=min_frequency,
        max_length=max_length,
        on_progress=_progress(corpus),
    )
    Renderer(done.tokenizer)  # a template that does not work with its own tokenizer is found out now
    done.tokenizer.save(out)
    facts = _facts(done, special, corpus, out)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    for line in _lines(facts):
        click.echo(line)


def _template(template: str | None, extra: Sequence[str], *, allow_plain: bool) -> tuple[str | None, SpecialTokens]:
    """The template's source and the special tokens that it and the user ask for."""
    from model_foundry.rendering.builtin_templates import read_template
    from model_foundry.rendering.sandbox import CompiledTemplate
    from model_foundry.tokenizer.special import special_tokens

    if template is None:
        return None, special_tokens(extra=extra)
    found = read_template(template)
    roles = special_tokens(found.source, extra=extra, allow_plain=allow_plain).named
    compiled = CompiledTemplate(found.source, name=found.name, now=datetime.now())
    printed: list[str] = []
    refusal: TemplateError | None = None
    for probe in _PROBES:
        messages = [{"role": role, "content": content} for role, content in probe]
        variables = {**roles, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            printed.append(compiled.render(variables, num_input_chars=1000))
        except UnsafeTemplateError:
            raise
        except TemplateError as error:  # some insist on a system message, or know no tools
            refusal = error
    if not printed and refusal is not None:
        raise refusal
    special = special_tokens(found.source, printed=printed, extra=extra, allow_plain=allow_plain)
    return found.source, special


def _facts(done: TrainedTokenizer, special: SpecialTokens, corpus: _Corpus, out: Path) -> dict[str, Any]:
    return {
        "folder": str(out),
        "vocab_size": done.vocab_size,
        "wanted_size": done.wanted_size,
        "num_special": len(special.tokens),
        "num_merges": done.num_merges,
        "num_filling": done.num_filling,
        "special_tokens": {token: done.tokenizer.special_tokens[token] for token in special.tokens},
        "named": dict(done.tokenizer.named),
        "plain": list(special.plain),
        "ggml_pre": done.tokenizer.ggml_pre,
        "fingerprint": done.tokenizer.fingerprint,
        "num_texts": done.num_texts,
        "num_empty": done.num_empty,
        "num_bytes": corpus.num_bytes,
        "skipped_files": dict(corpus.skipped_files),
        "unreadable_rows": dict(corpus.unreadable),
        "seconds": round(done.seconds, 3),
        "seconds_merging": round(done.seconds_merging, 3),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    for reason, count in facts["skipped_files"].items():
        yield f"{count:,} files not read: {reason}"
    for reason, count in facts["unreadable_rows"].items():
        yield f"{count:,} rows not read: {reason}"
    if facts["num_empty"]:
        yield f"{facts['num_empty']:,} of {facts['num_texts']:,} texts are empty"
    if facts["plain"]:
        yield f"plain text, not tokens: {', '.join(facts['plain'])}"
    if facts["vocab_size"] < facts["wanted_size"]:
        yield f"the text has fewer pairs than asked for: {facts['vocab_size']:,} of {facts['wanted_size']:,} tokens"
    if facts["num_filling"]:
        yield f"{facts['num_filling']:,} tokens are reserved, only to fill the size up: the text gave no more pairs"
    rate = facts["num_bytes"] / 1e6 / max(facts["seconds"], 1e-9)
    yield f"read {facts['num_texts']:,} texts, {facts['num_bytes'] / 1e6:,.1f} MB, {rate:,.1f} MB/s"
    yield (
        f"{facts['folder']}: {facts['vocab_size']:,} tokens: 256 bytes, {facts['num_merges']:,} merges, "
        f"{facts['num_special'] + facts['num_filling']:,} special; words as in {facts['ggml_pre']}"
    )


# -- report ------------------------------------------------------------------------------------------------------------


@command.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, metavar="FILE|FOLDER...", type=click.Path(path_type=Path))
@click.option("--compare", type=click.Path(path_type=Path), metavar="DIR", help="Another tokenizer, on the same text.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def report(folder: Path, files: tuple[Path, ...], compare: Path | None, as_json: bool) -> None:
    """Measure a tokenizer on text it was not made from.

    DIR is a model folder, a tokenizer's own, or a SentencePiece .model file.
    """
    from model_foundry.tokenizer import Tokenizer
    from model_foundry.tokenizer.quality import measure

    folders = [folder] if compare is None else [folder, compare]
    measured = [measure(Tokenizer.load(each), _Corpus(files)) for each in folders]
    if as_json:
        facts = [{"tokenizer": str(each)} | as_facts(one) for each, one in zip(folders, measured, strict=True)]
        click.echo(json.dumps(facts if compare is not None else facts[0], ensure_ascii=False, indent=2))
        return
    for line in _table(folders, measured):
        click.echo(line)


def as_facts(quality: Quality) -> dict[str, Any]:
    """What was measured as JSON values, the shares among them."""
    shares = ("bytes_per_token", "tokens_per_word", "coverage", "single_share")
    return asdict(quality) | {name: round(getattr(quality, name), 6) for name in shares}


def _table(folders: Sequence[Path], measured: Sequence[Quality]) -> Iterator[str]:
    rows: list[tuple[str, Callable[[Quality], str]]] = [
        ("vocabulary", lambda each: f"{each.vocab_size:,}"),
        ("tokens", lambda each: f"{each.num_tokens:,}"),
        ("bytes per token", lambda each: f"{each.bytes_per_token:.3f}"),
        ("tokens per word", lambda each: f"{each.tokens_per_word:.3f}"),
        ("vocabulary used", lambda each: f"{each.coverage:.1%} ({each.num_used:,})"),
        ("single characters", lambda each: f"{each.single_share:.1%} of the tokens"),
        ("unknown", lambda each: f"{each.num_unknown:,}"),
        ("come back exactly", lambda each: f"{each.num_texts - each.num_changed:,} of {each.num_texts:,} texts"),
    ]
    first = measured[0]
    yield f"{first.num_texts:,} texts, {first.num_bytes:,} bytes, {first.num_words:,} words"
    cells = [[str(folder), *(show(one) for _, show in rows)] for folder, one in zip(folders, measured, strict=True)]
    widths = [max(map(len, column)) for column in cells]
    for index, label in enumerate(["", *(label for label, _ in rows)]):
        texts = (column[index].ljust(width) for column, width in zip(cells, widths, strict=True))
        yield f"{label:<18} {'  '.join(texts)}".rstrip()
    for folder, one in zip(folders, measured, strict=True):
        longest = ", ".join(json.dumps(token.text, ensure_ascii=False) for token in one.longest[:NUM_LONGEST_SHOWN])
        yield f"{folder}: longest tokens {longest}"
        if (place := one.first_difference) is not None:
            yield f"{folder}: {place.source}, byte {place.byte:,}: {place.expected!r} comes back as {place.got!r}"


# -- the text of files -------------------------------------------------------------------------------------------------


class _Corpus:
    """The texts of files and folders, in order; what chats say, each message a text.

    Attributes:
        num_bytes: of the texts handed out so far.
        total_bytes: of the files, None where that says little.
        skipped_files: why files of a folder were left out, and how many each.
        unreadable: why rows were left out, and how many each.
    """

    def __init__(self, paths: Sequence[Path], *, skip_unreadable: bool = False) -> None:
        from model_foundry.data.files import find_inputs

        self._paths = paths
        self._skips = skip_unreadable
        self.num_bytes = 0
        self.skipped_files: Counter[str] = Counter()
        self.unreadable: Counter[str] = Counter()
        inputs: list[Path] = []
        for path in paths:
            found = find_inputs(path)
            inputs += found.files
            self.skipped_files.update(found.skipped)
        sized = all(file.is_file() and not file.name.lower().endswith(_NO_SIZE_SUFFIXES) for file in inputs)
        self.total_bytes = sum(file.stat().st_size for file in inputs) if sized else None

    def __iter__(self) -> Iterator[HeldOut]:
        """Raises: DataError at the first row that cannot be read, unless those are skipped; where there is no text."""
        from model_foundry.data.files import iter_records
        from model_foundry.data.rows import BadRows, RowParser
        from model_foundry.tokenizer.quality import HeldOut

        for path in self._paths:
            parser = RowParser()
            for record in iter_records(path):
                if _is_empty_text(record.value, parser.format):
                    yield HeldOut(record.source, "")
                    continue
                bad = BadRows()
                parsed = parser.parse(record, bad)
                if parsed is None:
                    self._unreadable(record.source, bad, record.problem)
                    continue
                for text in _texts(parsed):
                    self.num_bytes += len(text.encode("utf-8", "surrogatepass"))
                    yield HeldOut(record.source, text)
        if not self.num_bytes:
            raise DataError(
                "there is no text", where=", ".join(map(str, self._paths)), hint="Give files that hold some"
            )

    def _unreadable(self, source: str, bad: Any, problem: str | None) -> None:
        if self._skips:
            self.unreadable[problem or "not a row of its format"] += 1
            return
        hint = "--skip-unreadable counts such rows and goes on"
        if problem is not None:
            raise DataError(problem, where=source, hint=hint)
        bad.raise_if_any(num_rows=1, path=None, hint=hint)


def _is_empty_text(value: Any, format: str) -> bool:
    """Whether a record is a text without a character: nothing to learn from, and no mistake as a row to train on is."""
    return (
        isinstance(value, dict) and value.get("text") == "" and (format == "text" or value.keys() <= {"text", "path"})
    )


def _texts(parsed: Parsed) -> Iterator[str]:
    if parsed.text is not None:
        yield parsed.text
    for message in (*parsed.messages, *parsed.chosen, *parsed.rejected):
        yield message.content


def _progress(corpus: _Corpus) -> Callable[[Progress], None]:
    """Says on stderr how much was read and how fast, every few seconds, and when merging begins."""
    said = time.monotonic()

    def progress(state: Progress) -> None:
        nonlocal said
        now = time.monotonic()
        done = corpus.num_bytes / 1e6
        if state.stage == "merging":
            click.echo(f"{done:,.1f} MB read in {state.seconds:.1f} s; merging", err=True)
        elif now - said >= SECONDS_BETWEEN_LINES:
            said = now
            rate = done / max(state.seconds, 1e-9)
            line = f"{done:,.0f} MB read, {rate:,.1f} MB/s"
            if corpus.total_bytes is not None:
                line += f", at most {max(0.0, corpus.total_bytes / 1e6 - done) / rate:,.0f} s left"
            click.echo(line, err=True)

    return progress
