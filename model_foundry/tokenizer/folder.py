"""A tokenizer's files: which there are, which one counts, and what each says.

Knows the names and fields of Hugging Face folders and of SentencePiece models; does not know how text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from model_foundry.checkpoint.atomic import atomic_directory, atomic_write
from model_foundry.errors import DataError, ModelError
from model_foundry.tokenizer.sentencepiece_backend import text_backend
from model_foundry.tokenizer.sentencepiece_file import SentencePieceModel, read_sentencepiece

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OWN_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model"}
)
OWN_KEY = "model_foundry"
"""The key of tokenizer_config.json under which is what only this package reads."""

# transformers writes this where nobody said how long a text may be.
NO_MAX_LENGTH = int(1e30)

# Classes that number the pieces as the .model does. Others put them elsewhere (XLM-R, Marian, Pegasus, …).
_PLAIN_CLASSES = frozenset({None, "PreTrainedTokenizerFast", "TokenizersBackend"})
_BOS_CLASSES = frozenset(
    f"{name}Tokenizer{speed}" for name in ("Llama", "CodeLlama", "Gemma") for speed in ("", "Fast")
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of a tokenizer say.

    Attributes:
        backend: the `tokenizers` object.
        named: special tokens by role.
        chat_template: the model's own.
        config: the fields of tokenizer_config.json.
        sentencepiece: the model that decides about the ids, where that is not tokenizer.json.
        space_everywhere: of that model, see `SentencePieceEncoder`.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    chat_template: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    sentencepiece: SentencePieceModel | None = None
    space_everywhere: bool = False


def read_files(path: Path) -> TokenizerFiles:
    """Read a folder, or a SentencePiece `.model` file alone.

    tokenizer.json counts where there is one, unless tokenizer_config.json says under our key that the `.model` does.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    if path.suffix == ".model" and not path.is_dir():
        model = read_sentencepiece(path)
        return TokenizerFiles(text_backend(model), model.named, None, {}, model)
    config = _read_json(path / "tokenizer_config.json")
    named = _named_tokens(_read_json(path / "special_tokens_map.json")) | _named_tokens(config)
    template = _find_chat_template(path, config)
    models = [path / name for name in SENTENCEPIECE_FILES if (path / name).is_file()]
    own = config.get(OWN_KEY)
    reads_model = isinstance(own, dict) and own.get("reads") == "tokenizer.model"
    if (path / "tokenizer.json").is_file() and not reads_model:
        backend = _read_backend(path / "tokenizer.json")
        _add_missing_tokens(backend, config.get("added_tokens_decoder"))
        return TokenizerFiles(backend, named, template, config)
    if models:
        return _read_sentencepiece_folder(models[0], config, named, template)
    if reads_model:
        what = "tokenizer.model is missing, which says how this tokenizer encodes"
        raise ModelError(what, where=str(path), hint="Copy the whole folder again")
    raise ModelError(
        "there is no tokenizer.json here, and no SentencePiece model",
        where=str(path),
        hint="Give a Hugging Face model folder with a fast tokenizer, or a SentencePiece .model file",
    )


def write_files(folder: Path, files: TokenizerFiles) -> None:
    """Write the files into a folder that is there, each as a whole.

    Raises:
        OSError: as `atomic_write`.
    """
    config: dict[str, Any] = {key: value for key, value in files.config.items() if key != "auto_map"}
    own = dict(config.get(OWN_KEY) or {})
    if files.sentencepiece is not None:
        own["reads"] = "tokenizer.model"
        config["legacy"] = files.space_everywhere
        config["added_tokens_decoder"] = _added_tokens(files.backend)
        atomic_write(folder / "tokenizer.model", files.sentencepiece.data)
    if files.chat_template != _config_template(config):
        config.pop("chat_template", None)
    if files.chat_template is not None and not isinstance(config.get("chat_template"), list):
        config["chat_template"] = files.chat_template
        atomic_write(folder / "chat_template.jinja", files.chat_template)
    config |= {role: files.named[role] for role in NAMED_TOKENS if role in files.named}
    # transformers 5 names its own back end here, which transformers 4 refuses.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("clean_up_tokenization_spaces", False)
    config.setdefault("model_max_length", NO_MAX_LENGTH)
    if own:
        config[OWN_KEY] = own
    atomic_write(folder / "special_tokens_map.json", _json(dict(files.named)))
    atomic_write(folder / "tokenizer_config.json", _json(config))
    atomic_write(folder / "tokenizer.json", files.backend.to_str(pretty=True) + "\n")


def write_folder(folder: Path, files: TokenizerFiles) -> None:
    """Write a folder of its own, all of it or nothing. A tokenizer that is there is replaced.

    Raises:
        DataError: the folder holds other things as well, or is a file.
        OSError: as `atomic_directory`.
    """
    if folder.exists():
        others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else [folder.name]
        others = [name for name in others if name not in OWN_FILES or not folder.is_dir()]
        if others:
            what = f"the folder holds other things than a tokenizer: {', '.join(others[:3])}"
            raise DataError(what, where=str(folder), hint="Name a folder that is not there yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder) as temporary:
        write_files(temporary, files)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises bare Exception for every malformed file
        raise ModelError(f"the tokenizer cannot be read: {_first_line(error)}", where=str(path)) from error


def _read_sentencepiece_folder(
    path: Path, config: Mapping[str, Any], named: Mapping[str, str], template: str | None
) -> TokenizerFiles:
    name = config.get("tokenizer_class")
    if name not in _PLAIN_CLASSES | _BOS_CLASSES:
        raise ModelError(
            f"there is no tokenizer.json, and the class {name} may number the pieces of {path.name} in its own way",
            where=str(path.parent),
            hint="Save it once with a fast tokenizer: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    model = read_sentencepiece(path)
    space_everywhere = bool(config.get("legacy", name in _BOS_CLASSES))
    backend = text_backend(
        model,
        adds_bos=bool(config.get("add_bos_token", name in _BOS_CLASSES)),
        adds_eos=bool(config.get("add_eos_token", False)),
        space_everywhere=space_everywhere,
    )
    added = config.get("added_tokens_decoder")
    _add_missing_tokens(backend, added)
    for token_id, entry in (added or {}).items():
        if backend.token_to_id(entry["content"]) != int(token_id):
            what = f"the added token {entry['content']!r} is number {token_id}, but the model has no place for it there"
            raise ModelError(what, where=str(path.parent / "tokenizer_config.json"))
    return TokenizerFiles(backend, {**model.named, **named}, template, config, model, space_everywhere)


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for role in NAMED_TOKENS:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[role] = text
    return named


def _add_missing_tokens(backend: tokenizers.Tokenizer, added: Any) -> None:
    """Add the tokens that only tokenizer_config.json names, in the order of their ids."""
    if not isinstance(added, dict):
        return
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
        if entry["content"] not in present:
            token = tokenizers.AddedToken(entry["content"], **{flag: bool(entry.get(flag, False)) for flag in flags})
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(token_id): {flag: getattr(token, flag) for flag in flags}
        for token_id, token in sorted(backend.get_added_tokens_decoder().items())
    }


def _find_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The newer chat_template.jinja, or the configuration's key: one template, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return _config_template(config)


def _config_template(config: Mapping[str, Any]) -> str | None:
    value = config.get("chat_template")
    if isinstance(value, list):
        by_name = {entry["name"]: entry["template"] for entry in value}
        return by_name.get("default", next(iter(by_name.values())) if len(by_name) == 1 else None)
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"the file is not JSON: {_first_line(error)}", where=str(path)) from error
    if not isinstance(content, dict):
        raise ModelError("a JSON object was expected", where=str(path))
    return content


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
