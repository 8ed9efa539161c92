"""The head's pass for losses of pairs gives what plain autograd gives on the whole of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional

from model_foundry.engine.losses import LOSSES, choose_loss
from model_foundry.engine.pair_pass import pair_pass

WIDTH, VOCABULARY, NUM_PAIRS = 6, 13, 3
ANSWERS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6])
"""Each token's answer; the last two have no loss due."""


@dataclass
class Case:
    hidden: torch.Tensor
    head: torch.Tensor
    inputs: dict[str, torch.Tensor]


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    num = len(ANSWERS)
    weights = torch.tensor([0.5, 0.25, 1.5, 0.0])[ANSWERS // 2]
    inputs = {
        "target_tokens": torch.randint(0, VOCABULARY, (num,)), "weights": weights, "logprobs": -3 * torch.rand(num),
    }  # fmt: skip
    return Case(torch.randn(num, WIDTH), torch.randn(VOCABULARY, WIDTH), inputs)


def plain(name: str, hidden: torch.Tensor, head: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same in a line each, by autograd."""
    logprobs = -functional.cross_entropy(hidden @ head.t(), inputs["target_tokens"], reduction="none")
    member = functional.one_hot(ANSWERS, 2 * NUM_PAIRS + 1)[:, :-1].t().double()
    wholes = {"num_tokens": member.sum(1).view(-1, 2), "logprobs": (member @ inputs["logprobs"].double()).view(-1, 2)}
    loss = choose_loss(name)
    terms = loss.terms((member @ logprobs.double()).view(-1, 2), wholes, loss.settings)
    return (torch.tensor([0.5, 0.25, 1.5]) * terms).sum()


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.num_branches])
@pytest.mark.parametrize("chunk_logits", [1, 40, 10_000])
@pytest.mark.parametrize("trains_head", [False, True])
def test_loss_and_gradients_equal_plain_autograd(name: str, chunk_logits: int, trains_head: bool, case: Case) -> None:
    """Prevents a slope that is missing, of another answer, or used twice, in a head that is trained and in one that
    is not."""
    leaf, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    want = plain(name, leaf, head, case.inputs)
    d_hidden, d_head = torch.autograd.grad(want, (leaf, head))
    own = case.head.clone().requires_grad_(trains_head)
    result = pair_pass(
        case.hidden, own, choose_loss(name), case.inputs, answers=ANSWERS, num_pairs=NUM_PAIRS, backward=True,
        scale=2.0, chunk_logits=chunk_logits,
    )  # fmt: skip
    assert result.loss == pytest.approx(float(want.detach()), rel=1e-5)
    assert result.d_hidden is not None
    torch.testing.assert_close(result.d_hidden, 2 * d_hidden, rtol=1e-4, atol=1e-5)
    if trains_head:
        assert own.grad is not None
        torch.testing.assert_close(own.grad, 2 * d_head, rtol=1e-4, atol=1e-5)
    else:
        assert own.grad is None


def test_the_scale_is_one_where_none_is_given(case: Case) -> None:
    def passed(scale: float | None) -> torch.Tensor:
        given: dict[str, Any] = {} if scale is None else {"scale": scale}
        loss = choose_loss("dpo_sigmoid")
        result = pair_pass(
            case.hidden, case.head, loss, case.inputs, answers=ANSWERS, num_pairs=NUM_PAIRS, backward=True, **given
        )
        assert result.d_hidden is not None
        return result.d_hidden

    assert torch.equal(passed(None), passed(1.0))


def test_without_a_backward_pass_there_is_no_gradient(case: Case) -> None:
    head = case.head.clone().requires_grad_()
    result = pair_pass(
        case.hidden, head, choose_loss("dpo_ipo"), case.inputs, answers=ANSWERS, num_pairs=NUM_PAIRS, backward=False
    )
    assert result.loss == pytest.approx(float(plain("dpo_ipo", case.hidden, case.head, case.inputs)), rel=1e-5)
    assert result.d_hidden is None
    assert head.grad is None


@pytest.mark.parametrize("backward", [True, False])
def test_logits_without_a_head_are_taken_as_they_are(backward: bool, case: Case) -> None:
    logits = case.hidden @ case.head.t()
    leaf = logits.clone().requires_grad_()
    want = plain("dpo_sigmoid", leaf, torch.eye(VOCABULARY), case.inputs)
    (d_logits,) = torch.autograd.grad(want, leaf)
    result = pair_pass(
        logits, None, choose_loss("dpo_sigmoid"), case.inputs, answers=ANSWERS, num_pairs=NUM_PAIRS, backward=backward
    )
    assert result.loss == pytest.approx(float(want.detach()), rel=1e-5)
    if backward:
        assert result.d_hidden is not None
        torch.testing.assert_close(result.d_hidden, d_logits, rtol=1e-4, atol=1e-5)
