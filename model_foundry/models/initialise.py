"""Fresh weights for a model made from nothing, and its folder.

Normal with the deviation that config.json names; what ends a block (attention's and the MLP's output projections) is
scaled by 1 / √(2 layers) besides, so that the residual stream does not grow with depth (GPT-2: Radford et al. 2019,
section 2.3). Norms start as one, biases as zero. Each tensor is drawn by a generator of its own, a function of the seed
and its name: the order in which they are made, their number and the machine change nothing. It knows no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from model_foundry.models.architecture import gpt2_shapes
from model_foundry.models.config import ModelConfig
from model_foundry.models.decoder import expected_shapes
from model_foundry.models.folder import write_model_folder
from model_foundry.models.randomness import generator

_ENDS_A_BLOCK = ("o_proj.weight", "down_proj.weight", "c_proj.weight")


def fresh_tensors(
    config: Mapping[str, Any], *, seed: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight by its Hugging Face name, one at a time.

    Args:
        config: a parsed `config.json`: GPT-2 or a kind of the native decoder.

    Raises:
        ModelError: another kind.
    """
    if config.get("model_type") == "gpt2":
        shapes, num_layers = gpt2_shapes(config), int(config["n_layer"])
    else:
        ours = ModelConfig.from_hf(config)
        shapes, num_layers = expected_shapes(ours), ours.num_hidden_layers
    deviation = float(config.get("initializer_range", 0.02))
    for name, shape in shapes.items():
        yield name, _fresh(name, shape, deviation, num_layers=num_layers, seed=seed).to(dtype)


def _fresh(name: str, shape: tuple[int, ...], deviation: float, *, num_layers: int, seed: int) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    scale = 1.0 / math.sqrt(2 * num_layers) if name.endswith(_ENDS_A_BLOCK) else 1.0
    return torch.empty(shape).normal_(0.0, deviation * scale, generator=generator(seed, "fresh", name))


def write_fresh_model(folder: Path, config: Mapping[str, Any], *, seed: int, tokenizer_from: Path) -> None:
    """A Hugging Face folder with fresh float32 weights, whole or not at all; it must not exist yet, or be empty.

    Raises:
        ModelError: a kind that is not made from nothing here, or the folder holds something.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    write_model_folder(
        folder, {**config, "dtype": "float32"}, fresh_tensors(config, seed=seed), tokenizer_from=tokenizer_from
    )
