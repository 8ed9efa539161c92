"""Adapters on experts and routers load in PEFT with equal logits; what PEFT has not is refused, or said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ModelError
from model_foundry.models.config import ModelConfig
from model_foundry.models.folder import read_config
from model_foundry.models.memory import num_adapter_parameters
from model_foundry.types import LoraConfig
from tests.tiny_models import random_data, random_rows, write_tiny_model

pytestmark = pytest.mark.slow  # importing peft takes seconds

LENGTHS = (30, 7, 61)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base", "qwen3-moe")


def engine() -> TorchEngine:
    return TorchEngine(device="cpu", dtype="float32", num_threads=1)


def adapted_model(own: TorchEngine, folder: Path, **changes: Any) -> str:
    """A model whose adapter already changes something."""
    model_id = own.create_model(folder, lora=LoraConfig(**{"r": 4, "lora_alpha": 12.0} | changes))
    generator = torch.Generator().manual_seed(3)
    for tensor in own.trained_tensors(model_id).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model_id


def their_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@torch.no_grad()
def our_logits(own: TorchEngine, model_id: str) -> list[torch.Tensor]:
    model = own._get(model_id).language_model.eval()
    head = model.head
    assert head is not None
    return list(functional.linear(model.hidden(random_rows(LENGTHS)), head).split(LENGTHS))


@torch.no_grad()
def largest_difference(own: TorchEngine, model_id: str, peer: Any) -> float:
    """Over the range of the logits."""
    shares = []
    for row, got in zip(random_rows(LENGTHS), our_logits(own, model_id), strict=True):
        want = peer(row[None]).logits[0]
        shares.append(float((got - want).abs().max() / (want.max() - want.min())))
    return max(shares)


TARGETS: dict[str, str | tuple[str, ...]] = {
    "all-linear": "all-linear",
    "experts alone": EXPERTS,
    "down projections alone": ("down_proj",),
    "attention and router": ("q_proj", "v_proj", "gate"),
    "router alone": ("gate",),
    "everything and the router": (*ATTENTION, *EXPERTS, "gate"),
    "by expression": r".*(experts\.\d+\.\w+|self_attn\.q_proj)",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_we_write_loads_in_peft(targets: Any, rslora: bool, folder: Path, tmp_path: Path) -> None:
    """PEFT fuses gate and up at twice the rank: with a scale by the root of the rank they would come out too large."""
    own = engine()
    plain = our_logits(own, own.create_model(folder, lora=None, trainable=False))
    model_id = adapted_model(own, folder, target_modules=targets, use_rslora=rslora)
    own.save_weights(model_id, tmp_path)
    peer = PeftModel.from_pretrained(their_base(folder), tmp_path / "adapter").eval()
    assert largest_difference(own, model_id, peer) < 1e-5
    moved = max(float((a - b).abs().max()) for a, b in zip(our_logits(own, model_id), plain, strict=True))
    assert moved > 1e-2
    again = own.create_model(folder, lora=None, adapter=tmp_path / "adapter")
    assert largest_difference(own, again, peer) < 1e-5
    asked = LoraConfig(r=4, lora_alpha=12.0, target_modules=targets, use_rslora=rslora)
    own.create_model(folder, lora=asked, adapter=tmp_path / "adapter")


def test_gradients_of_adapters_on_experts_and_router_are_pefts(folder: Path, tmp_path: Path) -> None:
    own = engine()
    model_id = adapted_model(own, folder, target_modules=(*ATTENTION, *EXPERTS, "gate"))
    own.save_weights(model_id, tmp_path)
    peer: Any = PeftModel.from_pretrained(their_base(folder), tmp_path / "adapter", is_trainable=True).eval()
    data = random_data(LENGTHS)
    output, total = own.forward_backward(model_id, data), torch.zeros(())
    for datum in data:
        logits = peer(torch.from_numpy(datum.tokens).long()[None]).logits[0]
        targets = torch.from_numpy(datum.loss_inputs["target_tokens"]).long()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        total = total + (losses * torch.from_numpy(datum.loss_inputs["weights"])).sum()
    total.backward()
    assert output.loss_sum == pytest.approx(float(total.detach()), rel=1e-5)
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    mine = {}
    for name, tensor in own.trained_tensors(model_id).items():
        start = (tensor.data_ptr() - optimizer.flat.data_ptr()) // 4
        mine[name] = optimizer.grad[start : start + tensor.numel()].view(tensor.shape)
    layer = "base_model.model.model.layers.1."
    experts = peer.get_submodule(f"{layer}mlp.experts")
    # The outer wrapper is down_proj's, the inner one gate and up together: experts lie side by side along the rank.
    down_A = experts.lora_A["default"].weight.grad.view(6, 4, 12)
    fused_A = experts.base_layer.lora_A["default"].weight.grad.view(6, 8, 32)
    fused_B = experts.base_layer.lora_B["default"].weight.grad.view(24, 8, 6)
    wanted = {f"{layer}mlp.gate.lora_B.weight": peer.get_parameter(f"{layer}mlp.gate.lora_B.default.weight").grad}
    for expert in range(6):
        part = f"{layer}mlp.experts.{expert}."
        wanted |= {
            f"{part}down_proj.lora_A.weight": down_A[expert],
            f"{part}gate_proj.lora_A.weight": fused_A[expert, :4],
            f"{part}up_proj.lora_A.weight": fused_A[expert, 4:],
            f"{part}gate_proj.lora_B.weight": fused_B[:12, :4, expert],
            f"{part}up_proj.lora_B.weight": fused_B[12:, 4:, expert],
        }
    for name, grad in wanted.items():
        assert float((mine[name] - grad).abs().max()) < 2e-5 * float(grad.abs().max().clamp(min=1e-3)), name


def test_all_linear_holds_the_experts_and_not_the_router(folder: Path) -> None:
    own = engine()
    model_id = own.create_model(folder, lora=LoraConfig(r=2))
    names = own.trained_tensors(model_id)
    assert any(".experts.5.down_proj." in name for name in names)
    assert not any(".mlp.gate." in name for name in names)
    config = ModelConfig.from_hf(read_config(folder))
    assert own.describe(model_id)["trained_parameters"] == num_adapter_parameters(config, LoraConfig(r=2))


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"use_dora": True}, "lora.use_dora"),
        ({"lora_dropout": 0.1}, "lora.lora_dropout"),
        ({"target_modules": r".*experts\.[01]\..*"}, r"experts\.2"),
        ({"target_modules": ("gate",), "lora_dropout": 0.1}, "lora.lora_dropout"),
    ],
)
def test_what_peft_has_not_for_experts_is_refused(changes: dict[str, Any], word: str, folder: Path) -> None:
    """An adapter that loads nowhere else is found out about after the training."""
    with pytest.raises(ModelError, match=word):
        engine().create_model(folder, lora=LoraConfig(**changes))


@pytest.mark.parametrize(
    "kind, targets",
    [("qwen3-moe", ("q_proj", "up_proj")), ("qwen3-moe-mixed", "all-linear"), ("qwen3-moe-mixed", EXPERTS)],
)
def test_an_adapter_that_peft_cannot_use_says_so_when_it_is_made(
    kind: str, targets: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It loads here; the warning is right as long as PEFT refuses, or computes something else."""
    own, base = engine(), write_tiny_model(tmp_path / "base", kind)
    with caplog.at_level(logging.WARNING):
        model_id = adapted_model(own, base, target_modules=targets)
    assert "peft with transformers 5 cannot use this adapter" in caplog.text
    own.save_weights(model_id, tmp_path)
    again = own.create_model(base, lora=None, adapter=tmp_path / "adapter", trainable=False)
    for got, want in zip(our_logits(own, again), our_logits(own, model_id), strict=True):
        assert torch.equal(got, want)
    try:
        peer = PeftModel.from_pretrained(their_base(base), tmp_path / "adapter").eval()
    except (ValueError, RuntimeError):
        return
    assert largest_difference(own, model_id, peer) > 1e-3


def test_the_files_hold_what_is_meant(folder: Path, tmp_path: Path) -> None:
    own = engine()
    own.save_weights(adapted_model(own, folder, target_modules="all-linear", use_rslora=True), tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted([*ATTENTION, *EXPERTS])
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 24.0)
