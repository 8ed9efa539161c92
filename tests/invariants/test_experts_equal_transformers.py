"""A mixture of experts computes what transformers computes: logits, every gradient, the load-balancing loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from model_foundry.engine.losses import LOSSES
from model_foundry.engine.optimizer import FlatAdamW
from model_foundry.engine.pieces import Passes
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.models.config import ModelConfig
from model_foundry.models.folder import read_config
from model_foundry.models.language_model import NativeModel, load_language_model
from model_foundry.models.randomness import DropoutCounter
from model_foundry.types import Datum
from tests.tiny_models import random_data, random_rows, write_tiny_model

pytestmark = pytest.mark.slow  # importing transformers takes seconds

LENGTHS = (30, 1, 7, 61)
CONFIGS: dict[str, dict[str, Any]] = {
    "top 2": {},
    "one expert a token": {"num_experts_per_tok": 1},
    "one expert a token, normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "all experts": {"num_experts_per_tok": 6},
    "not normalised": {"norm_topk_prob": False},
    "odd sizes": {"hidden_size": 30, "moe_intermediate_size": 7, "num_experts": 9, "num_experts_per_tok": 4},
    "a single expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "many experts, most of them idle": {"num_experts": 64, "num_experts_per_tok": 3},
    "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "layers left out": {"mlp_only_layers": [1, 2], "num_hidden_layers": 4},
    "another activation": {"hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True},
    "no experts at all": {"num_experts": 0},
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "qwen3-moe", **CONFIGS[request.param])


def theirs(folder: Path, **options: Any) -> Any:
    """Their loop over experts: the grouped kernel, their default, takes only some sizes."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True, **options
    )
    model, loading = loaded
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def summed_loss(peer: Any, data: Sequence[Datum]) -> torch.Tensor:
    total = torch.zeros(())
    for datum in data:
        logits = peer(torch.from_numpy(datum.tokens).long()[None]).logits[0]
        targets = torch.from_numpy(datum.loss_inputs["target_tokens"]).long()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        total = total + (losses * torch.from_numpy(datum.loss_inputs["weights"])).sum()
    return total


def our_gradients(own: TorchEngine, model_id: str) -> dict[str, torch.Tensor]:
    """By the names of the files: a weight and its gradient lie at the same place of the same flat buffer."""
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    out = {}
    for name, tensor in own.trained_tensors(model_id).items():
        start = (tensor.data_ptr() - optimizer.flat.data_ptr()) // 4
        out[name] = optimizer.grad[start : start + tensor.numel()].view(tensor.shape)
    return out


def their_gradients(peer: Any) -> dict[str, torch.Tensor]:
    """Experts one by one, as the files name them."""
    from transformers.core_model_loading import revert_weight_conversion

    grads = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    return dict(revert_weight_conversion(peer, grads))


def assert_same_gradients(mine: dict[str, torch.Tensor], their: dict[str, torch.Tensor], *, bound: float) -> None:
    assert mine.keys() == their.keys()
    scale = max(float(grad.abs().max()) for grad in their.values())
    for name, grad in their.items():
        assert float((mine[name] - grad).abs().max()) < bound * scale, name


@torch.no_grad()
def test_logits_are_theirs(folder: Path) -> None:
    model, peer, rows = load_language_model(folder, dtype=torch.float32), theirs(folder), random_rows(LENGTHS)
    assert model.implementation == "native"
    head = model.head
    assert head is not None
    for row, got in zip(rows, (model.hidden(rows) @ head.t()).split(LENGTHS), strict=True):
        want = peer(row[None]).logits[0]
        assert float((got - want).abs().max()) < 1e-5 * float(want.max() - want.min())


def test_every_gradient_is_theirs(folder: Path) -> None:
    """Routers too, and experts without a token, whose gradient is zero and not what lay there before."""
    own, peer, data = engine(), theirs(folder), random_data(LENGTHS)
    model_id = own.create_model(folder, lora=None)
    loss = summed_loss(peer, data)
    loss.backward()
    assert own.forward_backward(model_id, data).loss_sum == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same_gradients(our_gradients(own, model_id), their_gradients(peer), bound=2e-5)


def test_parameters_are_counted_as_theirs(folder: Path) -> None:
    config = ModelConfig.from_hf(read_config(folder))
    assert config.num_parameters == theirs(folder).num_parameters()


BALANCED: dict[str, dict[str, Any]] = {
    "top 2": {},
    "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "one expert a token": {"num_experts_per_tok": 1},
    "strong": {"router_aux_loss_coef": 0.3},
}


def balanced_folder(folder: Path, **changes: Any) -> Path:
    return write_tiny_model(folder, "qwen3-moe", output_router_logits=True, **changes)


@pytest.mark.parametrize("case", BALANCED)
def test_the_load_balancing_loss_and_its_gradients_are_theirs(case: str, tmp_path: Path) -> None:
    """Rows of one length, so that transformers sees the same batch: token losses, plus coefficient times balance."""
    folder = balanced_folder(tmp_path / "model", **BALANCED[case])
    own, peer, data = engine(), theirs(folder), random_data((24,) * 4, share_due=0.7)
    weight = sum(float(datum.loss_inputs["weights"].sum()) for datum in data)
    model_id = own.create_model(folder, lora=None)
    output = own.forward_backward(model_id, data)
    batch = torch.stack([torch.from_numpy(datum.tokens).long() for datum in data])
    result = peer(batch, output_router_logits=True)
    targets = torch.stack([torch.from_numpy(datum.loss_inputs["target_tokens"]).long() for datum in data])
    weights = torch.stack([torch.from_numpy(datum.loss_inputs["weights"]) for datum in data])
    losses = functional.cross_entropy(result.logits.flatten(0, 1), targets.flatten(), reduction="none")
    token_loss = (losses * weights.flatten()).sum()
    router_loss = weight * peer.router_aux_loss_coef * result.aux_loss
    (token_loss + router_loss).backward()
    assert output.loss_sum == pytest.approx(float(token_loss.detach()), rel=1e-5)
    assert output.router_loss == pytest.approx(float(router_loss.detach()), rel=1e-5)
    mine = our_gradients(own, model_id)
    assert_same_gradients(mine, their_gradients(peer), bound=2e-5)
    plain = engine()
    without = plain.create_model(write_tiny_model(tmp_path / "plain", "qwen3-moe", **BALANCED[case]), lora=None)
    assert plain.forward_backward(without, data).router_loss == 0
    router = "model.layers.1.mlp.gate.weight"
    assert not torch.allclose(our_gradients(plain, without)[router], mine[router], rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_splitting_a_batch_keeps_the_balance_of_the_whole_batch(checkpointing: bool, tmp_path: Path) -> None:
    """The loss is about a batch's choices: counted piece by piece it is another loss, so accumulation would matter."""
    folder, data = balanced_folder(tmp_path / "model", router_aux_loss_coef=0.3), random_data(LENGTHS + (18, 44))
    want_output, want = None, {}
    for limit in (None, 70, 1):
        own = engine(micro_batch_tokens=limit, gradient_checkpointing=checkpointing and limit is not None)
        model_id = own.create_model(folder, lora=None)
        output = own.forward_backward(model_id, data)
        if want_output is None:
            want_output, want = output, our_gradients(own, model_id)
            continue
        assert output.num_micro_batches > 1
        assert output.loss_sum == pytest.approx(want_output.loss_sum, rel=1e-6)
        assert output.router_loss == pytest.approx(want_output.router_loss, rel=1e-6)
        assert_same_gradients(our_gradients(own, model_id), want, bound=1e-5)


class SmallMachine(NativeModel):
    """A model with memory for 100 tokens; beyond, it fails as torch does, and late, with every choice recorded."""

    def hidden(self, rows: Sequence[torch.Tensor], branches: Sequence[tuple[int, ...]] = ()) -> torch.Tensor:
        hidden = super().hidden(rows, branches)
        if sum(len(row) for row in rows) > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return hidden


def test_running_out_of_memory_keeps_the_balance_of_the_whole_batch(tmp_path: Path) -> None:
    """What was counted in the attempt that failed must not count again."""
    folder = balanced_folder(tmp_path / "model", router_aux_loss_coef=0.3)
    loss, grads, outputs = LOSSES["cross_entropy"], [], []
    for kind in (NativeModel, SmallMachine):
        loaded = load_language_model(folder, dtype=torch.float32)
        assert isinstance(loaded, NativeModel)
        model = kind(loaded.decoder).train()
        optimizer = FlatAdamW(model.base_parameters())
        passes = Passes(model, DropoutCounter(), torch.device("cpu"), optimizer)
        for seed in (0, 1):
            outputs.append(passes.forward_backward(random_data((40, 30, 61), seed=seed), loss, scope="due"))
        grads.append(optimizer.grad)
    whole, pieces = outputs[:2], outputs[2:]
    for got, want in zip(pieces, whole, strict=True):
        assert got.num_micro_batches > want.num_micro_batches == 1
        assert got.router_loss == pytest.approx(want.router_loss, rel=1e-6)
    assert float((grads[1] - grads[0]).abs().max()) < 1e-5 * float(grads[0].abs().max())


def test_the_balance_is_trained_and_not_measured(tmp_path: Path) -> None:
    """A validation loss with it would not be comparable to anything."""
    own, data = engine(), random_data(LENGTHS)
    model_id = own.create_model(balanced_folder(tmp_path / "model"), lora=None)
    assert own.forward(model_id, data).router_loss == 0
    trained = own.forward_backward(model_id, data)
    assert trained.router_loss > 0
    assert own.forward(model_id, data).loss_sum == pytest.approx(trained.loss_sum, rel=1e-6)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_own(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3-moe", num_experts_per_tok=6)
    exact, peer, row = theirs(folder), theirs(folder).bfloat16(), random_rows([200])[0]
    ours = load_language_model(folder, dtype=torch.bfloat16)
    assert ours.head is not None
    want = exact(row[None]).logits[0]
    error_ours = float(((ours.hidden([row]) @ ours.head.t()).float() - want).abs().mean())
    assert error_ours < 1.2 * float((peer(row[None]).logits[0].float() - want).abs().mean())
