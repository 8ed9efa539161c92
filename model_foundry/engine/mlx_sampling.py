"""Continuing prompts on MLX: our decoder over mlx-lm's batched key/value cache. Tokens are chosen by `sampling`.

Shapes: B sequences, S tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import torch
from mlx_lm.models.cache import BatchKVCache

from model_foundry.engine.mlx_arrays import to_mlx, to_torch
from model_foundry.engine.mlx_decoder import MlxDecoder, rotate


class MlxDecoding:
    """Sequences being continued, as `models.language_model.DecodingState` says; the cache wants padding on the left."""

    def __init__(self, decoder: MlxDecoder) -> None:
        self._decoder = decoder
        self._caches: list[BatchKVCache] = []

    def start(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        """Read prompts int64 [T_i]; logits float32 [B, V] of the next token of each."""
        longest = max(int(prompt.shape[0]) for prompt in prompts)
        padding = [longest - int(prompt.shape[0]) for prompt in prompts]
        self._caches = [BatchKVCache(padding) for _ in range(self._decoder.config.num_hidden_layers)]
        rows = [torch.nn.functional.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, padding, strict=True)]
        return self._logits(torch.stack(rows))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append int64 [B]; logits float32 [B, V]."""
        return self._logits(tokens[:, None])

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these sequences only (int64 indices)."""
        for cache in self._caches:
            cache.filter(to_mlx(rows.int()))

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """After appending int64 [B, T]."""
        decoder, (num_rows, length) = self._decoder, tokens.shape
        positions = self._caches[0].offset[:, None] + mx.arange(length)[None, :]
        cos, sin = (part[:, :, None] for part in decoder.rope(positions))

        def attend(layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            q, k, v = (x.reshape(num_rows, length, *x.shape[1:]) for x in (q, k, v))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            cache = self._caches[layer]
            mask = cache.make_mask(length, window_size=decoder.config.window(layer))
            keys, values = cache.update_and_fetch(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
            return decoder.attention(q, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3), mask).flatten(0, 1)

        hidden = decoder.run(to_mlx(tokens.int()).flatten(), attend, {}).reshape(num_rows, length, -1)[:, -1]
        logits = (hidden @ decoder.head(decoder.weights).astype(hidden.dtype).T).astype(mx.float32)
        mx.eval(logits, [cache.state[0] for cache in self._caches])
        return to_torch(logits)
