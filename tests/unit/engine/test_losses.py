"""The head and the loss in pieces of tokens give what plain autograd gives on the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from model_foundry.engine.losses import LOSSES, head_pass

CROSS_ENTROPY = LOSSES["cross_entropy"]


def batch(num_tokens: int, width: int, vocab_size: int) -> tuple[torch.Tensor, nn.Parameter, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    inputs = {"target_tokens": torch.randint(0, vocab_size, (num_tokens,)), "weights": torch.rand(num_tokens) + 0.1}
    return torch.randn(num_tokens, width), nn.Parameter(torch.randn(vocab_size, width)), inputs


def plain(hidden: torch.Tensor, head: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = functional.cross_entropy(hidden @ head.t(), inputs["target_tokens"], reduction="none")
    return (losses * inputs["weights"]).sum()


@pytest.mark.parametrize("num_tokens", [1, 50, 53])
@pytest.mark.parametrize("chunk_logits", [1, 970, 12_500_000])
def test_loss_and_gradients_equal_plain_autograd(num_tokens: int, chunk_logits: int) -> None:
    hidden, head, inputs = batch(num_tokens, 8, 97)
    leaf = hidden.clone().requires_grad_()
    want = plain(leaf, head, inputs)
    d_hidden, d_head = torch.autograd.grad(want, (leaf, head))
    head.grad = torch.ones_like(head)
    result = head_pass(hidden, head, CROSS_ENTROPY, inputs, backward=True, chunk_logits=chunk_logits)
    assert result.loss == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(-result.logprobs @ inputs["weights"], want, rtol=1e-5)
    assert result.d_hidden is not None
    assert torch.allclose(result.d_hidden, d_hidden, atol=1e-5)
    assert torch.allclose(head.grad - 1, d_head, atol=1e-4), "the head's gradient is added to what is there"


def test_a_frozen_head_gets_no_gradient_and_a_forward_pass_none_at_all() -> None:
    hidden, head, inputs = batch(5, 4, 9)
    assert head_pass(hidden, head, CROSS_ENTROPY, inputs, backward=False).d_hidden is None
    head.requires_grad_(False)
    head_pass(hidden, head, CROSS_ENTROPY, inputs, backward=True)
    assert head.grad is None


def test_logits_without_a_head_are_left_as_they_were() -> None:
    hidden, head, inputs = batch(7, 4, 9)
    logits = (hidden @ head.detach().t()).requires_grad_()
    before = logits.detach().clone()
    want = (functional.cross_entropy(logits, inputs["target_tokens"], reduction="none") * inputs["weights"]).sum()
    (d_logits,) = torch.autograd.grad(want, logits)
    result = head_pass(logits.detach(), None, CROSS_ENTROPY, inputs, backward=True)
    assert torch.equal(logits, before)
    assert result.d_hidden is not None
    assert torch.allclose(result.d_hidden, d_logits, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_beyond_the_range_of_floats_has_a_finite_exact_loss(dtype: torch.dtype) -> None:
    """log of a probability that underflowed is minus infinity, and the step is lost."""
    logits = torch.tensor([[0.0, 300.0, -300.0], [0.0, 0.0, -64.0]], dtype=dtype)
    inputs = {"target_tokens": torch.tensor([2, 0]), "weights": torch.ones(2)}
    result = head_pass(logits, None, CROSS_ENTROPY, inputs, backward=True)
    assert result.logprobs.tolist() == pytest.approx([-600.0, -0.693147], rel=1e-6)
    assert result.d_hidden is not None
    assert result.d_hidden.float().tolist()[0] == [0.0, 1.0, -1.0]


def test_a_nearly_certain_token_keeps_its_loss_and_gradient_in_bfloat16() -> None:
    """Probabilities rounded to bfloat16 are 1 from 0.998 on: such tokens would count as learnt."""
    logits = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16)
    inputs = {"target_tokens": torch.tensor([0]), "weights": torch.ones(1)}
    result = head_pass(logits, None, CROSS_ENTROPY, inputs, backward=True)
    assert result.loss == pytest.approx(0.000911466, rel=1e-3)
    assert result.d_hidden is not None
    assert result.d_hidden.float().tolist()[0] == pytest.approx([-0.000911051, 0.000911051], rel=1e-2)


def test_nothing_due_is_a_loss_of_nothing() -> None:
    hidden, head, inputs = batch(0, 4, 9)
    result = head_pass(hidden, head, CROSS_ENTROPY, inputs, backward=True)
    assert (result.loss, result.logprobs.shape, head.grad) == (0.0, (0,), None)


def test_a_logit_that_is_no_number_is_a_loss_that_is_none() -> None:
    logits = torch.tensor([[0.0, float("nan")]])
    inputs = {"target_tokens": torch.tensor([0]), "weights": torch.ones(1)}
    result = head_pass(logits, None, CROSS_ENTROPY, inputs, backward=True)
    assert result.loss != result.loss
