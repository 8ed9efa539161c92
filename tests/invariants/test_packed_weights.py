"""QLoRA: four-bit weights under adapters compute what their unpacked values compute, are trained on, and are refused
where they cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import MissingExtraError, ModelError
from model_foundry.models import memory
from model_foundry.models.config import ModelConfig
from model_foundry.models.folder import read_config, read_tensors, write_model_folder
from model_foundry.models.language_model import NativeModel
from model_foundry.models.packing import PackedLinear, PackedStack, choose_packing
from model_foundry.types import AdamParams, LoraConfig
from tests.tiny_models import random_data, random_rows

TinyFolder = Callable[[str], Path]
KINDS = ("llama-biases", "qwen3", "qwen3-moe")
LENGTHS = (30, 7, 61)
CPU = torch.device("cpu")


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def packed_engine() -> TorchEngine:
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    return engine(quantization="nf4")


def unpacked_folder(own: TorchEngine, model_id: str, source: Path, target: Path) -> Path:
    """The model's folder with every packed weight as it comes out again."""
    model = own._get(model_id).language_model
    assert isinstance(model, NativeModel)
    tensors = dict(read_tensors(source))
    for name, module in model.decoder.named_modules():
        if isinstance(module, PackedLinear):
            tensors[f"model.{name}.weight"] = module.matrix
        elif isinstance(module, PackedStack):
            for expert in range(module.shape[0]):
                before, projection = name.rsplit(".", 1)
                tensors[f"model.{before}.{expert}.{projection}.weight"] = module._unpack[expert]()
    write_model_folder(target, read_config(source), tensors.items(), tokenizer_from=source)
    return target


def gradient(own: TorchEngine, model_id: str) -> torch.Tensor:
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    return optimizer.grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_weights_compute_what_their_unpacked_values_compute(
    kind: str, targets: Any, checkpointing: bool, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """A weight unpacked transposed, or another in the backward pass, still trains to something."""
    packed = packed_engine()
    packed.gradient_checkpointing = checkpointing
    lora, data = LoraConfig(r=4, target_modules=targets), random_data(LENGTHS)
    first = packed.create_model(tiny_folder(kind), lora=lora)
    plain = engine()
    second = plain.create_model(unpacked_folder(packed, first, tiny_folder(kind), tmp_path / "out"), lora=lora)
    for own, model_id in ((packed, first), (plain, second)):
        generator = torch.Generator().manual_seed(1)
        for tensor in own.trained_tensors(model_id).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    got, want = packed.forward_backward(first, data), plain.forward_backward(second, data)
    assert got.loss_sum == pytest.approx(want.loss_sum, rel=1e-6)
    mine, theirs = gradient(packed, first), gradient(plain, second)
    assert float((mine - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())
    exact = engine()
    original = exact.forward(exact.create_model(tiny_folder(kind), lora=lora), data).loss_sum
    assert got.loss_sum != pytest.approx(original, rel=1e-4), "nothing was packed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_the_adapter_is_an_ordinary_one(kind: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own, data = packed_engine(), random_data(LENGTHS)
    model_id = own.create_model(tiny_folder(kind), lora=LoraConfig(r=8, lora_alpha=32.0))
    start = own.forward(model_id, data).loss_sum
    for _ in range(30):
        own.forward_backward(model_id, data)
        own.optim_step(model_id, AdamParams(learning_rate=5e-3))
    assert own.forward(model_id, data).loss_sum < 0.5 * start
    own.save_state(model_id, tmp_path)
    plain = engine()
    again = plain.create_model(tiny_folder(kind), lora=None, adapter=tmp_path / "adapter", trainable=False)
    assert plain.forward(again, data).loss_sum < 0.7 * start
    config = ModelConfig.from_hf(read_config(tiny_folder(kind)))
    assert own.describe(model_id)["base_parameters"] == config.num_parameters


@pytest.mark.slow
@torch.no_grad()
def test_bytes_of_packed_weights_are_those_that_the_plan_counts(tiny_folder: TinyFolder) -> None:
    """A scale a block more or less is a gigabyte at thirty billion weights."""
    packing = choose_packing("nf4", CPU) if packed_engine() else None
    assert packing is not None
    weights = torch.randn(256, 64 * 256)
    unpack = packing(weights)
    cells = [cell.cell_contents for cell in unpack.__closure__ or ()]
    packed = next(cell for cell in cells if isinstance(cell, torch.Tensor))
    state = next(cell for cell in cells if not isinstance(cell, torch.Tensor) and hasattr(cell, "absmax"))
    scales = [state.absmax, state.state2.absmax]
    num_bytes = sum(part.numel() * part.element_size() for part in (packed, *scales))
    assert num_bytes * 8 / weights.numel() == pytest.approx(memory.NF4_BITS, rel=1e-6)
    assert float((unpack() - weights).norm() / weights.norm()) < 0.1


def test_sampling_from_a_packed_model_is_sampling_from_its_values(tiny_folder: TinyFolder) -> None:
    own = packed_engine()
    model_id = own.create_model(tiny_folder("qwen3-moe"), lora=None, trainable=False)
    model = own._get(model_id).language_model
    state = model.decoding(1, 30)
    row = random_rows([12])[0]
    stepped = state.start([row[:11]])
    stepped = state.step(row[11:12])
    head = model.head
    assert head is not None
    with torch.no_grad():
        want = functional.linear(model.hidden([row]), head)[-1]
    assert float((stepped[0] - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_packed_weights_are_refused_where_every_weight_is_to_be_trained(tiny_folder: TinyFolder) -> None:
    with pytest.raises(ModelError, match=r"lora\.enabled"):
        engine(quantization="nf4").create_model(tiny_folder("llama"), lora=None)


def test_packed_weights_are_refused_for_what_transformers_runs(tiny_folder: TinyFolder) -> None:
    own = engine(quantization="nf4", implementation="transformers")
    with pytest.raises(ModelError, match="native decoder"):
        own.create_model(tiny_folder("llama"), lora=LoraConfig())


def test_a_missing_library_is_named_with_its_extra(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"model-foundry\[quant\]"):
        engine(quantization="nf4").create_model(tiny_folder("llama"), lora=LoraConfig())


def test_a_device_without_kernels_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="mps"):
        choose_packing("nf4", torch.device("mps"))
