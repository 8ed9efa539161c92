"""Adapters are PEFT's: layers chosen, logits both ways, gradients and steps the same, foreign options refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ArchitectureMismatchError, ModelError
from model_foundry.models.adapter import read_adapter_config
from model_foundry.types import AdamParams, Datum, LoraConfig
from tests.tiny_models import random_data, random_rows

pytestmark = pytest.mark.slow  # importing peft takes seconds

TinyFolder = Callable[[str], Path]
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
KINDS = ("llama-biases", "qwen3", "gpt2", "gemma")
LENGTHS = (30, 7, 61)


def lora_config(variant: str = "lora", **changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12.0} | VARIANTS[variant] | changes)


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def disturb(tensors: Mapping[str, torch.Tensor], *, seed: int = 3, amount: float = 0.1) -> None:
    """Values that a trained adapter could have: a fresh one changes nothing, so anything would equal anything."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "magnitude" in name:
            tensor.mul_(1 + 0.2 * noise)
        else:
            tensor.add_(noise * amount)


@torch.no_grad()
def our_logits(own: TorchEngine, model_id: str, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    model = own._get(model_id).language_model.eval()
    logits = model.logits(model.hidden(rows))
    return list(logits.split([len(row) for row in rows]))


@torch.no_grad()
def assert_same_logits(own: TorchEngine, model_id: str, peer: Any, *, bound: float = 1e-5) -> None:
    rows = random_rows(LENGTHS)
    for row, got in zip(rows, our_logits(own, model_id, rows), strict=True):
        want = peer(row[None]).logits[0]
        assert float((got - want).abs().max()) < bound * float(want.max() - want.min())


def adapted_layers(peer: Any) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in peer.named_modules() if hasattr(m, "lora_A")}


def peft_parameter(peer: Any, name: str) -> torch.nn.Parameter:
    """Their parameter for one of our tensor names."""
    stem, _, last = name.rpartition(".")
    theirs = f"{name}.default.weight" if last == "lora_magnitude_vector" else f"{stem}.default.{last}"
    return peer.get_parameter(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_loads_in_peft(variant: str, kind: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own, folder = engine(), tiny_folder(kind)
    model_id = own.create_model(folder, lora=lora_config(variant))
    before = our_logits(own, model_id, random_rows([20]))[0]
    assert torch.allclose(before, base(folder)(random_rows([20])[0][None]).logits[0], atol=1e-4)
    disturb(own.trained_tensors(model_id))
    own.save_weights(model_id, tmp_path)
    peer = PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval()
    assert not torch.allclose(before, peer(random_rows([20])[0][None]).logits[0], atol=1e-2)
    assert_same_logits(own, model_id, peer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_writes_loads_here(variant: str, kind: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own, folder = engine(), tiny_folder(kind)
    peer: Any = get_peft_model(
        base(folder), PeftConfig(r=4, lora_alpha=12, target_modules="all-linear", **VARIANTS[variant])
    )
    disturb({name: p for name, p in peer.named_parameters() if "lora_" in name})
    peer.eval().save_pretrained(tmp_path)
    model_id = own.create_model(folder, lora=None, adapter=tmp_path, trainable=False)
    assert_same_logits(own, model_id, peer)
    # And again on into a new folder: nothing is lost between two readings.
    own.save_weights(model_id, tmp_path)
    assert_same_logits(own, model_id, PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval())


def test_a_bfloat16_adapter_of_peft_loads_in_float32(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    own, folder = engine(), tiny_folder("llama")
    peer: Any = get_peft_model(base(folder), PeftConfig(r=4, target_modules="all-linear"))
    disturb({name: p for name, p in peer.named_parameters() if "lora_" in name})
    peer.to(torch.bfloat16).save_pretrained(tmp_path)
    model_id = own.create_model(folder, lora=None, adapter=tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in own.trained_tensors(model_id).values())
    assert_same_logits(own, model_id, PeftModel.from_pretrained(base(folder), tmp_path).eval())


def summed_loss(peer: Any, data: Sequence[Datum]) -> torch.Tensor:
    total = torch.zeros(())
    for datum in data:
        logits = peer(torch.from_numpy(datum.tokens).long()[None]).logits[0]
        targets = torch.from_numpy(datum.loss_inputs["target_tokens"]).long()
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        total = total + (losses * torch.from_numpy(datum.loss_inputs["weights"])).sum()
    return total


TRAINED = [
    *((variant, kind, "all-linear") for variant in VARIANTS for kind in KINDS),
    ("lora", "llama", ("lm_head",)),
    ("rslora", "llama-tied", ("v_proj", "down_proj", "lm_head")),
]


@pytest.mark.parametrize("variant, kind, targets", TRAINED)
def test_gradients_and_five_steps_are_pefts_with_torchs_adamw(
    variant: str, kind: str, targets: str | tuple[str, ...], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Scaling, the DoRA norm, clipping or decay a little off still trains, to another adapter."""
    own, folder = engine(), tiny_folder(kind)
    model_id = own.create_model(folder, lora=lora_config(variant, target_modules=targets))
    disturb(own.trained_tensors(model_id))
    own.save_weights(model_id, tmp_path)
    peer: Any = PeftModel.from_pretrained(base(folder), tmp_path / "adapter", is_trainable=True).eval()
    names = list(own.trained_tensors(model_id))
    theirs = [peft_parameter(peer, name) for name in names]
    groups = [
        {"params": [p for p in theirs if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-4)
    for step in range(5):
        data = random_data(LENGTHS, seed=step % 2)
        output = own.forward_backward(model_id, data)
        loss = summed_loss(peer, data)
        optimizer.zero_grad()
        loss.backward()
        assert output.loss_sum == pytest.approx(float(loss.detach()), rel=1e-5)
        grads = dict(zip(names, gradients(own, model_id), strict=True))
        # From the second step on, rounding has gone through Adam, which makes small gradients large.
        bound = 2e-5 if step == 0 else 2e-4
        scale = max(float(p.grad.abs().max()) for p in theirs if p.grad is not None)
        for name, parameter in zip(names, theirs, strict=True):
            assert parameter.grad is not None
            assert float((grads[name] - parameter.grad).abs().max()) < bound * scale
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        params = AdamParams(learning_rate=2e-3, beta2=0.95, eps=1e-4, weight_decay=0.1, grad_clip_norm=1.0)
        result = own.optim_step(model_id, params)
        optimizer.step()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for name, tensor in own.trained_tensors(model_id).items():
        assert torch.allclose(tensor, peft_parameter(peer, name), atol=5e-5), name


def gradients(own: TorchEngine, model_id: str) -> list[torch.Tensor]:
    """In the order of `trained_tensors`; gradients lie as the parameters do."""
    model = own._get(model_id)
    assert model.optimizer is not None
    by_storage = {p.data_ptr(): p.grad for p in model.optimizer.parameters.values()}
    found = [by_storage[tensor.data_ptr()] for tensor in own.trained_tensors(model_id).values()]
    return [grad for grad in found if grad is not None]


TARGETS: list[tuple[str, str | tuple[str, ...]]] = [
    ("llama", "all-linear"),
    ("llama", ("q_proj", "v_proj")),
    ("llama", r".*layers\.1\..*(q|down)_proj"),
    ("llama", ("model.layers.0.self_attn.q_proj", "up_proj")),
    ("llama", ("0.mlp.up_proj", "o_proj")),
    ("gpt2", "all-linear"),
    ("gpt2", ("c_attn",)),
    ("gpt2", ("mlp.c_proj",)),
    ("gemma", r".*self_attn\.(q|k)_proj"),
    ("mixtral", ("q_proj", "v_proj")),
    ("llama", ("lm_head",)),
    ("llama-tied", ("q_proj", "lm_head")),
]


@pytest.mark.parametrize("kind, targets", TARGETS)
def test_targets_choose_the_layers_that_peft_chooses(
    kind: str, targets: str | tuple[str, ...], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    own, folder = engine(), tiny_folder(kind)
    wanted = list(targets) if isinstance(targets, tuple) else targets
    peer = get_peft_model(base(folder), PeftConfig(r=4, lora_alpha=12, target_modules=wanted))
    model_id = own.create_model(folder, lora=lora_config(target_modules=targets))
    linears = own._get(model_id).language_model.linears()
    assert {name for name, layer in linears.items() if layer.lora_A is not None} == adapted_layers(peer)
    disturb(own.trained_tensors(model_id))
    own.save_weights(model_id, tmp_path)
    loaded = PeftModel.from_pretrained(base(folder), tmp_path / "adapter").eval()
    assert adapted_layers(loaded) == adapted_layers(peer)
    assert_same_logits(own, model_id, loaded)
    again = own.create_model(folder, lora=None, adapter=tmp_path / "adapter")
    assert_same_logits(own, again, loaded)


@pytest.mark.parametrize("targets", [("q_proj", "qproj"), ("lm_heads",), r"layers", "(", ()])
def test_a_target_that_names_no_layer_is_an_error_with_the_choices(
    targets: str | tuple[str, ...], tiny_folder: TinyFolder
) -> None:
    with pytest.raises(ModelError, match="q_proj"):
        engine().create_model(tiny_folder("llama"), lora=lora_config(target_modules=targets))


def test_an_adapter_whose_targets_go_beyond_this_model_loads_as_in_peft(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Lists like q_proj, v_proj, query_key_value are copied from model to model; PEFT takes what is there."""
    own, folder = engine(), tiny_folder("llama")
    peer: Any = get_peft_model(base(folder), PeftConfig(r=4, target_modules=["q_proj", "query_key_value"]))
    disturb({name: p for name, p in peer.named_parameters() if "lora_" in name})
    peer.eval().save_pretrained(tmp_path)
    assert_same_logits(own, own.create_model(folder, lora=None, adapter=tmp_path), peer)


REFUSED: dict[str, Any] = {
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "exclude_modules": ["q_proj"],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.weight"],
    "layer_replication": [[0, 2], [0, 2]],
    "use_qalora": True,
    "init_lora_weights": "pissa_niter_4",
    "alora_invocation_tokens": [3],
    "kasa_config": {"alpha": 1},
    "an_option_of_a_later_peft": "on",
    "peft_type": "ADALORA",
}


@pytest.mark.parametrize("key", REFUSED)
def test_options_that_change_what_is_computed_are_refused_by_name(key: str, tmp_path: Path) -> None:
    """An adapter loaded without one of these is another adapter. PiSSA, for one, changed the base weights too."""
    PeftConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    read_adapter_config(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: REFUSED[key]}))
    with pytest.raises(ModelError, match=key):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("change", [{"r": 0}, {"r": "four"}, {"r": None}, {"target_modules": None}, {"lora_alpha": []}])
def test_a_damaged_adapter_config_is_an_error_and_not_a_traceback(change: dict[str, Any], tmp_path: Path) -> None:
    PeftConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=next(iter(change))):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"r": 8}, {"lora_alpha": 3.0}, {"use_dora": True}, {"target_modules": ("q_proj",)}]
)
def test_an_adapter_of_another_shape_than_asked_for_is_refused(
    changes: dict[str, Any], tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Trained on with another scaling, it would be another function from the first step."""
    own, folder = engine(), tiny_folder("llama")
    own.save_weights(own.create_model(folder, lora=lora_config()), tmp_path)
    own.create_model(folder, lora=lora_config(), adapter=tmp_path / "adapter")
    with pytest.raises(ArchitectureMismatchError, match=next(iter(changes))):
        own.create_model(folder, lora=lora_config(**changes), adapter=tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_trains_near_float32(variant: str, kind: str, tiny_folder: TinyFolder) -> None:
    """Adapters stay float32; a dtype mix-up in one path is an error or a wrong gradient."""
    data = random_data(LENGTHS)
    results = []
    for dtype in ("float32", "bfloat16"):
        own = engine(dtype=dtype)
        model_id = own.create_model(tiny_folder(kind), lora=lora_config(variant))
        disturb(own.trained_tensors(model_id))
        loss = own.forward_backward(model_id, data).loss_sum
        assert own.forward(model_id, data).loss_sum == pytest.approx(loss, rel=0.03)
        results.append((loss, torch.cat([grad.flatten() for grad in gradients(own, model_id)])))
    (exact_loss, exact), (loss, rough) = results
    assert loss == pytest.approx(exact_loss, rel=0.03)
    assert functional.cosine_similarity(exact, rough, dim=0) > 0.99
    assert float(rough.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


def test_the_real_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: one pass and one step, against peft."""
    from model_foundry.models.finder import resolve_model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own, folder = engine(), resolve_model("smollm2-135m-instruct").folder
    model_id = own.create_model(folder, lora=lora_config())
    disturb(own.trained_tensors(model_id), amount=0.01)
    own.save_weights(model_id, tmp_path)
    peer: Any = PeftModel.from_pretrained(base(folder), tmp_path / "adapter", is_trainable=True).eval()
    assert_same_logits(own, model_id, peer)
    data = random_data((40, 16))
    loss = summed_loss(peer, data)
    loss.backward()
    assert own.forward_backward(model_id, data).loss_sum == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = [peft_parameter(peer, name) for name in own.trained_tensors(model_id)]
    scale = max(float(p.grad.abs().max()) for p in theirs if p.grad is not None)
    for grad, parameter in zip(gradients(own, model_id), theirs, strict=True):
        assert parameter.grad is not None
        assert float((grad - parameter.grad).abs().max()) < 2e-5 * scale
