"""A suite: rows, how they are asked, what is measured, and the bounds that the measurements must meet.

A YAML file with JSONL beside it; `suites/` holds those that come along, and users add their own by path. Knows files
and names of metrics; nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from model_foundry.config.suggest import close
from model_foundry.config.tree import Origin, to_plain
from model_foundry.config.yaml_text import read_yaml
from model_foundry.data.code.languages import find_language
from model_foundry.errors import ConfigError
from model_foundry.evals.bounds import Bound, parse_bound
from model_foundry.evals.measures import find_measure
from model_foundry.evals.suite_rows import ROW_HINTS, SuiteRow, read_suite_rows
from model_foundry.evals.text_scores import ANSWER_SCORES

SUITE_FOLDER = Path(__file__).parent / "suites"
Kind = Literal["answers", "choices", "text", "consistency", "pairs", "safety", "harness"]
KIND_METRICS: Mapping[str, tuple[str, ...]] = {
    "answers": (*ANSWER_SCORES, "ended"),
    "choices": ("accuracy", "accuracy_per_byte", "margin"),
    "text": ("perplexity", "bits_per_byte"),
    "consistency": ("repeat_agreement", "paraphrase_agreement", "batch_agreement"),
    "pairs": ("likelihood_bias", "valence_bias", "length_bias", "refusal_bias"),
    "safety": ("refusal", "helpful"),
    "harness": (),
}
"""What each kind of suite can measure."""
_NEEDS: Mapping[str, str] = {
    **dict.fromkeys(("exact", "f1", "contains", "fuzzy", "bleu", "rouge_1", "rouge_l"), "answer"),
    "keywords": "keywords",
    "length": "answer or words",
}
DEFAULT_BOUNDS: Mapping[str, str] = {
    "bleu": "> 0.1",
    "rouge_l": "> 0.2",
    "keywords": "> 0.3",
    "reading_ease": "> 30 points",
    "grade": "< 15 grade",
}
"""Bounds of the metrics that a suite measures and sets none for; null sets none."""
QUESTIONS, QUESTION_METRICS = "questions", ("exact", "f1", "contains")
"""What the questions of `evaluation.file` are called, and what is measured of them."""
_KEYS = (
    "about", "kind", "rows", "metrics", "thresholds", "guard", "decoding", "system", "language", "max_rows", "tasks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are written. `repeats`: how often a question is asked again where answers are compared."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repeats: int = 3


@dataclass(frozen=True, slots=True)
class Suite:
    """What is asked and measured.

    Attributes:
        thresholds: bounds by metric; what does not meet one fails.
        guard: metrics in which a run must not fall behind its base, each with how much is borne.
        num_left_out: rows beyond `max_rows`, which are not asked.
        digest: of everything that decides what is asked.
    """

    name: str
    kind: Kind
    rows: tuple[SuiteRow, ...]
    metrics: tuple[str, ...]
    about: str = ""
    thresholds: Mapping[str, Bound] = field(default_factory=dict)
    guard: Mapping[str, float] = field(default_factory=dict)
    decoding: Decoding = field(default_factory=Decoding)
    tasks: tuple[str, ...] = ()
    num_left_out: int = 0
    max_rows: int | None = None
    digest: str = ""

    @property
    def generates(self) -> bool:
        return self.kind in ("answers", "consistency", "safety", "pairs")

    def limited(self, max_rows: int | None) -> Suite:
        """The first rows alone, with what is left out counted; a text is cut when it is read."""
        limit = min((each for each in (max_rows, self.max_rows) if each is not None), default=None)
        if limit is None or (len(self.rows) <= limit and self.kind not in ("text", "harness")):
            return self
        rows, digest = self.rows[:limit], hashlib.sha256(f"{self.digest}:{limit}".encode()).hexdigest()
        return replace(self, rows=rows, num_left_out=len(self.rows) - len(rows), max_rows=limit, digest=digest)

    def seeded(self, seed: int) -> Suite:
        """The suite with another seed for resampling and, above temperature 0, for decoding."""
        digest = hashlib.sha256(f"{self.digest}:seed {seed}".encode()).hexdigest()
        return replace(self, decoding=replace(self.decoding, seed=seed), digest=digest)


def builtin_suites() -> list[str]:
    """The names of the suites that come along."""
    return sorted(path.stem for path in SUITE_FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """A suite by its name, or from a YAML file.

    Raises:
        ConfigError: there is none, or its YAML asks for what cannot be. DataError: its rows cannot be used.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = SUITE_FOLDER / f"{name}.yaml"
        if name not in builtin_suites():
            near = close(name, builtin_suites())
            hint = f"Did you mean {near}? " if near else ""
            hint += f"There is: {', '.join(builtin_suites())}; your own is a path to a .yaml file."
            raise ConfigError(f"there is no suite {name!r}", where="evaluation.suites", hint=hint)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"the suite cannot be read: {reason}", where=str(path)) from error
    values = to_plain(read_yaml(text, origin_at=lambda line: Origin("file", str(path), line)))
    return _suite(values, path)


def questions_suite(path: Path, *, system: str | None, max_new_tokens: int) -> Suite:
    """A file of questions as a suite: exact match, word F1, and whether the expected answer is contained."""
    rows = read_suite_rows(path, "answers", system=system, language=None)
    digest = questions_digest(path, system=system, max_new_tokens=max_new_tokens)
    return Suite(
        QUESTIONS, "answers", rows, QUESTION_METRICS, f"The questions of {path}",
        decoding=Decoding(max_new_tokens=max_new_tokens), digest=digest,
    )  # fmt: skip


def questions_digest(path: Path, *, system: str | None, max_new_tokens: int) -> str:
    """The same for the same questions asked in the same way, whichever model answers."""
    return hashlib.sha256(path.read_bytes() + f"{system}:{max_new_tokens}".encode()).hexdigest()


def _suite(values: Mapping[str, Any], path: Path) -> Suite:
    where = str(path)
    for key in values:
        if key not in _KEYS:
            near = close(key, _KEYS)
            raise ConfigError(f"there is no key {key!r} in a suite", where=where,
                              hint=f"Did you mean {near}?" if near else f"Keys: {', '.join(_KEYS)}.")  # fmt: skip
    kind = values.get("kind", "answers")
    if kind not in get_args(Kind):
        raise ConfigError(f"{kind!r} is no kind of suite", where=f"{where}: kind",
                          hint=f"Kinds: {', '.join(get_args(Kind))}.")  # fmt: skip
    language = values.get("language")
    if language is not None:
        find_language(language)
    system, max_rows = _text(values, "system", where), _whole(values, "max_rows", where)
    rows_path = _rows_path(values, path) if kind != "harness" else None
    rows = () if rows_path is None else read_suite_rows(rows_path, kind, system=system, language=language)
    metrics = _metrics(values, kind, where)
    decoding = _decoding(values.get("decoding") or {}, where)
    _require_fields(metrics, rows, language, where)
    if "repeat_agreement" in metrics and decoding.temperature == 0:
        what = "repeat_agreement asks again with other seeds, and at temperature 0 no seed changes an answer"
        hint = "Set decoding: {temperature: 0.7}, or name the other metrics alone."
        raise ConfigError(what, where=f"{where}: metrics", hint=hint)
    return Suite(
        name=path.stem,
        kind=cast(Kind, kind),
        rows=rows,
        metrics=metrics,
        about=_text(values, "about", where) or "",
        thresholds=_thresholds(values, metrics, where),
        guard=_guard(values, metrics, where),
        decoding=decoding,
        tasks=_tasks(values, kind, where),
        max_rows=max_rows,
        digest=_digest(values, decoding, rows_path),
    )


def _rows_path(values: Mapping[str, Any], path: Path) -> Path:
    name = _text(values, "rows", str(path))
    if name is None:
        raise ConfigError("rows: is missing", where=str(path), hint="Name a file beside the suite.")
    return path.parent / Path(name).expanduser()


def _metrics(values: Mapping[str, Any], kind: str, where: str) -> tuple[str, ...]:
    known = KIND_METRICS[kind]
    if kind == "harness":
        return ()
    names = values.get("metrics", None if kind == "answers" else list(known))
    if not isinstance(names, list) or not names:
        raise ConfigError("metrics: names none", where=where, hint=f"A suite of {kind} knows {', '.join(known)}.")
    for name in names:
        find_measure(str(name), where=f"{where}: metrics")
        if name not in known:
            what = f"the metric {name} cannot be measured in a suite of {kind}"
            raise ConfigError(what, where=f"{where}: metrics", hint=f"It knows {', '.join(known)}.")
    return tuple(dict.fromkeys(names))


def _require_fields(metrics: Sequence[str], rows: Sequence[SuiteRow], language: str | None, where: str) -> None:
    has = {
        "answer": any(row.wanted.answers for row in rows),
        "keywords": any(row.wanted.keywords for row in rows),
        "answer or words": any(row.wanted.answers or row.wanted.words for row in rows),
    }
    for name in metrics:
        need = _NEEDS.get(name)
        if need and not has[need]:
            raise ConfigError(f"the metric {name} needs the field {need}, and no row has it", where=where,
                              hint=f"Rows: {ROW_HINTS['answers']}")  # fmt: skip
        if name == "syntax" and language is None:
            raise ConfigError("the metric syntax needs to know the language", where=where, hint="Set language: lua.")


def _thresholds(values: Mapping[str, Any], metrics: Sequence[str], where: str) -> dict[str, Bound]:
    given = values.get("thresholds") or {}
    if not isinstance(given, Mapping):
        raise ConfigError("thresholds: is a mapping of metrics to bounds", where=where, hint='Write bleu: "> 0.1".')
    _known_only(given, metrics, f"{where}: thresholds")
    texts = {name: text for name, text in DEFAULT_BOUNDS.items() if name in metrics} | dict(given)
    measures = {name: find_measure(name, where=where) for name in texts}
    return {
        name: parse_bound(
            str(text), unit=measures[name].unit, where=f"{where}: thresholds.{name}", span=measures[name].span
        )
        for name, text in texts.items()
        if text is not None
    }


def _guard(values: Mapping[str, Any], metrics: Sequence[str], where: str) -> dict[str, float]:
    given = values.get("guard") or {}
    if not isinstance(given, Mapping):
        raise ConfigError("guard: is a mapping of metrics to what is borne", where=where, hint="Write accuracy: 0.05.")
    _known_only(given, metrics, f"{where}: guard")
    for name, borne in given.items():
        if isinstance(borne, bool) or not isinstance(borne, int | float) or not borne >= 0:
            raise ConfigError(f"{borne!r} is no amount", where=f"{where}: guard.{name}", hint="Write 0 or more.")
        if math.isinf(borne) or (borne > 1 and find_measure(name, where=where).span):
            hint = "Metrics from 0 to 1 lose 1 at most: 5 % are 0.05."
            raise ConfigError(f"{borne!r} guards nothing", where=f"{where}: guard.{name}", hint=hint)
    return {name: float(borne) for name, borne in given.items()}


def _known_only(given: Mapping[str, Any], metrics: Sequence[str], where: str) -> None:
    for name in given:
        if name not in metrics:
            what = f"the suite does not measure {name}"
            raise ConfigError(what, where=where, hint=f"It measures {', '.join(metrics)}.")


def _decoding(values: Any, where: str) -> Decoding:
    if not isinstance(values, Mapping):
        raise ConfigError("decoding: is a mapping", where=where)
    limits = {
        "max_new_tokens": (int, 1, 100_000), "temperature": (float, 0, 2), "top_p": (float, 0, 1),
        "seed": (int, 0, 2**32 - 1), "repeats": (int, 2, 100),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in limits:
            raise ConfigError(f"there is no key {name!r} in decoding", where=where, hint=f"Keys: {', '.join(limits)}.")
        kind, low, high = limits[name]
        fits = not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)
        if not fits or not low <= value <= high or (name == "top_p" and value == 0):
            span = f"above 0 and at most {high}" if name == "top_p" else f"from {low} to {high}"
            raise ConfigError(f"{value!r} is not {span}", where=f"{where}: decoding.{name}")
        found[name] = kind(value)
    return Decoding(**found)


def _tasks(values: Mapping[str, Any], kind: str, where: str) -> tuple[str, ...]:
    tasks = values.get("tasks") or []
    if not isinstance(tasks, list) or not all(isinstance(each, str) for each in tasks):
        raise ConfigError("tasks: is a list of names", where=where, hint="Write tasks: [arc_easy].")
    if bool(tasks) != (kind == "harness"):
        raise ConfigError("tasks: goes with the kind harness, and that needs them", where=where)
    return tuple(tasks)


def _text(values: Mapping[str, Any], name: str, where: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{value!r} is no text", where=f"{where}: {name}")
    return value


def _whole(values: Mapping[str, Any], name: str, where: str) -> int | None:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{value!r} is no whole number above 0", where=f"{where}: {name}")
    return value


def _digest(values: Mapping[str, Any], decoding: Decoding, rows: Path | None) -> str:
    """What is asked and how: not what is measured of it or said about it, nor the bounds that it must meet.

    `max_rows` decides only where it cuts, which `Suite.limited` adds.
    """
    asked = {key: values.get(key) for key in ("kind", "system", "language", "tasks")} | {"decoding": asdict(decoding)}
    asked["kind"] = asked["kind"] or "answers"
    data = json.dumps(asked, sort_keys=True).encode() + (b"" if rows is None else rows.read_bytes())
    return hashlib.sha256(data).hexdigest()
