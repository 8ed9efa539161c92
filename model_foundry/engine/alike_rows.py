"""Whether rows of one length may be attended to in one call: each then has the bits that it has alone.

It knows attention. It does not know whose rows they are.
"""

from __future__ import annotations

import torch

from model_foundry.models.attention import attend_packed
from model_foundry.models.config import ModelConfig
from model_foundry.models.packed_rows import PackedRows
from model_foundry.models.tiled_attention import is_for


class AlikeRows:
    """Tries every (length of a row, number of rows) once, forward and backward."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
        self._tried: dict[tuple[int, int], bool] = {}

    def __call__(self, num_tokens: int, num_rows: int) -> bool:
        key = num_tokens, num_rows
        if key not in self._tried:
            each_alone = num_rows == 1 or is_for(self._device, self._dtype)
            self._tried[key] = each_alone or all(self._holds(*key, window) for window in self._windows)
        return self._tried[key]

    def _holds(self, num_tokens: int, num_rows: int, window: int | None) -> bool:
        config, drawn = self._config, torch.Generator().manual_seed(0)
        heads, num_kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def draw(num_heads: int) -> torch.Tensor:
            # Magnitudes of many orders, so that the order in which they are added shows.
            values = torch.randn(num_rows * num_tokens, num_heads, width, generator=drawn)
            return (values * torch.exp2(torch.randint(-4, 2, values.shape, generator=drawn))).to(
                self._device, self._dtype
            )

        inputs, grad = [draw(heads), draw(num_kv), draw(num_kv)], draw(heads)
        angles = torch.rand(num_rows * num_tokens, 1, width // 2, generator=drawn) * 6
        rope = [part.to(self._device, self._dtype) for part in (angles.cos(), angles.sin()) * 2]

        def attended(first: int, rows: int) -> list[torch.Tensor]:
            part = slice(first * num_tokens, (first + rows) * num_tokens)
            with torch.enable_grad():
                q, k, v = (each[part].clone().requires_grad_() for each in inputs)
                lengths = PackedRows.of([num_tokens] * rows, self._device)
                out = attend_packed(q, k, v, tuple(each[part] for each in rope), lengths, window)
                return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad[part])]

        whole = attended(0, num_rows)
        alone = [torch.cat(parts) for parts in zip(*(attended(row, 1) for row in range(num_rows)), strict=True)]
        return all(torch.equal(one, other) for one, other in zip(whole, alone, strict=True))
