"""The head and the loss in pieces of tokens give what plain autograd gives on the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from model_foundry.engine.losses import LOSSES, choose_loss, head_pass, score
from model_foundry.errors import EngineError
from model_foundry.models.head import HeadUpdate

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


@pytest.mark.parametrize("chunk_logits", [97, 10**6])
def test_an_adapter_on_the_head_is_a_part_of_it(chunk_logits: int) -> None:
    """Its scale, its gradients and that of the hidden states: each would be missed in another way."""
    hidden, head, inputs = batch(7, 8, 97)
    head.requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    down, up = (nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((3, 8), (97, 3)))
    leaf = hidden.clone().requires_grad_()
    want = plain(leaf, head + 2.0 * up @ down, inputs)
    d_hidden, d_down, d_up = torch.autograd.grad(want, (leaf, down, up))
    update = HeadUpdate(down, up, 2.0)
    down.grad = torch.ones_like(down)
    result = head_pass(hidden, head, CROSS_ENTROPY, inputs, backward=True, update=update, chunk_logits=chunk_logits)
    assert result.loss == pytest.approx(float(want.detach()), rel=1e-5)
    assert result.d_hidden is not None
    assert torch.allclose(result.d_hidden, d_hidden, atol=1e-4)
    assert down.grad is not None
    assert up.grad is not None
    assert torch.allclose(down.grad - 1, d_down, atol=1e-3)
    assert torch.allclose(up.grad, d_up, atol=1e-3)
    frozen = HeadUpdate(nn.Parameter(down.detach(), False), nn.Parameter(up.detach(), False), 2.0)
    again = head_pass(hidden, head, CROSS_ENTROPY, inputs, backward=True, update=frozen)
    assert again.d_hidden is not None
    assert torch.allclose(again.d_hidden, d_hidden, atol=1e-4)
    assert (frozen.down.grad, frozen.up.grad) == (None, None)


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


def sampled(num_tokens: int, width: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Ratios on both sides of every clip, advantages of both signs and zero."""
    hidden, head, inputs = batch(num_tokens, width, vocab_size)
    now = functional.log_softmax(hidden @ head.detach().t(), dim=1).gather(1, inputs["target_tokens"][:, None])[:, 0]
    advantages = torch.linspace(-1.5, 1.5, num_tokens).mul(torch.arange(num_tokens) % 4 != 0)
    q = now + torch.linspace(-2.0, 2.0, num_tokens)[torch.randperm(num_tokens)]
    return hidden, head.detach(), {"target_tokens": inputs["target_tokens"], "logprobs": q, "advantages": advantages}


def by_the_book(name: str, lp: torch.Tensor, q: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    r = torch.exp(lp - q)
    return {
        "importance_sampling": lambda: -(r * a).sum(),
        "ppo": lambda: -torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum(),
        "cispo": lambda: -(r.clamp(0.0, 4.0).detach() * lp * a).sum(),
        "dro": lambda: -(lp * a - 0.5 * 0.05 * (lp - q) ** 2).sum(),
    }[name]()


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro"])
def test_losses_on_samples_equal_their_formulas(name: str) -> None:
    """A clip on the wrong side, or a gradient through CISPO's weight, trains and looks well."""
    hidden, head, inputs = sampled(41, 8, 97)
    leaf = hidden.clone().requires_grad_()
    lp = functional.log_softmax(leaf @ head.t(), dim=1).gather(1, inputs["target_tokens"][:, None])[:, 0]
    want = by_the_book(name, lp, inputs["logprobs"], inputs["advantages"])
    (d_hidden,) = torch.autograd.grad(want, leaf)
    result = head_pass(hidden, nn.Parameter(head, False), LOSSES[name], inputs, backward=True)
    assert result.loss == pytest.approx(want.item(), rel=1e-5)
    assert result.d_hidden is not None
    assert torch.allclose(result.d_hidden, d_hidden, atol=1e-5)


def test_orpo_of_an_answer_that_is_certain_is_finite() -> None:
    """Prevents NaN in every weight once a better answer has been learnt by heart: its odds are infinite then."""
    logps = torch.tensor([[0.0, -3.0], [-2.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = choose_loss("dpo_orpo")
    terms = loss.terms(logps, {"num_tokens": torch.full((3, 2), 2.0, dtype=torch.float64)}, loss.settings)
    (slopes,) = torch.autograd.grad(terms.sum(), logps)
    assert bool(torch.isfinite(terms).all())
    assert bool(torch.isfinite(slopes).all())
    assert slopes[:, 0].tolist() == pytest.approx([-0.5] * 3, abs=0.1), "what is imitated stays imitated"


def test_settings_of_a_loss_are_used_and_unknown_ones_refused() -> None:
    """A threshold that is taken and ignored trains another objective than was asked for."""
    hidden, head, inputs = sampled(41, 8, 97)
    narrow = choose_loss("ppo", {"clip_high_threshold": 1.01, "clip_low_threshold": 0.99})
    losses = [head_pass(hidden, nn.Parameter(head, False), loss, inputs, backward=False).loss
              for loss in (LOSSES["ppo"], narrow)]  # fmt: skip
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    wrong = (("ppo", {"clip": 1.0}), ("cross_entropy", {"beta": 1.0}), ("dro", {"beta": float("nan")}), ("gspo", {}),
             ("ppo", {"clip_low_threshold": 2.0, "clip_high_threshold": 1.0}))  # fmt: skip
    for name, settings in wrong:
        with pytest.raises(EngineError):
            choose_loss(name, settings)


def test_many_targets_of_a_token_are_a_distribution_over_them() -> None:
    """Top-k distillation: the gradient of a token is that of all its targets, a repeated target counted twice."""
    hidden, head, _ = batch(13, 8, 97)
    targets = torch.randint(0, 97, (13, 5))
    targets[:, 4] = targets[:, 0]
    weights = torch.rand(13, 5)
    leaf = hidden.clone().requires_grad_()
    lp = functional.log_softmax(leaf @ head.detach().t(), dim=1).gather(1, targets)
    want = -(weights * lp).sum()
    (d_hidden,) = torch.autograd.grad(want, leaf)
    inputs = {"target_tokens": targets, "weights": weights}
    result = head_pass(
        hidden, nn.Parameter(head.detach(), False), CROSS_ENTROPY, inputs, backward=True, chunk_logits=300
    )
    assert result.loss == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(result.logprobs, lp.detach(), atol=1e-5)
    assert result.d_hidden is not None
    assert torch.allclose(result.d_hidden, d_hidden, atol=1e-5)


def test_a_clip_whose_ends_have_crossed_is_refused_by_the_default_too() -> None:
    """A lone upper end of 0.5 lies below PPO's lower end of 0.8: every ratio would become 0.5."""
    with pytest.raises(EngineError, match="above clip_high_threshold"):
        choose_loss("ppo", {"clip_high_threshold": 0.5})
    assert choose_loss("ppo", {"clip_low_threshold": 1.2}).settings["clip_low_threshold"] == 1.2, (
        "equal ends are possible"
    )
    assert choose_loss("cispo", {"clip_low_threshold": 0.0}).settings["clip_low_threshold"] == 0.0


def test_an_unknown_setting_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(EngineError, match=r"the loss dro takes beta, and got gamma"):
        choose_loss("dro", {"gamma": 1.0})
    with pytest.raises(EngineError, match=r"the loss cross_entropy takes no settings, and got beta"):
        choose_loss("cross_entropy", {"beta": 1.0})


def test_cross_entropy_alone_takes_several_targets() -> None:
    """The others' inputs are one number a token; K columns of them mean nothing."""
    assert [name for name, loss in LOSSES.items() if loss.many_targets] == ["cross_entropy"]


@pytest.mark.parametrize("with_head", [True, False])
def test_no_more_logits_exist_at_once_than_were_allowed(with_head: bool) -> None:
    """Pieces of any size give the same loss: only memory tells them apart, and that only on a large vocabulary."""
    hidden, head, inputs = batch(53, 8, 97)
    logits = hidden @ head.detach().t()
    sizes: list[int] = []

    def terms(logprobs: torch.Tensor, inputs: Mapping[str, torch.Tensor], settings: object) -> torch.Tensor:
        sizes.append(logprobs.shape[0])
        return -inputs["weights"] * logprobs

    loss = replace(CROSS_ENTROPY, terms=terms)
    given = (hidden, head) if with_head else (logits, None)
    head_pass(*given, loss, inputs, backward=False, chunk_logits=970)
    assert sizes == [10, 10, 10, 10, 10, 3]
    sizes.clear()
    head_pass(*given, loss, inputs, backward=False, chunk_logits=1)
    assert sizes == [1] * 53, "one token's logits are the least"


@pytest.mark.parametrize("scale", [None, 8.0])
def test_a_loss_scale_multiplies_gradients_and_leaves_the_loss(scale: float | None) -> None:
    """Under a scale that was applied to the loss too, or divided by, a float16 run would log another run's numbers."""
    hidden, head, inputs = batch(20, 8, 97)
    logits = (hidden @ head.t()).detach().requires_grad_()
    losses = functional.cross_entropy(logits, inputs["target_tokens"], reduction="none") * inputs["weights"]
    (want,) = torch.autograd.grad(losses.sum(), logits)
    settings = {} if scale is None else {"scale": scale}
    scored = score(logits.detach(), CROSS_ENTROPY, inputs, backward=True, **settings)
    assert scored.d_logits is not None
    assert torch.allclose(scored.values, losses.detach(), rtol=1e-5)
    assert torch.allclose(scored.d_logits, want * (scale or 1.0), rtol=1e-4, atol=1e-5)


def test_losses_of_pairs_have_two_branches_and_all_others_none() -> None:
    for name in LOSSES:
        assert choose_loss(name, None).num_branches == (2 if name.startswith("dpo_") else 0), name
