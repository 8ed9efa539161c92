"""Did-you-mean: the field or name that someone probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from model_foundry.config.fields import schema_fields, schema_sections

ALIASES: dict[str, str] = {
    "lr": "learning_rate",
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "output_dir": "run_dir",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "lr_scheduler_type": "lr_scheduler",
    "scheduler": "lr_scheduler",
    "gradient_clipping": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_length": "max_length",
    "train_path": "train_file",
    "train_data": "train_file",
    "eval_file": "validation_file",
    "val_file": "validation_file",
    "max_tokens": "max_new_tokens",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "dataset": "data.train_file",
    "chat_template": "template",
    "precision": "dtype",
    "torch_dtype": "dtype",
}
"""What other tools call our fields."""


def close(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The nearest of `known`, None when none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def field_like(path: str, schema: type[BaseModel]) -> str | None:
    """The field or section that the unknown dotted `path` probably means, in this section or in another."""
    section, _, word = path.lower().replace("-", "_").rpartition(".")
    names = [*schema_fields(schema), *schema_sections(schema)]
    here = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    word = ALIASES.get(word, word)
    if word in names:
        return word
    if word in here:
        return here[word]
    elsewhere = _named(word, names, near=section)
    near = close(word, here, cutoff=0.7)
    if elsewhere or near:
        return elsewhere or here[str(near)]
    last = close(word, (name.rpartition(".")[2] for name in names), cutoff=0.75)
    if last:
        return _named(last, names, near=section)
    return close(path, (name for name in names if not path.startswith(f"{name}.")), cutoff=0.75)


def _named(word: str, names: Sequence[str], *, near: str) -> str | None:
    """The name that ends in `word`; among several, the one whose section is most like `near`."""
    same = [name for name in names if name.rpartition(".")[2] == word]
    if not same:
        return None
    return max(same, key=lambda name: difflib.SequenceMatcher(None, name.rpartition(".")[0], near).ratio())
