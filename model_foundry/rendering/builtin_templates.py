"""Our own chat templates and where a template named in a configuration comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model_foundry.errors import TemplateError
from model_foundry.tokenizer import Tokenizer

# Each built-in template and the control tokens it cannot do without.
BUILTIN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "alpaca": (),
}
_CHOICES = "Set model.template to alpaca (works with any tokenizer), chatml, llama3 or the path of a .jinja file"


@dataclass(frozen=True, slots=True)
class NamedTemplate:
    """A template's short name and Jinja text."""

    name: str
    source: str


def find_template(template: str, tokenizer: Tokenizer) -> NamedTemplate | None:
    """The template meant by `auto`, a built-in name or a path; None when `auto` finds that the model has none.

    Raises:
        TemplateError: unknown name, unreadable file, or a built-in whose control tokens the tokenizer lacks.
    """
    if template == "auto":
        return None if tokenizer.chat_template is None else NamedTemplate("model", tokenizer.chat_template)
    if template in BUILTIN:
        missing = [token for token in BUILTIN[template] if token not in tokenizer.special_tokens]
        if missing:
            what = f"the template '{template}' needs the control tokens {' '.join(missing)}, which the tokenizer lacks"
            raise TemplateError(what, where="model.template", hint=_CHOICES)
    return read_template(template)


def read_template(template: str) -> NamedTemplate:
    """The template of a built-in name or a path, whatever the tokenizer.

    Raises:
        TemplateError: unknown name, or unreadable file.
    """
    if template in BUILTIN:
        path = Path(__file__).parent / "builtin" / f"{template}.jinja"
        return NamedTemplate(template, path.read_text(encoding="utf-8"))
    path = Path(template).expanduser()
    if not path.is_file():
        raise TemplateError(f"there is no chat template '{template}'", where="model.template", hint=_CHOICES)
    try:
        return NamedTemplate(path.stem, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the chat template cannot be read: {error}", where=str(path)) from error


def no_template_error() -> TemplateError:
    return TemplateError("the model has no chat template of its own", where="model.template", hint=_CHOICES)
