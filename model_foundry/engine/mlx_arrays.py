"""Arrays of MLX and tensors of torch for one another: files are read and written by the code that torch's engine uses.

MLX arrays never change; a tensor made of one shows its memory without copying, and must not be written to.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch

DTYPES: dict[torch.dtype, mx.Dtype] = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16}
"""Compute types by torch's name, which is the one in configurations and on the disk."""


def to_mlx(tensor: torch.Tensor, dtype: mx.Dtype | None = None) -> mx.array:
    """A copy; floats of any width in `dtype`, where one is given."""
    flat = tensor.detach().cpu().contiguous()
    if flat.dtype is torch.bfloat16:
        array = mx.array(flat.view(torch.int16).numpy()).view(mx.bfloat16)
    else:
        array = mx.array(flat.numpy())
    return array if dtype is None else array.astype(dtype)


def to_torch(array: mx.array) -> torch.Tensor:
    """A view of an evaluated array on the CPU, of the same type; float32 and bfloat16."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16), copy=False)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=False))
