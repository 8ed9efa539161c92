"""What we merge is what PEFT merges, and transformers computes with it what the adapter computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from model_foundry.export.merge import fill_merged_folder, plan_merge
from model_foundry.models.folder import read_tensors
from model_foundry.types import LoraConfig
from tests.tiny_adapters import head_adapter, write_tiny_adapter
from tests.tiny_models import random_rows

Folder = Callable[[str], Path]
VARIANTS = {
    "lora": LoraConfig(r=4, lora_alpha=6),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True),
}


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


@torch.no_grad()
def compare(base: Path, adapter: Path, target: Path, dtype: str | None = None) -> tuple[float, float]:
    """Normalised mean square error of the merged model's logits and of the base's, against PEFT's."""
    target.mkdir()
    fill_merged_folder(target, plan_merge(base, adapter), dtype=dtype, base_name="base")
    row = random_rows([24])[0][None]
    plain = load(base)(row).logits
    wanted = PeftModel.from_pretrained(load(base), str(adapter)).eval()(row).logits
    found = load(target)(row).logits
    spread = float((wanted - wanted.mean()).square().mean())
    return float((found - wanted).square().mean()) / spread, float((plain - wanted).square().mean()) / spread


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3", "gpt2"])
def test_transformers_gets_the_adapters_logits_from_the_merged_folder(
    tiny_folder: Folder, tmp_path: Path, kind: str, variant: str
) -> None:
    base = tiny_folder(kind)
    if kind == "gpt2" and variant == "dora":
        pytest.skip("PEFT has no DoRA for Conv1D of this kind")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, VARIANTS[variant])
    error, effect = compare(base, adapter, tmp_path / "merged")
    assert error < 1e-10
    assert effect > 1e-2


def test_experts(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("qwen3-moe")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, VARIANTS["lora"], scale=0.2)
    error, effect = compare(base, adapter, tmp_path / "merged")
    assert error < 1e-10
    assert effect > 1e-2


def test_an_adapter_on_a_tied_head(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama-tied")
    error, effect = compare(base, head_adapter(tmp_path / "adapter", base), tmp_path / "merged")
    assert error < 1e-10
    assert effect > 1e-2


def test_bfloat16_is_off_by_its_rounding_and_no_more(tiny_folder: Folder, tmp_path: Path) -> None:
    """Sixteen units of roundoff (2⁻⁸), for what fifteen rounded matrices and five norms add up to."""
    base = tiny_folder("llama")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, VARIANTS["lora"])
    error, effect = compare(base, adapter, tmp_path / "merged", "bfloat16")
    assert 1e-8 < error < (16 * 2**-8) ** 2
    assert effect > 30 * error


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_that_peft_merges(tiny_folder: Folder, tmp_path: Path, variant: str) -> None:
    base = tiny_folder("llama")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, VARIANTS[variant])
    theirs = PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict()
    (tmp_path / "merged").mkdir()
    fill_merged_folder(tmp_path / "merged", plan_merge(base, adapter), base_name="base")
    for name, tensor in read_tensors(tmp_path / "merged"):
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-6), name
