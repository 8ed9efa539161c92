"""torch tensors of every kind survive the writer that does not import torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.checkpoint.tensors import read_tensors, write_tensors

pytestmark = pytest.mark.slow


def test_torch_tensors_come_back_bit_for_bit_and_files_equal_the_librarys(tmp_path: Path) -> None:
    """Prevents bfloat16, views, gradients or empty tensors from being refused or rounded on the way."""
    import torch
    from safetensors.torch import save

    torch.manual_seed(0)
    tensors = {
        "bfloat16": torch.randn(7, 3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(5, 4)),
        "view": torch.randn(6, 5).t()[1:4],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(3).half(),
        "rng": torch.get_rng_state(),
    }
    write_tensors(tmp_path / "a", tensors)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "a").read_bytes() == save(plain)
    read = read_tensors(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, tensor in plain.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
