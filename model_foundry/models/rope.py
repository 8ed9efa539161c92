"""Rotary frequencies (Su et al. 2021) for every way of stretching them that the native decoder computes."""

from __future__ import annotations

import math

import torch

from model_foundry.models.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies float32 [D / 2] and the factor on cos and sin, for every rope type the config allows."""
    width, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = 1.0 / (config.rope_theta**exponents)
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
        wavelength = 2 * math.pi / plain
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * plain / scaling.factor + smooth * plain
        out = torch.where(wavelength > original / low, plain / scaling.factor, plain)
        medium = (wavelength >= original / high) & (wavelength <= original / low)
        return torch.where(medium, blended, out), 1.0
    return _yarn(config, plain, original)


def _yarn(config: ModelConfig, plain: torch.Tensor, original: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023): high frequencies kept, low ones interpolated, a ramp between."""
    scaling = config.rope_scaling
    assert scaling is not None
    width, base, factor = config.head_dim, config.rope_theta, scaling.factor

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    gain = scaling.attention_factor
    if gain is None:
        if scaling.mscale and scaling.mscale_all_dim:
            gain = magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
        else:
            gain = magnitude(1.0)

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), gain
