"""The words of a request: for a piece of code, the questions that it answers, in several voices.

The answer of a row is the code itself, so the model is asked for questions only and writes no code. A template is text
with `{placeholders}`; its version and its words are part of a request's identity, so an edited prompt is a new request.
Knows nothing of prices, files or the API beyond the shape of its parameters.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from model_foundry.data.code.units import CodeUnit
from model_foundry.errors import ConfigError

SYSTEM = (
    "You write the questions of a training set for programmers. You are given a piece of working code. You write "
    "requests that a person could have made without having seen it, and to which exactly this code is a complete and "
    "natural answer. You never write code, and you never mention that the code exists."
)
TEMPLATE = """\
Language: {language}
{about}File: {path}
Kind: {kind}
Name: {name}
{context}{comment}{concepts}
<code>
{code}
</code>

Write {num_questions} question(s) in each of these voices:
{voices}

Each question must stand alone: whoever reads it sees neither the code nor the file. Name what the asker must name for \
this code to be the right answer (the event, the object, the purpose), and nothing that only the code's author knows. \
Ask for the code to be written, never about "this code" or "the function above". No two questions may say the same.

Answer with JSON only: {"questions": [{"voice": "...", "question": "..."}]}
"""
TEMPLATES: dict[str, str] = {"reverse-1": TEMPLATE}
"""Version -> template. A version's words never change; a better prompt is a new version."""

VOICES: dict[str, str] = {
    "beginner": "somebody new to the language who describes the wish in everyday words",
    "developer": "an experienced developer who asks precisely and briefly",
    "modder": "a maker of mods or games who says what should happen in the game",
    "issue": "the text of an issue: what is needed and how it should behave",
}
"""Who asks -> how they ask, unless the configuration names others."""

PLACEHOLDERS = frozenset(
    {"language", "about", "path", "kind", "name", "context", "comment", "concepts", "code", "num_questions", "voices"}
)
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Prompt:
    """How units are asked about.

    Attributes:
        version: name of the template; with `digest` it identifies the words.
        concepts: the domain's words -> one line on each; only those that stand in the code are quoted.
    """

    version: str = "reverse-1"
    system: str = SYSTEM
    template: str = TEMPLATE
    voices: Mapping[str, str] = field(default_factory=lambda: dict(VOICES))
    questions_per_voice: int = 1
    about: str = ""
    concepts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(_PLACEHOLDER.findall(self.template)) - PLACEHOLDERS)
        if unknown:
            raise ConfigError(
                f"the template has unknown placeholders: {', '.join(unknown)}",
                where="prompt.template",
                hint=f"Known are {', '.join(sorted(PLACEHOLDERS))}",
            )
        if "{code}" not in self.template:
            raise ConfigError("the template does not contain {code}", where="prompt.template")
        if not self.voices:
            raise ConfigError("there is no voice to ask in", where="prompt.voices")

    @functools.cached_property
    def digest(self) -> str:
        """Eight hex digits over every word that goes into a request."""
        words = {item.name: getattr(self, item.name) for item in fields(self)}
        words["voices"], words["concepts"] = dict(self.voices), dict(self.concepts)
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """`reverse-1@1a2b3c4d`: the version, and its words."""
        return f"{self.version}@{self.digest}"

    def render(self, unit: CodeUnit) -> str:
        """The message of one unit. Placeholders are replaced in the template only, never in what replaces them."""
        concepts = [f"- {word}: {line}" for word, line in self.concepts.items() if word in unit.code]
        values = {
            "language": unit.language,
            "about": f"About: {self.about}\n" if self.about else "",
            "path": unit.path,
            "kind": unit.kind,
            "name": unit.name,
            "context": f"Stands in: {unit.context}\n" if unit.context else "",
            "comment": f"Its author's comment: {unit.comment}\n" if unit.comment else "",
            "concepts": "Words of this field:\n" + "\n".join(concepts) + "\n" if concepts else "",
            "code": unit.code,
            "num_questions": str(self.questions_per_voice),
            "voices": "\n".join(f"- {name}: {how}" for name, how in self.voices.items()),
        }
        return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), self.template)

    def schema(self) -> dict[str, Any]:
        """JSON schema of a reply, for the API's structured output."""
        question = {
            "type": "object",
            "properties": {"voice": {"type": "string", "enum": list(self.voices)}, "question": {"type": "string"}},
            "required": ["voice", "question"],
            "additionalProperties": False,
        }
        return {
            "type": "object",
            "properties": {"questions": {"type": "array", "items": question}},
            "required": ["questions"],
            "additionalProperties": False,
        }


def choose_template(version: str, template: str | None) -> str:
    """The template of a version, or the one that is given.

    Raises:
        ConfigError: no such version, and no template.
    """
    if template is not None:
        return template
    if version not in TEMPLATES:
        raise ConfigError(
            f"there is no prompt version '{version}'",
            where="prompt.version",
            hint=f"Choose one of {', '.join(TEMPLATES)}, or give prompt.template",
        )
    return TEMPLATES[version]
