"""The model that pretraining starts from: one that is there, or fresh weights in the shape that was asked for."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.errors import ConfigError, ModelError
from model_foundry.models.architecture import to_config
from model_foundry.models.cache import fill
from model_foundry.models.finder import ModelSource, resolve_model
from model_foundry.models.initialise import write_fresh_model
from model_foundry.recipes.architecture import architecture_of
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.folder import SENTENCEPIECE_FILES

logger = logging.getLogger(__name__)
FRESH = "a model from nothing"


def fresh_source(config: ExperimentConfig) -> ModelSource:
    """The model folder to start from; fresh weights are drawn once and kept under the digest of what decides them.

    Raises:
        ModelError, ConfigError: the model or the tokenizer cannot be found, or the vocabulary has no room for it.
    """
    if config.model.name is not None:
        source = resolve_model(config.model.name, say=logger.info)
        if source.adapter is not None:
            hint = "Merge it first: foundry export RUN --to merged"
            what = f"{config.model.name} is an adapter, and every weight is to be trained"
            raise ConfigError(what, where="model.name", hint=hint)
        return source
    folder = tokenizer_folder(config)
    tokenizer = Tokenizer.load(folder)
    shape = shape_of(config, tokenizer)
    decides = json.dumps([shape, tokenizer.fingerprint, config.seed], sort_keys=True)
    key = f"fresh-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def make(target: Path) -> Mapping[str, Any]:
        with TemporaryDirectory(prefix="foundry-tokenizer-") as temporary:
            files = folder
            if not (folder / "tokenizer.json").is_file():  # a SentencePiece model, which a folder holds with its twin
                tokenizer.save(files := Path(temporary, "tokenizer"))
            write_fresh_model(target, shape, seed=config.seed, tokenizer_from=files)
        return {"fresh": True, "seed": config.seed, "tokenizer": str(folder)}

    entry = fill(key, FRESH, make, say=logger.info, home=work_folder(config))
    return ModelSource(entry.folder, FRESH, entry.provenance)


def work_folder(config: ExperimentConfig) -> Path:
    """Where packed text and fresh weights are kept, to be used again."""
    return config.work_dir or config.run_dir.parent / "work"


def shape_of(config: ExperimentConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `config.json` of the model that is asked for."""
    shape = architecture_of(
        config.model,
        tokenizer_size=tokenizer.vocab_size,
        special_token_ids=tuple(tokenizer.special_tokens.values()),
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        pad_token_id=tokenizer.pad_id,
    )
    return to_config(shape)


def tokenizer_folder(config: ExperimentConfig) -> Path:
    """The folder of the vocabulary, which may be there before there is a model; or its SentencePiece file."""
    name = config.tokenizer.name or ""
    path = Path(name).expanduser()
    if any((path / file).is_file() for file in ("tokenizer.json", *SENTENCEPIECE_FILES)):
        return path
    if path.suffix == ".model" and path.is_file():
        return path
    try:
        return resolve_model(name, say=logger.info).folder
    except ModelError as error:
        if not path.is_dir() or (path / "run.json").is_file():
            raise
        hint = "Make one with: foundry tokenizer train FILE --vocab-size N --out DIR"
        raise ModelError("there is no tokenizer in the folder", where=name, hint=hint) from error
