"""Training every weight: gradients of all of them equal plain autograd's, and what is written loads in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError
from model_foundry.models.folder import read_config
from model_foundry.types import AdamParams
from tests.tiny_models import random_data, random_rows

pytestmark = pytest.mark.slow  # importing transformers takes seconds

TinyFolder = Callable[[str], Path]
LENGTHS = (30, 7, 61)
KINDS = ("llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3-sliding", "gpt2", "gemma", "mixtral")


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def theirs(folder: Path, **options: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, loading = loaded
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def backward(peer: Any) -> float:
    total = torch.zeros(())
    for datum in random_data(LENGTHS):
        logits = peer(torch.from_numpy(datum.tokens).long()[None]).logits[0].float()
        targets = torch.from_numpy(datum.loss_inputs["target_tokens"]).long()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        total = total + (losses * torch.from_numpy(datum.loss_inputs["weights"])).sum()
    total.backward()
    return total.item()


def our_gradients(own: TorchEngine, model_id: str) -> dict[str, torch.Tensor]:
    """By the name of the parameter in transformers."""
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    found = {}
    for name, parameter in optimizer.parameters.items():
        name = name.removeprefix("wrapped.model.")
        if name.startswith("decoder."):
            name = name.removeprefix("decoder.")
            name = f"{name}.weight" if name in ("lm_head", "embed_tokens") else name
            name = name if name.startswith("lm_head") else f"model.{name}"
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def assert_gradients(got: Mapping[str, torch.Tensor], peer: Any, *, bound: float) -> None:
    want = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert got.keys() == want.keys()
    for name, grad in want.items():
        scale = float(grad.abs().max())
        assert scale > 0, name
        assert float((got[name] - grad).abs().max()) < bound * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_every_weight_is_that_of_plain_autograd(kind: str, tiny_folder: TinyFolder) -> None:
    """A tied matrix is an embedding and a head; norms, biases and experts are weights too."""
    own = engine()
    model_id = own.create_model(tiny_folder(kind), lora=None)
    peer = theirs(tiny_folder(kind), dtype=torch.float32)
    assert own.forward_backward(model_id, random_data(LENGTHS)).loss_sum == pytest.approx(backward(peer), rel=1e-5)
    assert_gradients(our_gradients(own, model_id), peer, bound=2e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-sliding", "gpt2", "gemma"])
def test_bfloat16_computes_with_float32_weights(kind: str, tiny_folder: TinyFolder) -> None:
    """A step of 1e-5 on a bfloat16 weight is lost."""
    own = engine(dtype="bfloat16")
    model_id = own.create_model(tiny_folder(kind), lora=None)
    peer = theirs(tiny_folder(kind), dtype=torch.float32)
    assert own.forward_backward(model_id, random_data(LENGTHS)).loss_sum == pytest.approx(backward(peer), rel=0.02)
    got = our_gradients(own, model_id)
    want = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, grad in want.items():
        similarity = functional.cosine_similarity(got[name].flatten(), grad.flatten(), dim=0)
        assert similarity > (0.97 if grad.ndim > 1 else 0.9), (name, float(similarity))
    before = {name: tensor.clone() for name, tensor in own.trained_tensors(model_id).items()}
    own.optim_step(model_id, AdamParams(learning_rate=1e-5))
    for name, tensor in own.trained_tensors(model_id).items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_loads_in_transformers_as_the_same_model(
    kind: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """From a base that calls itself bfloat16: transformers loads weights in the type that config.json names."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(kind), base)
    (base / "config.json").write_text(json.dumps(read_config(base) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    own = engine()
    model_id = own.create_model(base, lora=None)
    own.forward_backward(model_id, random_data(LENGTHS))
    own.optim_step(model_id, AdamParams(learning_rate=1e-2))
    own.save_weights(model_id, tmp_path)
    peer = theirs(tmp_path / "model")
    assert peer.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 259
    model = own._get(model_id).language_model.eval()
    with torch.no_grad():
        for row in random_rows(LENGTHS):
            hidden = model.hidden([row])
            got = hidden if model.head is None else functional.linear(hidden, model.head)
            want = peer(row[None]).logits[0]
            assert float((got - want).abs().max()) < 1e-5 * float(want.max() - want.min())
    before = theirs(tiny_folder(kind), dtype=torch.float32)(random_rows([20])[0][None]).logits
    assert not torch.allclose(peer(random_rows([20])[0][None]).logits, before, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_a_state_of_a_transformers_model_continues_bit_by_bit(
    kind: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Experts lie in other tensors in the file than in the model: a copy by the file's names would load nothing."""
    own = engine()
    ids = [own.create_model(tiny_folder(kind), lora=None) for _ in range(2)]
    params = AdamParams(learning_rate=1e-2)

    def step(model_id: str, number: int) -> float:
        loss = own.forward_backward(model_id, random_data(LENGTHS, seed=number)).loss_sum
        own.optim_step(model_id, params)
        return loss

    step(ids[0], 0)
    own.save_state(ids[0], tmp_path)
    own.load_state(ids[1], tmp_path, optimizer=True)
    assert step(ids[0], 1) == step(ids[1], 1)
    assert step(ids[0], 2) == step(ids[1], 2)


def test_the_context_of_a_transformers_model_is_a_limit_too(tiny_folder: TinyFolder) -> None:
    """GPT-2 calls it n_positions; a place beyond its table is an index error deep inside."""
    own = engine()
    model_id = own.create_model(tiny_folder("gpt2"), lora=None)
    own.forward(model_id, random_data((256,)))
    with pytest.raises(EngineError, match="context of 256"):
        own.forward(model_id, random_data((257,)))
