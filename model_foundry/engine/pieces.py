"""A batch through a model in pieces: rows packed, one pass a piece, done again in smaller pieces where memory ran out.

It knows models and losses. It knows nothing of model ids, optimizer steps or files.

Shapes: T tokens of a row, N tokens of a piece, M of them with a loss due, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from model_foundry.engine.base import LogprobScope
from model_foundry.engine.branches import answers_of, laid_lengths, lay_out, wrong_branches
from model_foundry.engine.loss_scale import LossScale
from model_foundry.engine.losses import CHUNK_LOGITS, Inputs, Loss, head_pass
from model_foundry.engine.optimizer import FlatOptimizer
from model_foundry.engine.pair_pass import pair_pass
from model_foundry.engine.platform import is_out_of_memory, release_memory
from model_foundry.engine.side_by_side import run_side_by_side, worthwhile_shares
from model_foundry.errors import EngineError, OutOfMemoryError
from model_foundry.models.balance import RouterBalance
from model_foundry.models.head import HeadUpdate
from model_foundry.models.language_model import LanguageModel
from model_foundry.models.memory import MAX_OWN_GRADIENT_BYTES
from model_foundry.models.randomness import DropoutCounter
from model_foundry.types import Datum, ForwardBackwardOutput, OptimStepOutput

T = TypeVar("T")


@dataclass(slots=True)
class Passes:
    """Runs batches through one model, and remembers those whose gradients are pending, to be able to do them again.

    Attributes:
        num_threads: the engine's; on a CPU each may have rows of its own.
        planned_piece_tokens: pieces of at most this many tokens, by configuration.
        max_piece_tokens: the same, learnt where memory ran out.
        loss_scale: what gradients are larger by, where activations are float16.
        pending: batches since the last step.
        torn: a pass was broken off half-way (Ctrl-C), so the gradients are not those of `pending`.
        between: called after each piece; it must leave this model alone.
    """

    model: LanguageModel
    counter: DropoutCounter
    device: torch.device
    optimizer: FlatOptimizer | None
    num_threads: int = 1
    planned_piece_tokens: int | None = None
    max_piece_tokens: int | None = None
    loss_scale: LossScale | None = None
    pending: list[tuple[tuple[Datum, ...], Loss]] = field(default_factory=list)
    torn: bool = False
    between: Callable[[], None] = lambda: None
    _piece_lengths: tuple[int, ...] = ()
    _num_read: int = 0  # tokens of the piece at hand, those counted twice that two branches share and read apart

    @property
    def gradient_scale(self) -> float:
        """How many times too large the pending gradients are."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def forward(self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope) -> ForwardBackwardOutput:
        """The loss alone, without dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._until_it_fits(lambda _: self._in_pieces(data, loss, scope=scope, backward=False))
        finally:
            self.model.train(was_training)

    def forward_backward(self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope) -> ForwardBackwardOutput:
        """Add the gradients of a batch to what is pending, or raise with the gradients as they were."""
        self.mend()

        def attempt(again: bool) -> ForwardBackwardOutput:
            if again:
                self._replay()
            return self._in_pieces(data, loss, scope=scope, backward=True)

        learnt = self.max_piece_tokens
        self.torn = True
        try:
            output = self._until_it_fits(attempt)
        except Exception:
            self.max_piece_tokens = learnt
            self.mend()
            raise
        self.pending.append((tuple(data), loss))
        self.torn = False
        return output

    def mend(self) -> None:
        """Bring the gradients back to those of `pending`, where a pass broke off.

        Raises:
            OutOfMemoryError: memory ran out over that as well; nothing is pending any more.
        """
        if not self.torn:
            return
        try:
            self._until_it_fits(lambda _: self._replay())
        except OutOfMemoryError as error:
            num_batches = len(self.pending)
            self.clear()
            what = f"{error.what}, and again over the {num_batches} batches before it, whose gradients are lost"
            raise OutOfMemoryError(what, hint=error.hint) from error
        self.torn = False

    def clear(self) -> None:
        """Nothing is pending."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.forget()

    def forget(self) -> None:
        """Nothing is pending, for the optimizer has cleared the gradients."""
        self.pending.clear()
        self.torn = False

    def step(self, apply: Callable[..., OptimStepOutput]) -> OptimStepOutput:
        """The optimizer's step of what is pending, by its `apply`; afterwards nothing is."""
        scale = self.loss_scale
        output = apply(gradient_scale=self.gradient_scale)
        self.forget()
        self.counter.step += 1
        if scale is None:
            return output
        used = scale.value
        scale.after(skipped=output.skipped)
        return replace(output, loss_scale=used, next_loss_scale=scale.value)

    def _replay(self) -> None:
        """The gradients of `pending`, computed again from nothing."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        pending, self.pending = self.pending, []
        try:
            for batch, loss in pending:
                self._in_pieces(batch, loss, scope="due", backward=True)
                self.pending.append((batch, loss))
        finally:
            self.pending = pending

    def _until_it_fits(self, attempt: Callable[[bool], T]) -> T:
        """`attempt(again)`, with `max_piece_tokens` halved each time memory runs out.

        Raises:
            OutOfMemoryError: on a piece that is a single row.
        """
        again = False
        while True:
            try:
                return attempt(again)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            # Only here are the tensors of the failed pass gone: inside the handler its traceback still holds them.
            release_memory(self.device)
            num_tokens = sum(self._piece_lengths)
            if len(self._piece_lengths) < 2:
                raise OutOfMemoryError(
                    f"memory ran out on a single row of {num_tokens} tokens ({said})",
                    hint="Lower data.max_length, set training.gradient_checkpointing=true, or use a smaller model.",
                )
            self.max_piece_tokens = num_tokens // 2
            again = True

    def _in_pieces(
        self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope, backward: bool
    ) -> ForwardBackwardOutput:
        total, router_loss, logprobs = 0.0, 0.0, {}
        first_row = sum(len(batch) for batch, _ in self.pending)
        pieces = self._pieces([datum.num_tokens for datum in data])
        balance = self.model.balance if backward else None
        try:
            if balance is not None:
                self._open_balance(balance, data, loss, pieces, first_row)
            for piece in pieces:
                part = self._enter(piece, data, first_row)
                result = self._piece(part, loss, scope=scope, backward=backward)
                total += result[0]
                router_loss += result[2]
                logprobs.update(zip(piece, result[1], strict=False))  # filling has no row
                self.between()
        finally:
            if balance is not None:
                balance.close()
        return self._output(total, logprobs, len(pieces), router_loss)

    def _pieces(self, lengths: Sequence[int]) -> list[list[int]]:
        """The rows of each piece."""
        limit = min((n for n in (self.planned_piece_tokens, self.max_piece_tokens) if n), default=None)
        return split_by_tokens(lengths, limit)

    def _output(
        self, loss: float, logprobs: dict[int, np.ndarray], num_pieces: int, router_loss: float
    ) -> ForwardBackwardOutput:
        """`logprobs` by row."""
        return ForwardBackwardOutput(loss, tuple(logprobs[row] for row in sorted(logprobs)), num_pieces, router_loss)

    def _enter(self, piece: Sequence[int], data: Sequence[Datum], first_row: int) -> list[Datum]:
        """The rows of a piece, which is from now on the one at hand."""
        reads = self.model.reads_branches
        self.counter.rows = tuple(
            (first_row + row + (number << 32), length)
            for row in piece
            for number, length in enumerate(laid_lengths(data[row], reads_branches=reads))
        )
        self._piece_lengths = tuple(data[row].num_tokens for row in piece)
        self._num_read = sum(length for _, length in self.counter.rows)
        return [data[row] for row in piece]

    def _open_balance(
        self, balance: RouterBalance, data: Sequence[Datum], loss: Loss, pieces: Sequence[Sequence[int]], first_row: int
    ) -> None:
        """The load-balancing loss is about the whole batch: in several pieces, the choices are counted first."""
        reads = self.model.reads_branches
        num_tokens = sum(sum(laid_lengths(datum, reads_branches=reads)) for datum in data)
        weight = float(num_tokens)
        if loss.due is not None:
            weight = sum(float(np.abs(datum.loss_inputs[loss.due]).sum()) for datum in data)
        balance.open(weight=weight, num_tokens=num_tokens)
        if len(pieces) < 2:
            return
        for piece in pieces:
            part = self._enter(piece, data, first_row)
            balance.listen(self._num_read)
            with torch.no_grad():
                self._hidden(part)
        balance.counted()

    def _hidden(self, data: Sequence[Datum]) -> torch.Tensor:
        """What the head is applied to, [N, D], in the order of the datums' tokens."""
        laid = lay_out(data, reads_branches=self.model.reads_branches)
        rows = [torch.from_numpy(row.astype(np.int64)).to(self.device) for row in laid.rows]
        hidden = self.model.hidden(rows, laid.branches if any(laid.branches) else ())
        return hidden if laid.places is None else hidden[torch.from_numpy(laid.places).to(self.device)]

    def _piece(
        self, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope, backward: bool
    ) -> tuple[float, list[np.ndarray], float]:
        """Loss, log-probabilities by row, and the routers' share of their loss."""
        shares = self._shares(data, backward=backward)
        if shares is None:
            return self._pass(data, loss, scope=scope, backward=backward)
        trained = list(self.optimizer.parameters.values()) if backward and self.optimizer is not None else []
        head, update = self.model.head, self.model.head_update
        gradients = [OwnGradients(trained, head, update, num_shares=len(shares)) for _ in shares]
        results = run_side_by_side([
            partial(self._pass, [data[row] for row in share], loss, scope=scope, backward=backward, own=own)
            for share, own in zip(shares, gradients, strict=True)
        ])  # fmt: skip
        for own in gradients:
            own.add()
        logprobs: dict[int, np.ndarray] = {}
        for share, (_, found, _) in zip(shares, results, strict=True):
            logprobs.update(zip(share, found, strict=True))
        return sum(result[0] for result in results), [logprobs[row] for row in range(len(data))], 0.0

    def _shares(self, data: Sequence[Datum], *, backward: bool) -> list[list[int]] | None:
        """The rows of each thread, where the model and the rows allow that threads have rows of their own."""
        if self.device.type != "cpu" or not self.model.has_no_pass_state:
            return None
        if backward and self.optimizer is not None:
            head = self.model.head
            # A trained head has its gradient beside the layers', which hold another where it is the embedding.
            own = self.optimizer.num_parameters + (head.numel() if head is not None and head.requires_grad else 0)
            if 4 * own * self.num_threads > MAX_OWN_GRADIENT_BYTES:
                return None
        reads = self.model.reads_branches
        return worthwhile_shares([sum(laid_lengths(datum, reads_branches=reads)) for datum in data], self.num_threads)

    def _pass(
        self,
        data: Sequence[Datum],
        loss: Loss,
        *,
        scope: LogprobScope,
        backward: bool,
        own: OwnGradients | None = None,
    ) -> tuple[float, list[np.ndarray], float]:
        """One packed pass; its gradients are added to the parameters', or kept in `own`."""
        balance = self.model.balance if backward else None
        inputs = {
            name: torch.from_numpy(np.concatenate([datum.loss_inputs[name] for datum in data])).to(self.device)
            for name in loss.inputs
        }
        inputs["target_tokens"] = inputs["target_tokens"].long()
        wanted = _wanted(inputs, loss, scope, is_filling=not self._piece_lengths)
        if balance is not None:
            balance.listen(self._num_read)
        hidden = self._hidden(data)
        router_loss = 0.0 if balance is None else balance.settle(self.gradient_scale)
        flat = hidden.detach()
        chosen = None if bool(wanted.all()) else wanted.nonzero()[:, 0]
        part = flat if chosen is None else flat[chosen]
        picked = inputs if chosen is None else {name: value[chosen] for name, value in inputs.items()}
        chunk, scale = CHUNK_LOGITS if own is None else own.chunk_logits, self.gradient_scale
        update = self.model.head_update if own is None else own.update
        with self.model.opened_head() if own is None else nullcontext(own.head) as head:
            if loss.num_branches:
                places = answers_of(data) if chosen is None else answers_of(data)[chosen.cpu().numpy()]
                num_pairs = len(data) if self._piece_lengths else 0  # filling is no pair
                result = pair_pass(
                    part, head, loss, picked, answers=torch.from_numpy(places), num_pairs=num_pairs,
                    backward=backward, update=update, scale=scale, chunk_logits=chunk,
                )  # fmt: skip
            else:
                result = head_pass(
                    part, head, loss, picked, backward=backward, update=update, scale=scale, chunk_logits=chunk
                )
        if backward and result.d_hidden is not None:
            gradient = result.d_hidden
            if chosen is not None:
                gradient = torch.zeros_like(flat)
                gradient[chosen] = result.d_hidden
            if own is not None:
                own.backward(hidden, gradient)
            elif hidden.requires_grad:
                hidden.backward(gradient)
        logprobs = np.full(inputs["target_tokens"].shape, np.nan, dtype=np.float32)
        logprobs[wanted.cpu().numpy()] = result.logprobs.cpu().numpy()
        ends = np.cumsum([datum.num_tokens for datum in data])[:-1]
        return result.loss, np.split(logprobs, ends), router_loss


class OwnGradients:
    """Gradients of one pass among several at the same time, to be added to the parameters' afterwards, in order.

    Attributes:
        head, update: the model's, with gradients of their own.
        chunk_logits: how many logits exist at once; all passes together have as many as one alone.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        head: nn.Parameter | None,
        update: HeadUpdate | None,
        *,
        num_shares: int,
    ) -> None:
        self._parameters, self._head, self._update = parameters, head, update
        self._found: Sequence[torch.Tensor | None] = ()
        self.head = None if head is None else nn.Parameter(head.detach(), requires_grad=head.requires_grad)
        self.update = None if update is None else update.apart()
        self.chunk_logits = CHUNK_LOGITS // num_shares

    def backward(self, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        if hidden.requires_grad:  # not where the head alone is trained
            self._found = torch.autograd.grad(hidden, self._parameters, gradient, allow_unused=True)

    def add(self) -> None:
        for parameter, gradient in zip(self._parameters, self._found, strict=False):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient)
        mine = None if self.head is None else self.head.grad
        if mine is not None and self._head is not None and self._head.grad is not None:
            self._head.grad.add_(mine)
        if self.update is not None and self._update is not None:
            for own, theirs in ((self.update.down, self._update.down), (self.update.up, self._update.up)):
                if own.grad is not None and theirs.grad is not None:
                    theirs.grad.add_(own.grad)


def _wanted(inputs: Inputs, loss: Loss, scope: LogprobScope, *, is_filling: bool) -> torch.Tensor:
    """Which tokens go through the head, bool [N]."""
    targets = inputs["target_tokens"]
    if is_filling:
        return torch.zeros(targets.shape[0], dtype=torch.bool, device=targets.device)
    if scope == "all" or loss.due is None:
        return torch.ones(targets.shape[0], dtype=torch.bool, device=targets.device)
    due = inputs[loss.due] != 0
    return due if due.ndim == 1 else due.any(dim=1)


def split_by_tokens(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Rows in order, in pieces of at most `limit` tokens; a longer row stands alone."""
    pieces: list[list[int]] = [[]]
    size = 0
    for row, length in enumerate(lengths):
        if limit is not None and pieces[-1] and size + length > limit:
            pieces.append([])
            size = 0
        pieces[-1].append(row)
        size += length
    return pieces


def check_batch(data: Sequence[Datum], model: LanguageModel, loss: Loss) -> None:
    """Refuse what would fail half-way, or mean something else.

    Raises:
        EngineError: no rows, an input missing or of another length, too many tokens, or one outside the vocabulary.
    """
    if not data:
        raise EngineError("a batch without rows")
    many = np.shape(data[0].loss_inputs.get("target_tokens", ()))[1:]
    for number, datum in enumerate(data):
        what = _wrong_shapes(datum, loss, many) or wrong_branches(datum, loss.num_branches)
        what = what or _wrong_tokens(datum, model.vocab_size)
        if what is not None:
            raise EngineError(what, where=f"row {number}")
        limit = model.max_position_embeddings
        if limit is not None and datum.num_positions > limit:
            raise EngineError(
                f"{datum.num_positions} tokens exceed the model's context of {limit}",
                where=f"row {number}",
                hint="Lower data.max_length.",
            )


def _wrong_shapes(datum: Datum, loss: Loss, many: tuple[int, ...]) -> str | None:
    """`many`: () for one target a token, (K,) for K of them."""
    missing = [name for name in loss.inputs if name not in datum.loss_inputs]
    if missing:
        return f"it lacks {missing[0]}"
    if datum.tokens.ndim != 1 or datum.num_tokens == 0:
        return f"its tokens have shape {datum.tokens.shape}"
    if len(many) > 1 or 0 in many or (many and not loss.many_targets):
        return f"its target_tokens have shape {np.shape(datum.loss_inputs['target_tokens'])}"
    for name in loss.inputs:
        if (shape := np.shape(datum.loss_inputs[name])) != (datum.num_tokens, *many):
            return f"it has {datum.num_tokens} tokens and {name} of shape {shape}"
    return None


def _wrong_tokens(datum: Datum, vocab_size: int) -> str | None:
    for name, ids in {"tokens": datum.tokens, "target_tokens": datum.loss_inputs["target_tokens"]}.items():
        if not np.issubdtype(ids.dtype, np.integer):
            return f"{name} are {ids.dtype} instead of integers"
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token < vocab_size:
                return f"token {token} in {name} is not in the vocabulary of {vocab_size}"
    return None
