"""Losses of pairs: elementwise arithmetic on how likely a better and a worse answer are as wholes, beside a reference.

DPO: Rafailov et al. 2023; smoothed (cDPO): Mitchell 2023. IPO: Azar et al. 2024. Hinge (SLiC): Zhao et al. 2023. Robust
DPO: Chowdhury et al. 2024. NCA: Chen et al. 2024. APO: D'Oosterlinck et al. 2024. ORPO, which has no reference: Hong et
al. 2024. The arithmetic is TRL's.

Shapes: R pairs; [R, 2] is better and worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

Inputs = Mapping[str, torch.Tensor]
Settings = Mapping[str, float]


def _ratios(logps: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[R, 2]: log of how much likelier an answer is than under the reference."""
    return logps - inputs["logprobs"]


def _delta(logps: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[R]: by how much the better answer gained on the worse."""
    better, worse = _ratios(logps, inputs).unbind(1)
    return better - worse


def _delta_a_token(logps: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[R]: the same of means over tokens, so that longer answers do not weigh more."""
    better, worse = (_ratios(logps, inputs) / inputs["num_tokens"]).unbind(1)
    return better - worse


def _sigmoid(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    delta, noise = settings["beta"] * _delta(logps, inputs), settings["label_smoothing"]
    return -functional.logsigmoid(delta) * (1 - noise) - functional.logsigmoid(-delta) * noise


def _sigmoid_norm(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    return -functional.logsigmoid(settings["beta"] * _delta_a_token(logps, inputs))


def _hinge(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    return torch.relu(1 - settings["beta"] * _delta(logps, inputs))


def _ipo(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    return (_delta_a_token(logps, inputs) - 1 / (2 * settings["beta"])).square()


def _robust(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    delta, noise = settings["beta"] * _delta(logps, inputs), settings["label_smoothing"]
    return (-functional.logsigmoid(delta) * (1 - noise) + functional.logsigmoid(-delta) * noise) / (1 - 2 * noise)


def _nca_pair(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    better, worse = (settings["beta"] * _ratios(logps, inputs)).unbind(1)
    return -functional.logsigmoid(better) - 0.5 * functional.logsigmoid(-better) - 0.5 * functional.logsigmoid(-worse)


def _apo_zero(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    better, worse = (settings["beta"] * _ratios(logps, inputs)).unbind(1)
    return 1 - torch.sigmoid(better) + torch.sigmoid(worse)


def _apo_down(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    better, worse = (settings["beta"] * _ratios(logps, inputs)).unbind(1)
    return torch.sigmoid(better) + 1 - torch.sigmoid(better - worse)


_SURE = -1e-7
"""Mean log-probability above which an answer's odds count as that: at 0 they are infinite, and their slope is NaN."""


def _orpo(logps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """Imitate the better answer, and make its odds better than the worse one's; both a token (means)."""
    means = logps / inputs["num_tokens"]
    better, worse = (_log_odds(means.clamp(max=_SURE))).unbind(1)
    return -means[:, 0] - settings["beta"] * functional.logsigmoid(better - worse)


def _log_odds(logp: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p))"""
    return logp - torch.log(-torch.expm1(logp))


_BETA = {"beta": 0.1}
_SMOOTHED = {"beta": 0.1, "label_smoothing": 0.0}
PREFERENCE_TERMS: dict[str, tuple[Callable[[torch.Tensor, Inputs, Settings], torch.Tensor], Settings]] = {
    "sigmoid": (_sigmoid, _SMOOTHED),
    "sigmoid_norm": (_sigmoid_norm, _BETA),
    "hinge": (_hinge, _BETA),
    "ipo": (_ipo, _BETA),
    "robust": (_robust, _SMOOTHED),
    "nca_pair": (_nca_pair, _BETA),
    "apo_zero": (_apo_zero, _BETA),
    "apo_down": (_apo_down, _BETA),
}
"""`terms(logps [R, 2], inputs, settings)` → [R], and the settings with their defaults. Inputs are `logprobs`, the
reference's sums, and `num_tokens`, both [R, 2]."""
ALONE_TERMS: dict[str, tuple[Callable[[torch.Tensor, Inputs, Settings], torch.Tensor], Settings]] = {
    "orpo": (_orpo, _BETA),
}
"""The same without a reference: the input is `num_tokens` alone."""
