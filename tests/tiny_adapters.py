"""Random adapters for the tiny models: both factors drawn, so that each of them matters."""

from __future__ import annotations

from pathlib import Path

import torch

from model_foundry.checkpoint.manifest import write_manifest
from model_foundry.models.adapter import PREFIX, adapter_tensors, target_names, write_adapter
from model_foundry.models.folder import fingerprint, read_config
from model_foundry.models.language_model import load_language_model
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.types import LoraConfig


def write_tiny_adapter(
    folder: Path, base: Path, lora: LoraConfig, *, seed: int = 0, scale: float = 0.3, manifest: bool = False
) -> Path:
    """An adapter folder for `base`; with `manifest` inside a checkpoint that says which weights it was trained on."""
    model = load_language_model(base, dtype=torch.float32)
    linears = model.linears()
    adapt(linears, lora, seed=seed, counter=DropoutCounter())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: value * torch.empty_like(value).uniform_(0.5, 1.5, generator=generator)
        if name.endswith("magnitude_vector")
        else scale * torch.randn(value.shape, generator=generator)
        for name, value in adapter_tensors(linears).items()
    }
    folder.mkdir(parents=True)
    write_adapter(
        folder, tensors=tensors, lora=lora, targets=target_names(linears), base_model=str(base),
        transposed=any(linear.transposed for linear in linears.values()),
    )  # fmt: skip
    if manifest:
        fields = {"name": "final", "step": 1, "metadata": {"model": fingerprint(base)}}
        write_manifest(folder.parent, fields=fields)
    return folder


def head_adapter(folder: Path, base: Path, *, seed: int = 0, dropout: float = 0.0) -> Path:
    """An adapter on the head alone, as PEFT writes one with target_modules=["lm_head"]."""
    config, generator = read_config(base), torch.Generator().manual_seed(seed)
    name = f"{PREFIX}lm_head"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, config["hidden_size"], generator=generator),
        f"{name}.lora_B.weight": torch.randn(config["vocab_size"], 2, generator=generator),
    }
    folder.mkdir(parents=True)
    lora = LoraConfig(r=2, lora_alpha=1, lora_dropout=dropout)
    write_adapter(folder, tensors=tensors, lora=lora, targets=["lm_head"], base_model=str(base))
    return folder
