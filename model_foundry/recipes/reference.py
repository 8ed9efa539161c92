"""The reference's log-probabilities of every pair: asked of the model before its first step, kept on the disk.

They are a function of the pairs, the starting weights and the way these are computed. All of that is the name that they
are kept under, so runs that differ in loss, beta, learning rate or rank read what the first of them computed. A kept
file counts only when its bytes are those that were written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_foundry.checkpoint.atomic import atomic_directory
from model_foundry.checkpoint.manifest import verify_manifest, write_manifest
from model_foundry.checkpoint.tensors import read_tensors, write_tensors
from model_foundry.client.local import TrainingClient
from model_foundry.errors import CheckpointCorruptError, RunError
from model_foundry.run.progress import open_progress
from model_foundry.types import Datum

logger = logging.getLogger(__name__)

BATCH_TOKENS = 8192
"""Tokens of the rows that are passed through the model together."""
FILE = "logprobs.safetensors"
COMPUTED_BY = ("engine", "implementation", "device", "dtype", "num_threads", "world_size", "piece_tokens")
"""Of the engine's facts, those that may change the last bits."""


def reference_folder(run_dir: Path) -> Path:
    """Where they are kept, for all runs that lie side by side."""
    return run_dir.parent / "work"


def reference_key(data: Sequence[Datum], *, model: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON values.

    Args:
        model: the starting weights.
        facts: the engine's on the model, and the `piece_tokens` that its passes are split at.
    """
    digest = hashlib.sha256()
    for datum in data:
        digest.update(np.array([datum.num_tokens, *datum.branches], dtype="<i8").tobytes())
        digest.update(datum.tokens.astype("<i4").tobytes())
        digest.update(datum.loss_inputs["target_tokens"].astype("<i4").tobytes())
        digest.update((datum.loss_inputs["weights"] != 0).tobytes())
    computed = {name: facts[name] for name in COMPUTED_BY}
    return {"pairs": digest.hexdigest(), "num_pairs": len(data), **model, **computed, "torch": torch.__version__}


def reference_logprobs(
    client: TrainingClient, data: Sequence[Datum], *, folder: Path, key: Mapping[str, Any]
) -> list[np.ndarray]:
    """float32 [T] for each pair: how likely the model finds each target now, in nats; zero where no loss is due.

    Raises:
        RunError: they cannot be kept.
    """
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    place = folder / f"reference-{digest[:16]}"
    kept = _read(place, key)
    if kept is None:
        kept = _computed(client, data)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_directory(place) as target:
                write_tensors(target / FILE, {"logprobs": kept})
                write_manifest(target, fields={"key": dict(key)})
        except OSError as error:
            what = f"the reference's log-probabilities cannot be kept ({error.strerror or error})"
            raise RunError(what, where=str(place)) from error
    return _spread(kept, data)


def _read(place: Path, key: Mapping[str, Any]) -> np.ndarray | None:
    """What is kept there, or None where nothing whole is."""
    if not place.is_dir():
        return None
    try:
        manifest = verify_manifest(place)
        if manifest.fields.get("key") != dict(key):
            raise CheckpointCorruptError("was made of other pairs or by another model", where=str(place))
        logprobs = read_tensors(place / FILE, framework="numpy")["logprobs"]
    except CheckpointCorruptError as error:
        logger.warning("%s; the reference is computed again", error)
        return None
    logger.info("the reference's log-probabilities are read from %s", place)
    return logprobs


def _computed(client: TrainingClient, data: Sequence[Datum]) -> np.ndarray:
    """float32, of all targets with a loss due, end to end."""
    logger.info("asking the model for the reference's log-probabilities of %s pairs", f"{len(data):,}")
    found: list[np.ndarray] = []
    with open_progress() as progress:
        progress.start(len(data), "reference")
        done = 0
        for batch in reference_batches(data):
            for datum, logprobs in zip(batch, client.forward(batch).result().logprobs, strict=True):
                found.append(logprobs[datum.loss_inputs["weights"] != 0])
            done += len(batch)
            progress.advance(done)
    return np.concatenate(found)


def reference_batches(data: Sequence[Datum]) -> list[list[Datum]]:
    """What is passed through the model together."""
    batches: list[list[Datum]] = [[]]
    size = 0
    for datum in data:
        if batches[-1] and size + datum.num_tokens > BATCH_TOKENS:
            batches.append([])
            size = 0
        batches[-1].append(datum)
        size += datum.num_tokens
    return batches


def _spread(kept: np.ndarray, data: Sequence[Datum]) -> list[np.ndarray]:
    spread, place = [], 0
    for datum in data:
        due = datum.loss_inputs["weights"] != 0
        logprobs = np.zeros(datum.num_tokens, dtype=np.float32)
        size = int(due.sum())
        logprobs[due] = kept[place : place + size]
        spread.append(logprobs)
        place += size
    return spread
