"""The engine on MLX: Apple's GPUs, and CPUs elsewhere. See `base` for the contract.

Adapters and models lie on the disk in the layout that torch's engine reads and writes; fresh adapters and dropout masks
have the same numbers; only the arithmetic is MLX's. Dense decoders of the Llama family, AdamW, no packed weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from model_foundry.engine.base import EngineKind, LogprobScope
from model_foundry.engine.choose import model_obstacle
from model_foundry.engine.mlx_arrays import DTYPES, to_mlx, to_torch
from model_foundry.engine.mlx_decoder import MlxDecoder, fitting_tensors, load_decoder
from model_foundry.engine.mlx_losses import choose_mlx_loss
from model_foundry.engine.mlx_optimizer import MlxAdamW
from model_foundry.engine.mlx_passes import MlxPasses
from model_foundry.engine.pieces import check_batch
from model_foundry.engine.platform import peak_memory_bytes
from model_foundry.engine.sampling import collect, stream_beside_training
from model_foundry.engine.state import (
    STATE_FORMAT,
    agreed_lora,
    differences,
    read_state,
    require_optimizer,
    write_full_weights,
    write_state,
)
from model_foundry.errors import EngineError
from model_foundry.models.adapter import (
    adapter_tensors,
    fitting_adapter,
    read_adapter_tensors,
    target_names,
    write_adapter,
)
from model_foundry.models.attention import Attention
from model_foundry.models.config import ModelConfig
from model_foundry.models.folder import read_config, read_tensors
from model_foundry.models.language_model import Implementation
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

_CPU = torch.device("cpu")
"""Where tensors are that go to files and samplers; MLX shares memory between CPU and GPU."""


@dataclass(slots=True)
class _Model:
    """One model the engine holds; `optimizer` is None where it is only read."""

    decoder: MlxDecoder
    base: Path
    base_name: str
    lora: LoraConfig | None
    optimizer: MlxAdamW | None
    passes: MlxPasses


class MlxEngine:
    """Holds models and does the nine verbs on them.

    Args:
        device: auto (the GPU where MLX has one), mps (the GPU) or cpu.
        dtype: auto (bfloat16 on a GPU, else float32), float32 or bfloat16; what is trained is float32 in any case.
        micro_batch_tokens: split passes into pieces of at most this many tokens; default the whole batch at once.
    """

    kind: EngineKind = "mlx"
    world_size = 1
    implementation: Implementation = "native"
    attention: Attention = "auto"
    quantization: Quantization = "none"
    num_threads = None

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        micro_batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        on_gpu = device != "cpu" and mx.metal.is_available()
        if device not in ("auto", "cpu", "mps") or (device == "mps" and not on_gpu):
            raise EngineError(f"MLX has no {device} device here", where="model.device", hint="Use model.device=auto.")
        mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
        self.device = torch.device("mps" if on_gpu else "cpu")
        self.dtype = _torch_dtype(dtype, on_gpu=on_gpu)
        self.micro_batch_tokens = micro_batch_tokens
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
        optimizer: OptimizerKind = "adamw",
    ) -> str:
        """Load a model. `base_name` is what adapters name as their base; default the folder.

        Raises:
            EngineError: an optimizer or a kind of model that this engine does not compute.
            ModelError: the folder or the adapter cannot be read or does not fit.
        """
        if optimizer != "adamw":
            raise EngineError(f"the engine mlx has no optimizer {optimizer}", hint="Use engine=torch.")
        whole = trainable and lora is None and adapter is None
        config = ModelConfig.from_hf(raw := read_config(base), where=str(base / "config.json"))
        if (what := model_obstacle(raw)) is not None:
            raise EngineError(f"the engine mlx has no {what}", where=str(base), hint="Use engine=torch.")
        decoder = self._load(base, config, whole=whole)
        decoder.gradient_checkpointing = self.gradient_checkpointing
        counter = DropoutCounter(seed=seed)
        if adapter is not None:
            lora = agreed_lora(adapter, lora, decoder.linears)
        if lora is not None:
            adapt(decoder.linears, lora, seed=seed, counter=counter, every_target=adapter is None)
        if adapter is not None:
            _take(decoder, _fitting(decoder, adapter))
        state = None
        if trainable:
            names = decoder.base_names() if lora is None else list(adapter_tensors(decoder.linears))
            state = MlxAdamW(decoder.weights, names)
        decoder.train(trainable)
        held: Any = decoder
        books: Any = state
        passes = MlxPasses(held, counter, _CPU, books, planned_piece_tokens=self.micro_batch_tokens)
        model_id = f"model-{next(self._ids)}"
        self._models[model_id] = _Model(decoder, base, base_name or str(base), lora, state, passes)
        return model_id

    def _load(self, base: Path, config: ModelConfig, *, whole: bool) -> MlxDecoder:
        """The base. Where this engine holds it unchanged already, its arrays are shared, not read again."""
        compute = DTYPES[self.dtype]
        if not whole:
            for other in self._models.values():
                if other.base == base and (other.lora is not None or other.optimizer is None):
                    shared = {name: other.decoder.weights[name] for name in other.decoder.base_names()}
                    return MlxDecoder(config, shared, compute=compute)
        return load_decoder(base, config, read_tensors(base), compute=compute, stored=mx.float32 if whole else compute)

    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        model, loss = self._get(model_id), choose_mlx_loss(loss_fn, loss_config)
        check_batch(data, model.passes.model, loss)
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
        model, loss = self._get(model_id), choose_mlx_loss(loss_fn, loss_config)
        _optimizer(model)
        check_batch(data, model.passes.model, loss)
        return model.passes.forward_backward(data, loss, scope=logprobs)

    def optim_step(self, model_id: str, params: OptimParams) -> OptimStepOutput:
        model = self._get(model_id)
        optimizer = _optimizer(model)
        model.passes.mend()
        return model.passes.step(lambda *, gradient_scale: optimizer.apply(params))

    def discard_gradients(self, model_id: str) -> None:
        """Forget what is pending, as if `forward_backward` had not been called since the last step."""
        model = self._get(model_id)
        _optimizer(model)
        model.passes.clear()

    def stream(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        model: Any = self._get(model_id).decoder
        yield from stream_beside_training(model, prompts, params, _CPU)

    def sample(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> tuple[SampledSequence, ...]:
        return collect(self.stream(model_id, prompts, params), len(prompts), params)

    def trained_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """What training changes, float32, by name in the files: as they are now, whatever is done later."""
        model = self._get(model_id)
        if model.lora is not None:
            return adapter_tensors(model.decoder.linears)
        return {name: to_torch(model.decoder.weights[name]) for name in model.decoder.base_names()}

    def state_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """Optimizer moments by name, as they are now."""
        return _optimizer(self._get(model_id)).state_tensors()

    def save_weights(self, model_id: str, folder: Path) -> None:
        self.write_weights(model_id, folder, self.trained_tensors(model_id))

    def write_weights(self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """`save_weights` from `trained_tensors` of earlier; another thread may call it."""
        model = self._get(model_id)
        part = folder / ("model" if model.lora is None else "adapter")
        part.mkdir()
        if model.lora is None:
            write_full_weights(part, model.base, tensors)
        else:
            targets = target_names(model.decoder.linears)
            write_adapter(part, tensors=tensors, lora=model.lora, targets=targets, base_model=model.base_name)

    def save_state(self, model_id: str, folder: Path) -> None:
        self.save_weights(model_id, folder)
        self.write_state(model_id, folder, self.state_tensors(model_id), self.state_facts(model_id))

    def state_facts(self, model_id: str) -> dict[str, Any]:
        """What beside tensors the state holds; JSON values."""
        model = self._get(model_id)
        return {
            "format": STATE_FORMAT,
            "engine": self.kind,
            "optimizer": _optimizer(model).kind,
            "optimizer_step": _optimizer(model).step,
            "counter_step": model.passes.counter.step,
            "seed": model.passes.counter.seed,
            "max_piece_tokens": model.passes.max_piece_tokens,
            "mlx": version("mlx"),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "world_size": self.world_size,
        }

    def limit_pieces(self, model_id: str, num_tokens: int) -> None:
        """Split this model's passes into pieces of at most so many tokens, as if memory had run out for more."""
        self._get(model_id).passes.max_piece_tokens = num_tokens

    def write_state(
        self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """The optimizer's part of `save_state` from tensors taken earlier; another thread may call it."""
        del model_id
        write_state(folder, tensors, facts)

    def load_state(self, model_id: str, folder: Path, *, optimizer: bool) -> tuple[str, ...]:
        """Read a verified checkpoint folder. Pending gradients are forgotten.

        Returns:
            Sentences on what differs from the machine that wrote it, so that the bits may differ from here on.

        Raises:
            ModelError: made for another model, or not to be read; nothing was changed.
            CheckpointError: there is no optimizer state, or another kind of engine wrote it; nothing was changed.
        """
        model = self._get(model_id)
        state, counter, decoder = _optimizer(model), model.passes.counter, model.decoder
        moments, facts = read_state(folder, engine=self.kind) if optimizer else ({}, {})
        if model.lora is not None:
            agreed_lora(folder / "adapter", model.lora, decoder.linears)
            stored = _fitting(decoder, folder / "adapter")
        else:
            part = folder / "model"
            stored = dict(fitting_tensors(decoder.config, read_tensors(part), where=str(part)))
        if optimizer:
            require_optimizer(facts, state.kind, where=str(folder))
            state.fit_state(moments, where=str(folder / "state"))
        model.passes.clear()
        _take(decoder, stored)
        if not optimizer:
            state.reset()
            counter.step = 0
            return ()
        state.load_state(moments, int(facts["optimizer_step"]))
        counter.step, counter.seed = int(facts["counter_step"]), int(facts["seed"])
        model.passes.max_piece_tokens = facts.get("max_piece_tokens")
        return differences(facts, self.state_facts(model_id))

    def delete_model(self, model_id: str) -> None:
        self._get(model_id)
        del self._models[model_id]
        mx.clear_cache()

    def describe(self, model_id: str) -> dict[str, Any]:
        """Facts for plans and reports: implementation, counts of parameters, device, dtype."""
        model, state = self._get(model_id), self._get(model_id).optimizer
        trained, remembered = (0, 0) if state is None else (state.num_parameters, state.num_remembered)
        return {
            "engine": self.kind,
            "implementation": self.implementation,
            "base_parameters": model.decoder.config.num_parameters,
            "trained_parameters": trained,
            "checkpoint_bytes": 4 * (trained + remembered),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_threads": None,
            "world_size": self.world_size,
            "context": model.decoder.max_position_embeddings,
        }

    def peak_memory_bytes(self) -> int:
        return max(peak_memory_bytes(_CPU), mx.get_peak_memory())

    def _get(self, model_id: str) -> _Model:
        try:
            return self._models[model_id]
        except KeyError:
            raise EngineError(f"no model {model_id!r}; there is: {', '.join(self._models) or 'none'}") from None


def _torch_dtype(name: str, *, on_gpu: bool) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if on_gpu else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _fitting(decoder: MlxDecoder, folder: Path) -> dict[str, torch.Tensor]:
    """A stored adapter's tensors, which fit this decoder's layers. Raises: as `fitting_adapter`."""
    tensors = read_adapter_tensors(folder)
    fitting_adapter(decoder.linears, tensors, where=str(folder))
    return tensors


def _take(decoder: MlxDecoder, tensors: Mapping[str, torch.Tensor]) -> None:
    decoder.weights.update({name: to_mlx(tensor, mx.float32) for name, tensor in tensors.items()})


def _optimizer(model: _Model) -> MlxAdamW:
    if model.optimizer is None:
        raise EngineError("this model was loaded to be read, not trained", hint="Create it with trainable=True.")
    return model.optimizer
