"""An adapter in its base's weights: exactly what PEFT's layout says, once, into the right base only."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.export.merge import HEAD, MARKER, fill_merged_folder, plan_merge, read_updates
from model_foundry.models.adapter import load_adapter_tensors, read_adapter_config, read_adapter_tensors
from model_foundry.models.folder import read_config, read_tensors
from model_foundry.models.language_model import load_language_model
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.types import LoraConfig
from tests.tiny_adapters import head_adapter, write_tiny_adapter
from tests.tiny_models import random_rows, write_tiny_model

Folder = Callable[[str], Path]
VARIANTS = {
    "lora": LoraConfig(r=4, lora_alpha=6),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "few-layers": LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "down_proj")),
}


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = load_language_model(folder, dtype=torch.float32)
    if adapter is not None:
        linears = model.linears()
        adapt(linears, read_adapter_config(adapter), seed=0, counter=DropoutCounter(), every_target=False)
        load_adapter_tensors(linears, read_adapter_tensors(adapter), where="test")
    model.eval()
    with torch.no_grad():
        hidden, head = model.hidden(random_rows([9, 14])), model.head
    return hidden if head is None else hidden @ head.t()


def merge_to(target: Path, base: Path, adapter: Path | None, dtype: str | None = None, **options: int) -> Path:
    target.mkdir()
    fill_merged_folder(target, plan_merge(base, adapter), dtype=dtype, base_name="base", **options)
    return target


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_merged_model_computes_what_the_adapter_does(
    tiny_folder: Folder, tmp_path: Path, kind: str, variant: str
) -> None:
    """A wrong scale, a forgotten magnitude, an adapter that is dropped."""
    base = tiny_folder(kind)
    adapter = write_tiny_adapter(tmp_path / "adapter", base, VARIANTS[variant])
    merged = merge_to(tmp_path / "merged", base, adapter)
    wanted = logits(base, adapter)
    assert (logits(merged) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert (logits(base) - wanted).abs().max() > 0.05


def test_experts_are_merged_one_by_one(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("qwen3-moe")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=2, lora_alpha=4))
    assert any(".experts." in name for name in read_updates(adapter))
    merged = merge_to(tmp_path / "merged", base, adapter)
    assert (logits(merged) - logits(base, adapter)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama-tied", "llama"])
def test_an_adapted_head_is_untied_from_the_embedding(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    """Added to the shared matrix, the head's update would change the embedding as well."""
    base = tiny_folder(kind)
    adapter = head_adapter(tmp_path / "adapter", base)
    merged = merge_to(tmp_path / "merged", base, adapter)
    before, after = dict(read_tensors(base)), dict(read_tensors(merged))
    assert read_config(merged)["tie_word_embeddings"] is False
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    head = before.get(HEAD, before["model.embed_tokens.weight"])
    update = read_updates(adapter)[HEAD]
    assert torch.allclose(after[HEAD], head + update.scaling * update.up @ update.down, atol=1e-6)
    assert (logits(merged) - logits(base)).abs().max() > 0.05


def test_a_tied_model_stays_tied_and_its_head_is_not_written_twice(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama-tied")
    merged = merge_to(tmp_path / "merged", base, write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=2)))
    assert read_config(merged)["tie_word_embeddings"] is True
    assert HEAD not in dict(read_tensors(merged))


def test_values_are_rounded_once(tiny_folder: Folder, tmp_path: Path) -> None:
    """Adding a bfloat16 update to a bfloat16 weight rounds three times, and loses small updates altogether."""
    base = tiny_folder("llama")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=4, lora_alpha=8))
    exact = dict(read_tensors(merge_to(tmp_path / "exact", base, adapter)))
    merge = plan_merge(base, adapter)
    for name, tensor in merge.weights(torch.bfloat16):
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    assert 0 < merge.rounding.share < 0.05
    assert merge.rounding.num_tensors == len(merge.updates) == 14


def test_the_type_is_written_down(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama")
    merged = merge_to(tmp_path / "merged", base, None, "bfloat16")
    assert read_config(merged)["dtype"] == read_config(merged)["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for _, tensor in read_tensors(merged)} == {torch.bfloat16}
    assert not (merged / MARKER).exists()


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=2, lora_alpha=1e7))
    with pytest.raises(ModelError, match="float16"):
        merge_to(tmp_path / "merged", base, adapter, "float16")


def test_one_weight_is_held_at_a_time(tiny_folder: Folder, tmp_path: Path) -> None:
    """A model larger than memory can still be merged."""
    base = tiny_folder("llama")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=2))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    for _, tensor in plan_merge(base, adapter).weights(torch.bfloat16):
        alive.add(tensor)
        del tensor
        gc.collect(0)
        most = max(most, len(alive))
    assert most <= 2
    merged = merge_to(tmp_path / "merged", base, adapter, max_shard_bytes=20_000)
    assert len(list(merged.glob("*.safetensors"))) > 3
    assert (logits(merged) - logits(base, adapter)).abs().max() < 1e-4


def test_merging_twice_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    """It would double what the adapter does, and the result would load without a word."""
    base = tiny_folder("llama")
    adapter = write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=2))
    merged = merge_to(tmp_path / "merged", base, adapter)
    with pytest.raises(ModelError, match="already"):
        plan_merge(merged, adapter)
    other = write_tiny_adapter(tmp_path / "other", base, LoraConfig(r=2), seed=5)
    with pytest.raises(ModelError, match="merged model"):
        plan_merge(merged, other)


def test_an_adapter_says_which_weights_it_was_trained_on(tiny_folder: Folder, tmp_path: Path) -> None:
    """A merged folder without its marker, and any other base of the same shape."""
    base = tiny_folder("llama")
    adapter = write_tiny_adapter(tmp_path / "final" / "adapter", base, LoraConfig(r=2), manifest=True)
    merged = merge_to(tmp_path / "merged", base, adapter)
    (merged / MARKER).unlink()
    with pytest.raises(ArchitectureMismatchError, match="other weights"):
        plan_merge(merged, adapter)


def test_an_adapter_trained_on_a_merged_model_is_merged_into_it(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("llama")
    merged = merge_to(tmp_path / "one", base, write_tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=2)))
    second = write_tiny_adapter(tmp_path / "final" / "adapter", merged, LoraConfig(r=2), seed=3, manifest=True)
    assert plan_merge(merged, second).updates


def test_an_adapter_of_another_shape_names_the_weight(tiny_folder: Folder, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", tiny_folder("llama"), LoraConfig(r=2))
    with pytest.raises(ArchitectureMismatchError, match=r"k_proj.weight of shape \(16, 32\)"):
        plan_merge(tiny_folder("llama-tied"), adapter)
    deep = write_tiny_model(tmp_path / "deep", num_hidden_layers=3)
    adapter = write_tiny_adapter(tmp_path / "deep-adapter", deep, LoraConfig(r=2))
    with pytest.raises(ArchitectureMismatchError, match=r"layers\.2\..* which the base lacks"):
        plan_merge(tiny_folder("llama"), adapter)


def test_parts_that_are_no_low_rank_update_are_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    """PEFT's embedding adapters and extra modules would silently be left out."""
    from safetensors.torch import load_file, save_file

    adapter = write_tiny_adapter(tmp_path / "adapter", tiny_folder("llama"), LoraConfig(r=2))
    tensors = load_file(adapter / "adapter_model.safetensors")
    extra = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 260)}
    save_file(tensors | extra, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lora_embedding_A"):
        plan_merge(tiny_folder("llama"), adapter)
    first = next(iter(tensors))
    save_file({name: value for name, value in tensors.items() if name != first}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="lacks"):
        plan_merge(tiny_folder("llama"), adapter)


def test_the_scale_is_the_configurations(tiny_folder: Folder, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, use_rslora=True)
    adapter = write_tiny_adapter(tmp_path / "adapter", tiny_folder("llama"), lora)
    assert {update.scaling for update in read_updates(adapter).values()} == {3.0}
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    assert {update.scaling for update in read_updates(adapter).values()} == {replace(lora, use_rslora=False).scaling}
