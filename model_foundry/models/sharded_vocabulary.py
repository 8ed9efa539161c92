"""Embedding and head of a divided decoder: each rank keeps its rows of the vocabulary, weights, gradients and moments.

The embedding is never put together. Every rank looks up its rows for the tokens of all ranks, and each rank is handed
the sum, to which one rank has contributed; gradients go the same way back (Shoeybi et al. 2019, section 3). Logits of
sequences being continued are computed where the rows are, too. The head is put together while a loss is computed from
it, and its gradient taken apart again before the layers' begin. It knows nothing of losses or optimizers.

Shapes: R ranks, S rows of the vocabulary a rank (the last ones may have fewer), N tokens here, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from model_foundry.models.decoder import Decoder

# Their names before torch 2.13 are deprecated now.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class DividedDecoder(Decoder):
    """A decoder whose embedding and head lie on all ranks, once `divide_vocabulary` has been called."""

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, _Lookup.apply(self.embed_tokens, tokens)).to(self.compute_dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, V] in the compute type, of sequences that all ranks continue."""
        head = cast(DTensor, self.head_weight)
        rows = _padded(head.to_local(), _rows_each(head)).to(hidden.dtype)
        parts = _gathered(functional.linear(hidden, rows), head)  # [R, B, S]
        return parts.transpose(0, 1).flatten(1)[:, : head.shape[0]]

    def divide_vocabulary(self, mesh: DeviceMesh) -> set[nn.Parameter]:
        """Keep this rank's rows of both, still without memory; returns the parameters, which nothing else divides."""
        self.embed_tokens = _divided(self.embed_tokens, mesh)
        if self.lm_head is not None:
            self.lm_head = _divided(self.lm_head, mesh)
        return {self.embed_tokens, self.head_weight}

    @contextmanager
    def opened_head(self) -> Iterator[nn.Parameter]:
        """The whole head [V, D]; in training, a gradient left at it is added to what each rank has of it."""
        head = cast(DTensor, self.head_weight)
        whole = nn.Parameter(_gathered(_padded(head.to_local().detach(), _rows_each(head)), head).flatten(0, 1))
        whole.data = whole.data[: head.shape[0]]
        whole.requires_grad_(head.requires_grad)
        yield whole
        grad, whole.grad = whole.grad, None
        whole.data = whole.data.new_empty(0)  # whoever still has the name has no memory by it
        if self.training and head.requires_grad:
            # A rank without a token to predict hands in a gradient all the same.
            grad = torch.zeros(head.shape, device=head.device) if grad is None else grad
            _add_gradient(head, _summed_rows(grad, head))


class _Lookup(torch.autograd.Function):
    """Rows [N, D] of a divided table [V, D] for tokens int64 [N]; the ranks' N may differ. Collective, both ways."""

    @staticmethod
    def forward(ctx: Any, table: DTensor, tokens: torch.Tensor) -> Any:
        ctx.table, ctx.tokens_RN = table, _all_tokens(tokens, table)
        local = table.to_local()
        found = torch.zeros(*ctx.tokens_RN.shape, table.shape[1], device=local.device)
        is_here, places = _here(ctx.tokens_RN, table)
        found[is_here] = local[places].float()
        out = torch.empty(found.shape[1:], device=local.device)
        _reduce_scatter(out, found.flatten(0, 1), group=_group(table))
        return out[: tokens.shape[0]].to(local.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, num_tokens = ctx.table, ctx.tokens_RN.shape[1]
        parts = _gathered(_padded(grad.contiguous(), num_tokens), table)  # [R, N, D]
        is_here, places = _here(ctx.tokens_RN, table)
        rows = table.to_local().shape[0]
        _add_gradient(table, torch.ops.aten.embedding_dense_backward(parts[is_here], places, rows, -1, False))
        return None, None


def _all_tokens(tokens: torch.Tensor, table: DTensor) -> torch.Tensor:
    """The tokens of every rank, int64 [R, N], filled up with -1 to the largest N."""
    most = int(_gathered(torch.tensor([tokens.shape[0]], device=tokens.device), table).max())
    return _gathered(functional.pad(tokens, (0, most - tokens.shape[0]), value=-1), table)


def _here(tokens: torch.Tensor, table: DTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens' rows are on this rank, bool as `tokens`, and their places among them, int64."""
    first = table.device_mesh.get_local_rank() * _rows_each(table)
    is_here = (tokens >= first) & (tokens < first + table.to_local().shape[0])
    return is_here, tokens[is_here] - first


def _group(tensor: DTensor) -> dist.ProcessGroup:
    return tensor.device_mesh.get_group()


def _rows_each(tensor: DTensor) -> int:
    return -(-tensor.shape[0] // tensor.device_mesh.size())


def _padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    return functional.pad(rows, (0, 0, 0, num_rows - rows.shape[0])) if rows.shape[0] < num_rows else rows


@torch.no_grad()
def _gathered(part: torch.Tensor, beside: DTensor) -> torch.Tensor:
    """Every rank's `part`, all of one shape, along a new first axis."""
    size = beside.device_mesh.size()
    out = torch.empty(size * part.shape[0], *part.shape[1:], dtype=part.dtype, device=part.device)
    _all_gather(out, part.contiguous(), group=_group(beside))
    return out.view(size, *part.shape)


def _summed_rows(whole: torch.Tensor, holder: DTensor) -> torch.Tensor:
    """The sum over ranks of [V, D], this rank's rows of it."""
    each = _rows_each(holder)
    out = torch.empty(each, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
    _reduce_scatter(out, _padded(whole, each * holder.device_mesh.size()), group=_group(holder))
    return out[: holder.to_local().shape[0]]


@torch.no_grad()
def _add_gradient(holder: DTensor, rows: torch.Tensor) -> None:
    if holder.grad is not None:
        cast(DTensor, holder.grad).to_local().add_(rows)
        return
    holder.grad = DTensor.from_local(
        rows.contiguous(), holder.device_mesh, holder.placements, run_check=False, shape=holder.shape,
        stride=holder.stride(),
    )  # fmt: skip


def _divided(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's rows of a parameter without memory."""
    num_rows = parameter.shape[0]
    each = -(-num_rows // mesh.size())
    first = min(mesh.get_local_rank() * each, num_rows)
    local = parameter.detach()[first : min(first + each, num_rows)]
    whole = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )  # fmt: skip
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
