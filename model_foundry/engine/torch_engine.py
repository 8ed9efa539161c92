"""The engine on torch: CPU, CUDA, MPS. See `base` for the contract, `pieces` for how a batch is computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_foundry.engine.base import EngineKind, LogprobScope
from model_foundry.engine.loss_scale import LossScale
from model_foundry.engine.losses import choose_loss
from model_foundry.engine.muon import FlatMuon, require_whole_matrices
from model_foundry.engine.optimizer import FlatAdamW, FlatOptimizer
from model_foundry.engine.pieces import Passes, check_batch
from model_foundry.engine.pieces import split_by_tokens as split_by_tokens
from model_foundry.engine.platform import (
    choose_device,
    choose_dtype,
    keep_freed_memory,
    multiplies_bfloat16,
    peak_memory_bytes,
    set_threads,
)
from model_foundry.engine.sampling import collect, stream_beside_training
from model_foundry.engine.shared_base import AdapterLayers, SharedBase, adapts_whole_groups
from model_foundry.engine.shared_passes import PassRequest, Share, SharedPasses, run_together
from model_foundry.engine.state import (
    STATE_FORMAT,
    agreed_lora,
    differences,
    read_state,
    require_optimizer,
    write_full_weights,
    write_state,
)
from model_foundry.errors import EngineError, ModelError
from model_foundry.models.adapter import (
    adapter_tensors,
    fitting_adapter,
    load_adapter_tensors,
    read_adapter_tensors,
    target_names,
    write_adapter,
)
from model_foundry.models.attention import Attention
from model_foundry.models.language_model import Implementation, LanguageModel, load_language_model, share_weights
from model_foundry.models.lora import Linear
from model_foundry.models.packing import Quantization
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.types import (
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimizerKind,
    OptimParams,
    OptimStepOutput,
    SampledSequence,
    SamplingParams,
)


@dataclass(slots=True)
class _Model:
    """One model the engine holds."""

    language_model: LanguageModel
    base: Path
    base_name: str
    lora: LoraConfig | None
    optimizer: FlatOptimizer | None
    passes: Passes


class TorchEngine:
    """Holds models and does the nine verbs on them.

    Args:
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16 (with a loss scale); adapters, moments and fully trained weights are
            float32 in any case.
        num_threads: CPU threads; default every core.
        micro_batch_tokens: split passes into pieces of at most this many tokens; default the whole batch at once.
        quantization: how frozen linear layers are kept; models trained whole are refused with any but `none`.

    Attributes:
        between_pieces: called between the pieces of a pass; it may use other models of this engine.
    """

    kind: EngineKind = "torch"
    world_size = 1

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_threads: int | None = None,
        micro_batch_tokens: int | None = None,
        implementation: Implementation = "auto",
        attention: Attention = "auto",
        quantization: Quantization = "none",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.device = choose_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.num_threads = set_threads(num_threads)
        self.dtype = choose_dtype(dtype, self.device)
        self.micro_batch_tokens = micro_batch_tokens
        self.implementation: Implementation = implementation
        self.attention: Attention = attention
        self.quantization: Quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.between_pieces: Callable[[], None] = _nothing
        self._compiles = False
        self._shared: tuple[Path, SharedBase] | None = None
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
        optimizer: OptimizerKind = "adamw",
    ) -> str:
        """Load a model. `base_name` is what adapters name as their base; default the folder.

        Raises:
            EngineError: Muon for an adapter.
            ModelError: the folder or the adapter cannot be read or does not fit, or every weight of a packed model was
                to be trained.
        """
        whole = trainable and lora is None and adapter is None
        if whole and self.quantization != "none":
            what = f"{self.quantization} weights cannot be trained, only adapters on top of them"
            hint = "Set lora.enabled=true, or model.quantization=none."
            raise ModelError(what, where="model.quantization", hint=hint)
        require_whole_matrices(optimizer, whole=whole)
        model = self._load(base, whole=whole)
        counter = DropoutCounter(seed=seed)
        model.draw_dropout_by(counter)
        linears = model.linears()
        if adapter is not None:
            lora = agreed_lora(adapter, lora, linears)
        if lora is not None:
            # Nothing is dropped outside training, so layers that could not drop in it can carry the adapter as well.
            carried = lora if trainable else replace(lora, lora_dropout=0.0)
            adapt(linears, carried, seed=seed, counter=counter, every_target=adapter is None)
        if adapter is not None:
            load_adapter_tensors(linears, read_adapter_tensors(adapter), where=str(adapter))
        state = None
        if trainable:
            state = self._new_optimizer(model, lora, optimizer)
            model.compute_in(self.dtype)
            model.compile_layers(self._compiles)
        model.train(trainable)
        passes = self._passes(base, model, counter, state, lora)
        model_id = f"model-{next(self._ids)}"
        self._models[model_id] = _Model(model, base, base_name or str(base), lora, state, passes)
        return model_id

    def share_base(self, model_id: str) -> None:
        """Let adapters created from now on over this model's base share passes: see `run_together`.

        Raises:
            EngineError: passes over this base, or on this device, cannot be shared.
        """
        model = self._get(model_id)
        self._shared = (model.base, SharedBase(model.language_model, device=self.device))

    def _passes(
        self, base: Path, model: LanguageModel, counter: DropoutCounter, state: FlatOptimizer | None,
        lora: LoraConfig | None,
    ) -> Passes:  # fmt: skip
        planned, between = self.micro_batch_tokens, lambda: self.between_pieces()
        plain = state is not None and lora is not None and not lora.use_dora and not lora.lora_dropout
        layers = {name: layer for name, layer in model.linears().items() if isinstance(layer, Linear)}
        if self._shared is None or self._shared[0] != base or not plain or not adapts_whole_groups(layers):
            return Passes(
                model, counter, self.device, state, num_threads=self.num_threads, planned_piece_tokens=planned,
                loss_scale=self._new_loss_scale(), between=between,
            )  # fmt: skip
        return SharedPasses(
            model, counter, self.device, state, planned_piece_tokens=planned, between=between,
            base=self._shared[1], adapter=AdapterLayers(layers, model.head_update),
        )  # fmt: skip

    def _load(self, base: Path, *, whole: bool) -> LanguageModel:
        """The base. Where this engine holds it as it is, without an adapter, its weights are shared, not read again."""
        if not whole:
            for other in self._models.values():
                if other.base == base and other.lora is None and other.optimizer is None:
                    return share_weights(other.language_model)
        return load_language_model(
            base,
            dtype=torch.float32 if whole else self.dtype,
            device=self.device,
            implementation=self.implementation,
            attention=self.attention,
            quantization=self.quantization,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def _new_loss_scale(self) -> LossScale | None:
        return LossScale() if self.dtype == torch.float16 else None

    def _new_optimizer(self, model: LanguageModel, lora: LoraConfig | None, kind: OptimizerKind) -> FlatOptimizer:
        if kind == "adamw":
            return FlatAdamW(_trained(model, lora))
        return FlatMuon(model.base_parameters(), hidden=model.hidden_matrices(), dtype=self._orthogonalising_dtype())

    def _orthogonalising_dtype(self) -> torch.dtype:
        return torch.bfloat16 if multiplies_bfloat16(self.device) else torch.float32

    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        model, loss = self._get(model_id), choose_loss(loss_fn, loss_config)
        check_batch(data, model.language_model, loss)
        return model.passes.forward(data, loss, scope=logprobs)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        model, loss = self._get(model_id), choose_loss(loss_fn, loss_config)
        _optimizer(model)
        check_batch(data, model.language_model, loss)
        return model.passes.forward_backward(data, loss, scope=logprobs)

    def can_join(self, model_id: str, data: Sequence[Datum]) -> bool:
        """Whether a batch may be a part of `run_together`: its model's base is shared, and it is one piece."""
        passes = self._get(model_id).passes
        return isinstance(passes, SharedPasses) and passes.fits_in_one(data)

    def run_together(
        self, requests: Sequence[PassRequest], *, backward: bool
    ) -> list[ForwardBackwardOutput | Exception]:
        """`forward_backward`, or `forward`, of batches that `can_join`, each of another model, in one pass.

        Each ends with the bits that it would have alone, or with its own error. The logprobs are those of every token.
        """
        outputs: dict[int, ForwardBackwardOutput | Exception] = {}
        shares: dict[int, Share] = {}
        for number, request in enumerate(requests):
            model = self._get(request.model_id)
            try:
                loss = choose_loss(request.loss_fn, request.loss_config)
                check_batch(request.data, model.language_model, loss)
            except Exception as error:  # whatever it is, it is not the others'
                outputs[number] = error
                continue
            assert isinstance(model.passes, SharedPasses)
            shares[number] = Share(model.passes, request.data, loss)
        if shares:
            outputs.update(zip(shares, run_together(list(shares.values()), backward=backward), strict=True))
        return [outputs[number] for number in range(len(requests))]

    def optim_step(self, model_id: str, params: OptimParams) -> OptimStepOutput:
        model = self._get(model_id)
        optimizer = _optimizer(model)
        model.passes.mend()
        return model.passes.step(partial(optimizer.apply, params))

    def discard_gradients(self, model_id: str) -> None:
        """Forget what is pending, as if `forward_backward` had not been called since the last step."""
        model = self._get(model_id)
        _optimizer(model)
        model.passes.clear()

    def stream(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        yield from stream_beside_training(self._get(model_id).language_model, prompts, params, self.device)

    def sample(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> tuple[SampledSequence, ...]:
        return collect(self.stream(model_id, prompts, params), len(prompts), params)

    def language_model(self, model_id: str) -> LanguageModel:
        """The model itself, for what computes with it otherwise than the nine verbs do."""
        return self._get(model_id).language_model

    def compile_layers(self, model_id: str, on: bool) -> None:
        """Compile the layers of this model, and of those that are made to be trained from now on; or compute them as
        they are.

        Raises:
            ModelError: they cannot be compiled; nothing was changed.
        """
        self._get(model_id).language_model.compile_layers(on)
        self._compiles = on

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
        part = folder / ("model" if model.lora is None else "adapter")
        part.mkdir()
        if model.lora is None:
            write_full_weights(part, model.base, tensors)
            return
        linears = model.language_model.linears()
        write_adapter(
            part,
            tensors=tensors,
            lora=model.lora,
            targets=target_names(linears),
            base_model=model.base_name,
            transposed=any(linear.transposed for linear in linears.values()),
        )

    def save_state(self, model_id: str, folder: Path) -> None:
        self.save_weights(model_id, folder)
        self.write_state(model_id, folder, self.state_tensors(model_id), self.state_facts(model_id))

    def limit_pieces(self, model_id: str, num_tokens: int) -> None:
        """Split this model's passes into pieces of at most so many tokens, as if memory had run out for more."""
        self._get(model_id).passes.max_piece_tokens = num_tokens

    def state_facts(self, model_id: str) -> dict[str, Any]:
        """What beside tensors the state holds; JSON values."""
        model = self._get(model_id)
        scale = model.passes.loss_scale
        return {
            "format": STATE_FORMAT,
            "engine": self.kind,
            "optimizer": _optimizer(model).kind,
            "optimizer_step": _optimizer(model).step,
            "counter_step": model.passes.counter.step,
            "seed": model.passes.counter.seed,
            "max_piece_tokens": model.passes.max_piece_tokens,
            "loss_scale": None if scale is None else scale.facts(),
            "torch": torch.__version__,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_threads": self.num_threads,
            "world_size": self.world_size,
        }

    def write_state(
        self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """The optimizer's part of `save_state` from tensors copied earlier; another thread may call it."""
        write_state(folder, tensors, facts)

    def load_state(self, model_id: str, folder: Path, *, optimizer: bool, may_lack: bool = False) -> tuple[str, ...]:
        """Read a verified checkpoint folder. Pending gradients are forgotten.

        Args:
            may_lack: layers that only the model adapts stay as they are; otherwise both must adapt the same.

        Returns:
            Sentences on what differs from the machine that wrote it, so that the bits may differ from here on.

        Raises:
            ModelError: made for another model, or not to be read; nothing was changed.
            CheckpointError: there is no optimizer state, or another kind of engine wrote it; nothing was changed.
        """
        model = self._get(model_id)
        state, counter = _optimizer(model), model.passes.counter
        moments, facts = read_state(folder) if optimizer else ({}, {})
        scale = None if model.passes.loss_scale is None else LossScale.of_facts(facts.get("loss_scale"), str(folder))
        pairs = self._fitting_weights(model, folder, may_lack=may_lack)
        if optimizer:
            require_optimizer(facts, state.kind, where=str(folder))
            pairs += state.fitting_state(moments, where=str(folder / "state"))
        model.passes.clear()
        model.passes.loss_scale = scale
        _copy(pairs)
        if not optimizer:
            state.reset()
            counter.step = 0
            return ()
        state.step, counter.step, counter.seed = (int(facts[key]) for key in ("optimizer_step", "counter_step", "seed"))
        # Where memory ran out before, the same pieces give the same bits again.
        model.passes.max_piece_tokens = facts.get("max_piece_tokens")
        return differences(facts, self.state_facts(model_id))

    def _fitting_weights(
        self, model: _Model, folder: Path, *, may_lack: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of (weight, stored value), everything checked and nothing changed."""
        if model.lora is None:
            return model.language_model.fitting_weights(folder / "model")
        linears, part = model.language_model.linears(), folder / "adapter"
        agreed_lora(part, model.lora, linears, may_lack=may_lack)
        return fitting_adapter(linears, read_adapter_tensors(part), where=str(part), may_lack=may_lack)

    def delete_model(self, model_id: str) -> None:
        self._get(model_id)
        del self._models[model_id]

    def describe(self, model_id: str) -> dict[str, Any]:
        """Facts for plans and reports: implementation, counts of parameters, device, dtype."""
        model = self._get(model_id)
        base = model.language_model.num_parameters
        state = model.optimizer
        trained, remembered = (0, 0) if state is None else (state.num_parameters, state.num_remembered)
        return {
            "engine": self.kind,
            "implementation": model.language_model.implementation,
            "base_parameters": base,
            "trained_parameters": trained,
            "checkpoint_bytes": 4 * (trained + remembered),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_threads": self.num_threads,
            "world_size": self.world_size,
            "context": model.language_model.max_position_embeddings,
        }

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)

    def _get(self, model_id: str) -> _Model:
        try:
            return self._models[model_id]
        except KeyError:
            raise EngineError(f"no model {model_id!r}; there is: {', '.join(self._models) or 'none'}") from None


def _nothing() -> None:
    """What is done between pieces where nobody asked for anything."""


def _trained(model: LanguageModel, lora: LoraConfig | None) -> dict[str, Any]:
    if lora is None:
        return model.base_parameters()
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@torch.no_grad()
def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for mine, stored in pairs:
        mine.copy_(stored)


def _optimizer(model: _Model) -> FlatOptimizer:
    if model.optimizer is None:
        raise EngineError("this model was loaded to be read, not trained", hint="Create it with trainable=True.")
    return model.optimizer
