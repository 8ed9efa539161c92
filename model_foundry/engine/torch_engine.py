"""The engine on torch: CPU, CUDA, MPS. See `base` for the contract."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_foundry.checkpoint.tensors import read_tensors, write_tensors
from model_foundry.engine.base import LogprobScope
from model_foundry.engine.losses import LOSSES, Loss, head_pass
from model_foundry.engine.optimizer import FlatAdamW
from model_foundry.engine.platform import (
    choose_device,
    choose_dtype,
    is_out_of_memory,
    keep_freed_memory,
    peak_memory_bytes,
    set_threads,
)
from model_foundry.engine.sampling import collect, stream_tokens
from model_foundry.errors import ArchitectureMismatchError, CheckpointError, EngineError, OutOfMemoryError
from model_foundry.models.adapter import (
    adapter_tensors,
    load_adapter_tensors,
    read_adapter_config,
    read_adapter_tensors,
    target_names,
    write_adapter,
)
from model_foundry.models.folder import fill_model_folder, read_config
from model_foundry.models.folder import read_tensors as read_folder
from model_foundry.models.language_model import Implementation, LanguageModel, load_language_model
from model_foundry.models.lora import DropoutCounter, adapt
from model_foundry.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimStepOutput,
    SampledSequence,
    SamplingParams,
)

STATE_FORMAT = 1


@dataclass(slots=True)
class _Model:
    """One model the engine holds. `pending`: what was accumulated since the last step, to do again in smaller pieces."""

    language_model: LanguageModel
    base: Path
    base_name: str
    lora: LoraConfig | None
    optimizer: FlatAdamW | None
    counter: DropoutCounter
    pending: list[tuple[tuple[Datum, ...], Loss]] = field(default_factory=list)
    max_piece_tokens: int | None = None


class TorchEngine:
    """Holds models and does the nine verbs on them.

    Args:
        device: auto, cpu, cuda or mps.
        dtype: auto, float32 or bfloat16; adapters, moments and fully trained weights are float32 in any case.
        num_threads: CPU threads; default every core.
        micro_batch_tokens: split passes into pieces of at most this many tokens; default the whole batch at once.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        micro_batch_tokens: int | None = None,
        implementation: Implementation = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.device = choose_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.num_threads = set_threads(num_threads)
        self.dtype = choose_dtype(dtype, self.device)
        self.micro_batch_tokens = micro_batch_tokens
        self.implementation: Implementation = implementation
        self.gradient_checkpointing = gradient_checkpointing
        self._models: dict[str, _Model] = {}
        self._ids = itertools.count(1)

    def create_model(
        self,
        base: Path,
        *,
        lora: LoraConfig | None,
        seed: int = 0,
        adapter: Path | None = None,
        trainable: bool = True,
        base_name: str | None = None,
    ) -> str:
        """Load a model. `base_name` is what adapters name as their base; default the folder.

        Raises:
            ModelError: the folder or the adapter cannot be read or does not fit.
        """
        model = load_language_model(
            base,
            dtype=self.dtype if lora is not None or adapter is not None or not trainable else torch.float32,
            device=self.device,
            implementation=self.implementation,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        counter = DropoutCounter(seed=seed)
        if adapter is not None:
            stored = read_adapter_config(adapter)
            if lora is not None and (stored.r, stored.use_dora) != (lora.r, lora.use_dora):
                raise ArchitectureMismatchError(
                    f"the adapter has r={stored.r}, use_dora={stored.use_dora}; the configuration asks for r={lora.r}, "
                    f"use_dora={lora.use_dora}",
                    where=str(adapter),
                )
            lora = stored
        if lora is not None:
            adapt(model.linears(), lora, seed=seed, counter=counter)
            if adapter is not None:
                load_adapter_tensors(model.linears(), read_adapter_tensors(adapter), where=str(adapter))
        optimizer = None
        if trainable:
            optimizer = FlatAdamW(_trained(model, lora))
            _use_compute_type(model, self.dtype)
        model.train(trainable)
        model_id = f"model-{next(self._ids)}"
        self._models[model_id] = _Model(model, base, base_name or str(base), lora, optimizer, counter)
        return model_id

    def forward(
        self, model_id: str, data: Sequence[Datum], *, loss_fn: str = "cross_entropy", logprobs: LogprobScope = "due"
    ) -> ForwardBackwardOutput:
        model = self._get(model_id)
        loss = _loss(loss_fn)
        _check_data(data, model.language_model, loss)
        was_training = model.language_model.training
        model.language_model.eval()
        try:
            with torch.no_grad():
                return self._in_pieces(model, data, loss, scope=logprobs, backward=False)
        finally:
            model.language_model.train(was_training)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        model = self._get(model_id)
        optimizer = _optimizer(model)
        if loss_config:
            raise EngineError(f"the loss {loss_fn} takes no settings, and got {', '.join(sorted(loss_config))}")
        loss = _loss(loss_fn)
        _check_data(data, model.language_model, loss)
        try:
            output = self._in_pieces(model, data, loss, scope=logprobs, backward=True)
        except Exception as error:
            if not is_out_of_memory(error):
                self._replay(model, optimizer)
                raise
            output = self._recover(model, optimizer, data, loss, logprobs)
        model.pending.append((tuple(data), loss))
        return output

    def optim_step(self, model_id: str, params: AdamParams) -> OptimStepOutput:
        model = self._get(model_id)
        output = _optimizer(model).apply(params)
        model.pending.clear()
        model.counter.step += 1
        return output

    def discard_gradients(self, model_id: str) -> None:
        """Forget what is pending, as if `forward_backward` had not been called since the last step."""
        model = self._get(model_id)
        _optimizer(model).zero_grad()
        model.pending.clear()

    def stream(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        model = self._get(model_id).language_model
        was_training = model.training
        model.eval()
        try:
            yield from stream_tokens(model, prompts, params, self.device)
        finally:
            model.train(was_training)

    def sample(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> tuple[SampledSequence, ...]:
        return collect(self.stream(model_id, prompts, params), len(prompts), params)

    def trained_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """What training changes, float32, by name in the files: live views, not copies."""
        model = self._get(model_id)
        if model.lora is not None:
            return adapter_tensors(model.language_model.linears())
        return dict(model.language_model.weights())

    def state_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """Optimizer moments by name; live views, not copies."""
        return _optimizer(self._get(model_id)).state_tensors()

    def save_weights(self, model_id: str, folder: Path) -> None:
        self.write_weights(model_id, folder, self.trained_tensors(model_id))

    def write_weights(self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """`save_weights` from tensors copied earlier; touches no live tensor, so another thread may call it."""
        model = self._get(model_id)
        if model.lora is not None:
            part = folder / "adapter"
            part.mkdir()
            linears = model.language_model.linears()
            transposed = any(linear.transposed for linear in linears.values())
            write_adapter(
                part,
                tensors=tensors,
                lora=model.lora,
                targets=target_names(linears),
                base_model=model.base_name,
                transposed=transposed,
            )
            return
        part = folder / "model"
        part.mkdir()
        fill_model_folder(part, read_config(model.base), tensors.items(), tokenizer_from=model.base)

    def save_state(self, model_id: str, folder: Path) -> None:
        self.save_weights(model_id, folder)
        self.write_state(model_id, folder, self.state_tensors(model_id), self.state_facts(model_id))

    def state_facts(self, model_id: str) -> dict[str, Any]:
        """What beside tensors the state holds; JSON values."""
        model = self._get(model_id)
        return {
            "format": STATE_FORMAT,
            "engine": "torch",
            "optimizer_step": _optimizer(model).step,
            "counter_step": model.counter.step,
            "seed": model.counter.seed,
            "torch": torch.__version__,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_threads": self.num_threads,
        }

    def write_state(
        self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        part = folder / "state"
        part.mkdir()
        write_tensors(part / "optimizer.safetensors", tensors)
        (part / "engine.json").write_text(json.dumps(dict(facts), indent=1, sort_keys=True) + "\n")

    def load_state(self, model_id: str, folder: Path, *, optimizer: bool) -> tuple[str, ...]:
        """Read a verified checkpoint folder.

        Returns:
            Sentences on what differs from the machine that wrote it, so that the bits may differ from here on.

        Raises:
            ArchitectureMismatchError: made for another model; nothing was changed.
            CheckpointError: the state belongs to another kind of engine.
        """
        model = self._get(model_id)
        state = _optimizer(model)
        moments, facts = None, {}
        if optimizer:
            facts = json.loads((folder / "state" / "engine.json").read_text())
            if (facts.get("engine"), facts.get("format")) != ("torch", STATE_FORMAT):
                raise CheckpointError(
                    f"the optimizer state was written by the engine {facts.get('engine')!r}, format {facts.get('format')}",
                    where=str(folder),
                    hint="Load the weights alone, or use the engine that wrote it.",
                )
            moments = read_tensors(folder / "state" / "optimizer.safetensors")
        if model.lora is not None:
            tensors = read_adapter_tensors(folder / "adapter")
            load_adapter_tensors(model.language_model.linears(), tensors, where=str(folder / "adapter"))
        else:
            _load_base(model.language_model, folder / "model")
        self.discard_gradients(model_id)
        if moments is None:
            state.reset()
            return ()
        state.load_state_tensors(moments, int(facts["optimizer_step"]), where=str(folder / "state"))
        model.counter.step, model.counter.seed = int(facts["counter_step"]), int(facts["seed"])
        here = self.state_facts(model_id)
        return tuple(
            f"{key} was {facts.get(key)} when this was saved and is {here[key]} now; results may differ in the last bits"
            for key in ("torch", "device", "dtype", "num_threads")
            if facts.get(key) != here[key]
        )

    def delete_model(self, model_id: str) -> None:
        self._get(model_id)
        del self._models[model_id]

    def describe(self, model_id: str) -> dict[str, Any]:
        """Facts for plans and reports: implementation, counts of parameters, device, dtype."""
        model = self._get(model_id)
        base = sum(p.numel() for p in model.language_model.base_parameters().values())
        trained = 0 if model.optimizer is None else model.optimizer.flat.numel()
        return {
            "implementation": model.language_model.implementation,
            "base_parameters": base,
            "trained_parameters": trained,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_threads": self.num_threads,
            "context": model.language_model.max_position_embeddings,
        }

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)

    def _get(self, model_id: str) -> _Model:
        try:
            return self._models[model_id]
        except KeyError:
            raise EngineError(f"no model {model_id!r}; there is: {', '.join(self._models) or 'none'}") from None

    def _in_pieces(
        self, model: _Model, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope, backward: bool
    ) -> ForwardBackwardOutput:
        total, logprobs = 0.0, {}
        first_row = sum(len(batch) for batch, _ in model.pending)
        limit = min((n for n in (self.micro_batch_tokens, model.max_piece_tokens) if n), default=None)
        pieces = split_by_tokens([datum.num_tokens for datum in data], limit)
        for piece in pieces:
            model.counter.rows = tuple((first_row + row, data[row].num_tokens) for row in piece)
            result = self._piece(model, [data[row] for row in piece], loss, scope=scope, backward=backward)
            total += result[0]
            logprobs.update(zip(piece, result[1], strict=True))
        return ForwardBackwardOutput(total, tuple(logprobs[row] for row in range(len(data))), len(pieces))

    def _piece(
        self, model: _Model, data: Sequence[Datum], loss: Loss, *, scope: LogprobScope, backward: bool
    ) -> tuple[float, list[np.ndarray]]:
        """One packed pass: loss and log-probabilities by row."""
        rows = [torch.from_numpy(datum.tokens.astype(np.int64)).to(self.device) for datum in data]
        inputs = {
            name: torch.from_numpy(np.concatenate([datum.loss_inputs[name] for datum in data])).to(self.device)
            for name in loss.inputs
        }
        inputs["target_tokens"] = inputs["target_tokens"].long()
        due = inputs[loss.due] != 0
        wanted = torch.ones_like(due) if scope == "all" else due
        language_model = model.language_model
        hidden = language_model.hidden(rows)
        flat = hidden.detach()
        everywhere = bool(wanted.all())
        chosen = None if everywhere else wanted.nonzero()[:, 0]
        part = flat if chosen is None else flat[chosen]
        picked = inputs if chosen is None else {name: value[chosen] for name, value in inputs.items()}
        result = head_pass(part, language_model.head, loss, picked, backward=backward)
        if backward and result.d_hidden is not None:
            gradient = result.d_hidden
            if chosen is not None:
                gradient = torch.zeros_like(flat)
                gradient[chosen] = result.d_hidden
            hidden.backward(gradient)
        logprobs = np.full(flat.shape[0], np.nan, dtype=np.float32)
        logprobs[wanted.cpu().numpy()] = result.logprobs.cpu().numpy()
        ends = np.cumsum([datum.num_tokens for datum in data])[:-1]
        return result.loss, np.split(logprobs, ends)

    def _replay(self, model: _Model, optimizer: FlatAdamW) -> None:
        """Bring the gradients back to what was pending before a call that failed half-way."""
        optimizer.zero_grad()
        pending, model.pending = model.pending, []
        for batch, loss in pending:
            self._in_pieces(model, batch, loss, scope="due", backward=True)
            model.pending.append((batch, loss))

    def _recover(
        self, model: _Model, optimizer: FlatAdamW, data: Sequence[Datum], loss: Loss, scope: LogprobScope
    ) -> ForwardBackwardOutput:
        """Do the pass again in ever smaller pieces after memory ran out."""
        largest = max(datum.num_tokens for datum in data)
        limit = sum(datum.num_tokens for datum in data)
        before = model.max_piece_tokens
        while limit > largest:
            limit = max(largest, limit // 2)
            model.max_piece_tokens = limit
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._replay(model, optimizer)
                return self._in_pieces(model, data, loss, scope=scope, backward=True)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        model.max_piece_tokens = before
        self._replay(model, optimizer)
        raise OutOfMemoryError(
            f"memory ran out on a single row of {largest} tokens",
            hint="Lower data.max_length, set training.gradient_checkpointing=true, or use a smaller model.",
        )


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


def _trained(model: LanguageModel, lora: LoraConfig | None) -> dict[str, Any]:
    if lora is None:
        return model.base_parameters()
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def _use_compute_type(model: LanguageModel, dtype: torch.dtype) -> None:
    """Activations in the compute type even where the weights are kept in float32."""
    if hasattr(model, "decoder"):
        model.decoder.compute_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue]
    elif hasattr(model, "compute_dtype"):
        model.compute_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def _load_base(model: LanguageModel, folder: Path) -> None:
    stored = dict(read_folder(folder))
    mine = dict(model.weights())
    wrong = sorted(mine.keys() - stored.keys()) or [n for n in mine if mine[n].shape != stored[n].shape]
    if wrong:
        raise ArchitectureMismatchError(f"the weights do not fit this model, {wrong[0]} first", where=str(folder))
    for name, value in mine.items():
        value.copy_(stored[name])


def _optimizer(model: _Model) -> FlatAdamW:
    if model.optimizer is None:
        raise EngineError("this model was loaded to be read, not trained", hint="Create it with trainable=True.")
    return model.optimizer


def _loss(name: str) -> Loss:
    if name not in LOSSES:
        raise EngineError(f"no loss {name!r}", hint=f"There is: {', '.join(LOSSES)}.")
    return LOSSES[name]


def _check_data(data: Sequence[Datum], model: LanguageModel, loss: Loss) -> None:
    if not data:
        raise EngineError("a batch without rows")
    limit = model.max_position_embeddings
    for number, datum in enumerate(data):
        lengths = {name: len(datum.loss_inputs[name]) for name in loss.inputs if name in datum.loss_inputs}
        missing = [name for name in loss.inputs if name not in lengths]
        if missing or set(lengths.values()) != {datum.num_tokens} or datum.num_tokens == 0:
            what = f"lacks {missing[0]}" if missing else f"has {datum.num_tokens} tokens and inputs of {lengths}"
            raise EngineError(f"the row {what}", where=f"row {number}")
        if limit is not None and datum.num_tokens > limit:
            raise EngineError(
                f"{datum.num_tokens} tokens exceed the model's context of {limit}",
                where=f"row {number}",
                hint="Lower data.max_length.",
            )
        highest = int(max(datum.tokens.max(), datum.loss_inputs["target_tokens"].max()))
        if highest >= model.vocab_size or int(datum.tokens.min()) < 0:
            raise EngineError(f"token {highest} is not in the vocabulary of {model.vocab_size}", where=f"row {number}")
