"""The losses of pairs by their published formulas, in plain arithmetic; TRL's own are in tests/invariants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from model_foundry.engine.losses import choose_loss
from model_foundry.engine.preference_losses import ALONE_TERMS, PREFERENCE_TERMS

LOGPS = ((-3.0, -7.0), (-9.0, -4.5))
REFERENCE = ((-4.0, -6.5), (-8.0, -6.0))
NUM_TOKENS = ((2.0, 5.0), (4.0, 3.0))
BETA, NOISE = 0.4, 0.2


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


# Of a pair: what the better and the worse answer have gained on the reference, in sums and in means over tokens.
Formula = Callable[[float, float, float, float], float]
FORMULAS: dict[str, Formula] = {
    "sigmoid": lambda a, b, ma, mb: -log_sigmoid(BETA * (a - b)),
    "sigmoid_norm": lambda a, b, ma, mb: -log_sigmoid(BETA * (ma - mb)),
    "hinge": lambda a, b, ma, mb: max(0.0, 1 - BETA * (a - b)),
    "ipo": lambda a, b, ma, mb: (ma - mb - 1 / (2 * BETA)) ** 2,
    "robust": lambda a, b, ma, mb: -log_sigmoid(BETA * (a - b)),
    "nca_pair": lambda a, b, ma, mb: (
        -log_sigmoid(BETA * a) - 0.5 * log_sigmoid(-BETA * a) - 0.5 * log_sigmoid(-BETA * b)
    ),
    "apo_zero": lambda a, b, ma, mb: 1 - sigmoid(BETA * a) + sigmoid(BETA * b),
    "apo_down": lambda a, b, ma, mb: sigmoid(BETA * a) + 1 - sigmoid(BETA * (a - b)),
}
SMOOTHED: dict[str, Formula] = {
    "sigmoid": lambda a, b, ma, mb: -(1 - NOISE) * log_sigmoid(BETA * (a - b)) - NOISE * log_sigmoid(-BETA * (a - b)),
    "robust": lambda a, b, ma, mb: (
        (-(1 - NOISE) * log_sigmoid(BETA * (a - b)) + NOISE * log_sigmoid(-BETA * (a - b))) / (1 - 2 * NOISE)
    ),
}


def found(name: str, **settings: float) -> list[float]:
    loss = choose_loss(f"dpo_{name}", settings)
    inputs = {"num_tokens": torch.tensor(NUM_TOKENS)}
    if "logprobs" in loss.inputs:
        inputs["logprobs"] = torch.tensor(REFERENCE)
    return loss.terms(torch.tensor(LOGPS), inputs, loss.settings).tolist()


def expected(formula: Formula) -> list[float]:
    values = []
    for logps, reference, sizes in zip(LOGPS, REFERENCE, NUM_TOKENS, strict=True):
        gains = [logp - other for logp, other in zip(logps, reference, strict=True)]
        values.append(formula(*gains, *(gain / size for gain, size in zip(gains, sizes, strict=True))))
    return values


def test_every_loss_has_a_formula() -> None:
    assert FORMULAS.keys() == PREFERENCE_TERMS.keys()
    assert [*ALONE_TERMS] == ["orpo"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula(name: str) -> None:
    assert found(name, beta=BETA) == pytest.approx(expected(FORMULAS[name]), rel=1e-5)


@pytest.mark.parametrize("name", SMOOTHED)
def test_a_smoothed_loss_is_its_formula(name: str) -> None:
    assert found(name, beta=BETA, label_smoothing=NOISE) == pytest.approx(expected(SMOOTHED[name]), rel=1e-5)


@pytest.mark.parametrize("times", [1.0, 0.01])
def test_orpo_is_its_formula(times: float) -> None:
    """Of likely answers too: only at a certain one are the odds held back."""
    logps = torch.tensor(LOGPS, dtype=torch.float64) * times
    wanted = []
    for pair, sizes in zip(logps.tolist(), NUM_TOKENS, strict=True):
        better, worse = (logp / size for logp, size in zip(pair, sizes, strict=True))
        wanted.append(-better - BETA * log_sigmoid(log_odds(better) - log_odds(worse)))
    loss = choose_loss("dpo_orpo", {"beta": BETA})
    terms = loss.terms(logps, {"num_tokens": torch.tensor(NUM_TOKENS)}, loss.settings)
    assert terms.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", [*PREFERENCE_TERMS, *ALONE_TERMS])
def test_settings_that_are_left_out_are_trls(name: str) -> None:
    """Prevents another beta than the one that the field takes for granted."""
    assert choose_loss(f"dpo_{name}").settings["beta"] == 0.1
    assert found(name) == found(name, beta=0.1)
    if name in SMOOTHED:
        assert found(name) == found(name, label_smoothing=0.0)
