"""Optimizers over a model that is divided over ranks: each rank steps its own rows and keeps the moments of them.

The steps are those of `optimizer.FlatAdamW` and `muon.FlatMuon`, tensor by tensor; norm, clipping and skipping are
about the gradient of all ranks. It knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model_foundry.engine.muon import STACK_ELEMENTS, orthogonalised, update_size
from model_foundry.engine.optimizer import check_params, norm_of
from model_foundry.models.sharding import Shard
from model_foundry.types import AdamParams, MuonParams, OptimizerKind, OptimParams, OptimStepOutput

Gradients = Mapping[str, torch.Tensor]


class ShardedOptimizer:
    """Steps divided parameters (float32).

    Args:
        parameters: by name.
        sum_over_ranks: of a float64 value, the same bits on each rank.
    """

    kind: ClassVar[OptimizerKind]
    takes: ClassVar[type]

    def __init__(self, parameters: Mapping[str, Shard], sum_over_ranks: Callable[[float], float]) -> None:
        self.parameters = dict(parameters)
        self.step = 0
        self._sum = sum_over_ranks
        self._moments = {
            f"{kind}.{name}": _like(shard) for name, shard in parameters.items() for kind in self.remembered(name)
        }

    def remembered(self, name: str) -> tuple[str, ...]:
        """The kinds of moments that are kept of a parameter."""
        raise NotImplementedError

    def update(self, params: Any, gradients: Gradients) -> None:
        """Change this rank's rows by their gradients, which are finite and clipped. A collective call."""
        raise NotImplementedError

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
    def apply(self, params: OptimParams, *, gradient_scale: float = 1.0) -> OptimStepOutput:
        """One step; the gradients are cleared. Not finite on any rank: nothing changes but that. A collective call.

        Args:
            gradient_scale: the gradients are so many times too large; they are divided by it first.

        Raises:
            EngineError: hyper-parameters of another optimizer, or one that would ruin the weights; nothing was changed.
        """
        check_params(params, kind=self.kind, takes=self.takes)
        gradients = {name: _gradient(shard) for name, shard in self.parameters.items()}
        norm = math.sqrt(self._sum(sum(norm_of(each.flatten()) ** 2 for each in gradients.values()))) / gradient_scale
        if not math.isfinite(norm):
            self.zero_grad()
            return OptimStepOutput(grad_norm=norm, skipped=True, step=self.step)
        factor = 1.0 / gradient_scale
        if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
            factor *= params.grad_clip_norm / (norm + 1e-6)
        if factor != 1.0:
            torch._foreach_mul_(list(gradients.values()), factor)
        self.step += 1
        self.update(params, gradients)
        self.zero_grad()
        return OptimStepOutput(grad_norm=norm, skipped=False, step=self.step)

    def moment(self, kind: str, name: str) -> torch.Tensor:
        """This rank's rows of it."""
        return self._moments[f"{kind}.{name}"].to_local()

    def adamw(self, names: Sequence[str], gradients: Gradients, params: AdamParams | MuonParams) -> None:
        """AdamW's step of these parameters; matrices decay, vectors don't."""
        matrices = [name for name in names if len(self.parameters[name].shape) >= 2]
        vectors = [name for name in names if len(self.parameters[name].shape) < 2]
        for group, decay in ((matrices, params.weight_decay), (vectors, 0.0)):
            self._adamw([name for name in group if gradients[name].numel()], gradients, params, decay)

    def _adamw(
        self, names: list[str], gradients: Gradients, params: AdamParams | MuonParams, weight_decay: float
    ) -> None:
        """torch's fused AdamW kernel on this rank's rows."""
        if not names:
            return
        weights = [self.parameters[name].holder.to_local() for name in names]
        averages, squares = ([self.moment(kind, name) for name in names] for kind in ("exp_avg", "exp_avg_sq"))
        steps = [torch.tensor(float(self.step), device=weights[0].device) for _ in names]
        torch._fused_adamw_(
            weights, [gradients[name] for name in names], averages, squares, [], steps,
            lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2, weight_decay=weight_decay, eps=params.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def state_shards(self) -> dict[str, Shard]:
        """What is remembered of every parameter, by `exp_avg.NAME` and the like."""
        return {name: Shard(moment, None, moment.shape) for name, moment in self._moments.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Start afresh: moments zero, step zero."""
        for moment in self._moments.values():
            moment.to_local().zero_()
        self.step = 0


class ShardedAdamW(ShardedOptimizer):
    """AdamW on every parameter."""

    kind = "adamw"
    takes = AdamParams

    def remembered(self, name: str) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def update(self, params: AdamParams, gradients: Gradients) -> None:
        self.adamw(list(self.parameters), gradients, params)


class ShardedMuon(ShardedOptimizer):
    """Muon on the parameters named in `hidden`, AdamW on the others.

    A matrix is made orthogonal whole: each rank is sent one of as many matrices as there are ranks, and sends its rows
    back. Experts are not cut, so each rank does its own.

    Args:
        hidden: matrices [out, in], or stacks of them [E, out, in].
        dtype: see `muon.FlatMuon`.
    """

    kind = "muon"
    takes = MuonParams

    def __init__(
        self,
        parameters: Mapping[str, Shard],
        sum_over_ranks: Callable[[float], float],
        *,
        hidden: Collection[str],
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.dtype = [name for name in parameters if name in hidden], dtype
        super().__init__(parameters, sum_over_ranks)

    def remembered(self, name: str) -> tuple[str, ...]:
        return ("momentum",) if name in self.hidden else ("exp_avg", "exp_avg_sq")

    def update(self, params: MuonParams, gradients: Gradients) -> None:
        by_shape: dict[torch.Size, list[str]] = {}
        for name in self.hidden:
            momentum, grad = self.moment("momentum", name), gradients[name]
            momentum.lerp_(grad, 1 - params.momentum)
            # Nesterov's momentum: look one step ahead.
            grad.lerp_(momentum, params.momentum)
            by_shape.setdefault(self.parameters[name].shape, []).append(name)
        for shape, names in by_shape.items():
            rate = params.learning_rate * update_size(shape)
            for name, direction in self._directions(names, shape, gradients):
                weight = self.parameters[name].holder.to_local()
                weight.mul_(1 - params.learning_rate * params.weight_decay).add_(direction, alpha=-rate)
        self.adamw([name for name in self.parameters if name not in self.hidden], gradients, params)

    def _directions(self, names: list[str], shape: torch.Size, gradients: Gradients) -> list[tuple[str, torch.Tensor]]:
        """Each name with this rank's rows of its orthogonal update."""
        if len(shape) == 3:
            at_once = max(1, STACK_ELEMENTS // shape[1:].numel())
            return [
                (name, torch.cat([orthogonalised(part, self.dtype).float() for part in gradients[name].split(at_once)]))
                for name in names
            ]
        size = self.parameters[names[0]].holder.device_mesh.size()
        found: list[tuple[str, torch.Tensor]] = []
        for first in range(0, len(names), size):
            group = names[first : first + size]
            found += zip(group, self._exchanged([gradients[name] for name in group], group[0]), strict=True)
        return found

    def _exchanged(self, rows: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        """This rank's rows of at most as many matrices of one shape as there are ranks, made orthogonal."""
        holder = self.parameters[name].holder
        mesh, (num_out, num_in) = holder.device_mesh, holder.shape
        size, each = mesh.size(), -(-num_out // mesh.size())
        send = torch.zeros(size, each, num_in, device=rows[0].device)
        for place, part in enumerate(rows):
            send[place, : part.shape[0]] = part
        whole = torch.empty_like(send)
        dist.all_to_all_single(whole, send, group=mesh.get_group())
        if mesh.get_local_rank() < len(rows):
            matrix = whole.view(size * each, num_in)[:num_out]
            matrix.copy_(orthogonalised(matrix[None], self.dtype)[0])
        dist.all_to_all_single(send, whole, group=mesh.get_group())
        return [send[place, : part.shape[0]] for place, part in enumerate(rows)]


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
