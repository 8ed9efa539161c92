"""AdamW over a model that is divided over ranks: each rank steps its own rows and keeps their moments.

The step is `optimizer.FlatAdamW`'s, tensor by tensor; norm, clipping and skipping are about the gradient of all ranks.
It knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch.distributed.tensor import DTensor

from model_foundry.engine.optimizer import check_params, norm_of
from model_foundry.models.sharding import Shard
from model_foundry.types import AdamParams, OptimizerKind, OptimStepOutput


class ShardedAdamW:
    """Steps divided parameters (float32).

    Args:
        parameters: by name.
        sum_over_ranks: of a float64 value, the same bits on each rank.
    """

    kind: ClassVar[OptimizerKind] = "adamw"
    takes: ClassVar[type] = AdamParams

    def __init__(self, parameters: Mapping[str, Shard], sum_over_ranks: Callable[[float], float]) -> None:
        self.parameters = dict(parameters)
        self.step = 0
        self._sum = sum_over_ranks
        self._moments = {
            f"{kind}.{name}": _like(shard) for name, shard in parameters.items() for kind in ("exp_avg", "exp_avg_sq")
        }

    @property
    def num_parameters(self) -> int:
        """On all ranks together."""
        return sum(shard.shape.numel() for shard in self.parameters.values())

    @property
    def num_remembered(self) -> int:
        """Numbers kept from step to step, on all ranks together."""
        return sum(moment.shape.numel() for moment in self._moments.values())

    def zero_grad(self) -> None:
        for shard in self.parameters.values():
            shard.holder.grad = None

    @torch.no_grad()
    def apply(self, params: AdamParams) -> OptimStepOutput:
        """One step; the gradients are cleared. Not finite on any rank: nothing changes but that. A collective call.

        Raises:
            EngineError: hyper-parameters of another optimizer, or one that would ruin the weights; nothing was changed.
        """
        check_params(params, kind=self.kind, takes=self.takes)
        gradients = {name: _gradient(shard) for name, shard in self.parameters.items()}
        norm = math.sqrt(self._sum(sum(norm_of(each.flatten()) ** 2 for each in gradients.values())))
        if not math.isfinite(norm):
            self.zero_grad()
            return OptimStepOutput(grad_norm=norm, skipped=True, step=self.step)
        if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
            torch._foreach_mul_(list(gradients.values()), params.grad_clip_norm / (norm + 1e-6))
        self.step += 1
        matrices = [name for name, shard in self.parameters.items() if len(shard.shape) >= 2]
        vectors = [name for name, shard in self.parameters.items() if len(shard.shape) < 2]
        for names, decay in ((matrices, params.weight_decay), (vectors, 0.0)):
            self._adamw([name for name in names if gradients[name].numel()], gradients, params, decay)
        self.zero_grad()
        return OptimStepOutput(grad_norm=norm, skipped=False, step=self.step)

    def _adamw(
        self, names: list[str], gradients: Mapping[str, torch.Tensor], params: AdamParams, weight_decay: float
    ) -> None:
        """torch's fused AdamW kernel on this rank's rows."""
        if not names:
            return
        weights = [self.parameters[name].holder.to_local() for name in names]
        averages, squares = (
            [self._moments[f"{kind}.{name}"].to_local() for name in names] for kind in ("exp_avg", "exp_avg_sq")
        )
        steps = [torch.tensor(float(self.step), device=weights[0].device) for _ in names]
        torch._fused_adamw_(
            weights, [gradients[name] for name in names], averages, squares, [], steps,
            lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2, weight_decay=weight_decay, eps=params.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def state_shards(self) -> dict[str, Shard]:
        """Both moments of every parameter, by `exp_avg.NAME` and `exp_avg_sq.NAME`."""
        return {name: Shard(moment, None, moment.shape) for name, moment in self._moments.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Start afresh: moments zero, step zero."""
        for moment in self._moments.values():
            moment.to_local().zero_()
        self.step = 0


@torch.no_grad()
def _like(shard: Shard) -> DTensor:
    holder = shard.holder
    local = torch.zeros_like(holder.to_local())
    return DTensor.from_local(
        local, holder.device_mesh, holder.placements, run_check=False, shape=holder.shape, stride=holder.stride()
    )


def _gradient(shard: Shard) -> torch.Tensor:
    """This rank's rows of it; zeros where nothing is pending."""
    gradient = shard.holder.grad
    if gradient is None:
        return torch.zeros_like(shard.holder.to_local())
    assert isinstance(gradient, DTensor)
    return gradient.to_local()
