"""What a GGUF conversion must carry over; the conversion itself is in tests/invariants."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from model_foundry.errors import ModelError
from model_foundry.models.gguf import _mend_tokenizer, convert_gguf, llama3_scaling, smallest_exact_dtype


def llama3_table(*, factor: float, theta: float, num: int, original: float = 8192, low: float = 1, high: float = 4):
    """The divisors as llama.cpp's converter writes them, by the three branches of the published code."""
    table = []
    for index in range(num):
        wavelength = 2 * math.pi * theta ** (index / num)
        if wavelength < original / high:
            table.append(1.0)
        elif wavelength > original / low:
            table.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return table


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_the_table(factor: float) -> None:
    """transformers drops the table, and the converted Llama 3.2 is another model beyond a few hundred tokens."""
    scaling = llama3_scaling(llama3_table(factor=factor, theta=5e5, num=32), 5e5)
    assert scaling is not None
    assert (scaling["rope_type"], scaling["factor"], scaling["original_max_position_embeddings"]) == (
        "llama3", factor, 8192,
    )  # fmt: skip


def test_a_table_of_other_parameters_is_not_taken_for_llama3() -> None:
    assert llama3_scaling(llama3_table(factor=8.0, theta=5e5, num=32, original=4096), 5e5) is None


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([1.0, 0.5, 1.0078125], torch.bfloat16),
        ([1.0, 1.0009765625], torch.float16),
        ([1.0, 1.0000001], torch.float32),
        ([1e-30], torch.float32),
        ([65536.0, 1.0009765625], torch.float32),
    ],
)
def test_no_value_changes_in_the_stored_dtype(values: list[float], dtype: torch.dtype) -> None:
    """A folder in half precision answers slightly differently from the GGUF it was made of."""
    assert smallest_exact_dtype({"weight": torch.tensor(values)}) == dtype


def write_tokenizer(folder: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": byte_level}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))


def test_digit_splitting_is_restored(tmp_path: Path) -> None:
    """Without it "\\n\\n1." becomes other tokens than SmolLM2 was trained on, and than llama.cpp reads."""
    write_tokenizer(tmp_path)
    notes = _mend_tokenizer(tmp_path, "smollm", 128)
    steps = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]
    assert len(notes) == 1


def test_an_unknown_way_of_splitting_is_said(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert "made-up" in _mend_tokenizer(tmp_path, "made-up", None)[0]
    assert _mend_tokenizer(tmp_path, "gpt-2", None) == []


def test_a_damaged_gguf_is_an_error_and_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGU")
    with pytest.raises(ModelError, match="not a GGUF"):
        convert_gguf(path, tmp_path)
