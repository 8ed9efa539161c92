"""The engine on several processes (`torchrun`): the contract of `base`, each model divided over them by FSDP2.

Rank 0 has this engine like any other; what it is asked for it tells the other ranks, which do the same on their share
in `follow`. Numbers are of all ranks together, tensors are gathered one at a time when they are read, so whoever uses
the engine need not know that there are several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from model_foundry.checkpoint.tensors import read_entries
from model_foundry.engine.base import LogprobScope
from model_foundry.engine.loss_scale import LossScale
from model_foundry.engine.losses import choose_loss
from model_foundry.engine.muon import require_whole_matrices
from model_foundry.engine.optimizer import check_params
from model_foundry.engine.pieces import check_batch
from model_foundry.engine.platform import is_out_of_memory
from model_foundry.engine.ranks import LostRankError, Ranks, Said
from model_foundry.engine.sampling import stream_tokens
from model_foundry.engine.sharded_optimizer import ShardedAdamW, ShardedMuon, ShardedOptimizer
from model_foundry.engine.sharded_passes import ShardedPasses
from model_foundry.engine.sharded_views import GatheredTensor, LedModel, logprobs_by_row, rows_as_arrays, rows_of_arrays
from model_foundry.engine.state import (
    MOMENTS_NAME,
    agreed_lora,
    differences,
    read_facts,
    require_optimizer,
    write_full_weights,
)
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError, FoundryError, ModelError, OutOfMemoryError
from model_foundry.models.adapter import WEIGHTS_NAME, target_names, write_adapter
from model_foundry.models.folder import stored_tensors, weight_files
from model_foundry.models.language_model import DecodingState, LanguageModel
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.sharding import (
    Shard,
    ShardedModel,
    divide,
    divided,
    lay_out,
    read_base,
    read_shards,
    require_fit,
)
from model_foundry.models.targets import adapt
from model_foundry.types import (
    Datum,
    ForwardBackwardOutput,
    LoraConfig,
    OptimizerKind,
    OptimParams,
    OptimStepOutput,
    SamplingParams,
)


@dataclass(slots=True)
class _Model:
    """One model, as far as it is here. `logits` are those of the sequences being continued, [B, V]."""

    language_model: ShardedModel
    base: Path
    base_name: str
    lora: LoraConfig | None
    targets: list[str]
    optimizer: ShardedOptimizer | None
    passes: ShardedPasses
    decoding: DecodingState | None = None
    logits: torch.Tensor | None = None

    def shards(self, part: str) -> dict[str, Shard]:
        """By name in the files: `weights` that are trained, or the optimizer's `moments`."""
        if part == "moments":
            return {} if self.optimizer is None else self.optimizer.state_shards()
        return self.language_model.base_shards() if self.lora is None else self.language_model.adapter_shards()


class ShardedEngine(TorchEngine):
    """`TorchEngine`'s verbs, done by all ranks. Arguments are its own; `ranks` are the processes, which have joined.

    Raises:
        EngineError: an option that several processes do not share.
    """

    def __init__(self, ranks: Ranks, **options: Any) -> None:
        _check_options(options)
        self.ranks, self.world_size = ranks, ranks.size
        if ranks.is_first:
            self._number = next(_numbers)
            with ranks.leading("open", together=False, engine=self._number, options=options):
                self._open(options)
        else:
            self._open(options)

    def _open(self, options: Mapping[str, Any]) -> None:
        super().__init__(**options)
        self._held: dict[str, _Model] = cast(Any, self._models)
        self._mesh = self.ranks.mesh(self.device)

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
        """Load a model, each rank its part of it; folders are read by every rank.

        Raises:
            EngineError: Muon for an adapter.
            ModelError: a folder cannot be read or does not fit, or the native decoder does not run the model.
        """
        require_whole_matrices(optimizer, whole=trainable and lora is None and adapter is None)
        told = self._all(
            "create_model", base=str(base.resolve()), lora=None if lora is None else asdict(lora), seed=seed,
            adapter=None if adapter is None else str(adapter.resolve()), trainable=trainable,
            base_name=base_name or str(base), optimizer=optimizer,
        )  # fmt: skip
        return str(told[0].fields["model_id"])

    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        return self._pass(model_id, data, loss_fn, loss_config, logprobs, backward=False)

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        *,
        loss_fn: str = "cross_entropy",
        loss_config: Mapping[str, float] | None = None,
        logprobs: LogprobScope = "due",
    ) -> ForwardBackwardOutput:
        _optimizer(self._get(model_id))
        return self._pass(model_id, data, loss_fn, loss_config, logprobs, backward=True)

    def _pass(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_config: Mapping[str, float] | None,
        scope: LogprobScope,
        *,
        backward: bool,
    ) -> ForwardBackwardOutput:
        loss = choose_loss(loss_fn, loss_config)
        check_batch(data, self._get(model_id).language_model, loss)
        parts = self._all(
            "pass", together=True, arrays=rows_as_arrays(data, loss.inputs), model_id=model_id, loss_fn=loss_fn,
            loss_config=dict(loss_config or {}), scope=scope, backward=backward,
        )  # fmt: skip
        by_row = {row: logprobs for part in parts for row, logprobs in logprobs_by_row(part, data)}
        return ForwardBackwardOutput(
            loss_sum=math.fsum(part.fields["loss"] for part in parts),
            logprobs=tuple(by_row[row] for row in range(len(data))),
            num_micro_batches=parts[0].fields["num_pieces"],
            router_loss=math.fsum(part.fields["router_loss"] for part in parts),
        )

    def optim_step(self, model_id: str, params: OptimParams) -> OptimStepOutput:
        optimizer = _optimizer(self._get(model_id))
        check_params(params, kind=optimizer.kind, takes=optimizer.takes)
        done = self._all("optim_step", together=True, model_id=model_id, params=asdict(params))
        return OptimStepOutput(**done[0].fields)

    def discard_gradients(self, model_id: str) -> None:
        _optimizer(self._get(model_id))
        self._all("discard_gradients", model_id=model_id)

    def stream(
        self, model_id: str, prompts: Sequence[np.ndarray], params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        model = self._held_model(model_id)

        def decode(what: str, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> torch.Tensor:
            self._all("decode", together=True, arrays=arrays, model_id=model_id, do=what, **numbers)
            assert model.logits is not None
            return model.logits

        led = cast(LanguageModel, LedModel(model.language_model, decode))
        yield from stream_tokens(led, prompts, params, self.device)

    def trained_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """What training changes, by name in the files; gathered one by one when they are read."""
        return self._gathered(model_id, "weights")

    def state_tensors(self, model_id: str) -> dict[str, torch.Tensor]:
        """Optimizer moments by name; gathered one by one when they are read."""
        _optimizer(self._get(model_id))
        return self._gathered(model_id, "moments")

    def write_weights(self, model_id: str, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """As `TorchEngine.write_weights`; rank 0 writes, and holds one tensor at a time beside its part."""
        model = self._held_model(model_id)
        part = folder / ("model" if model.lora is None else "adapter")
        part.mkdir()
        if model.lora is None:
            write_full_weights(part, model.base, tensors)
        else:
            write_adapter(
                part, tensors=tensors, lora=model.lora, targets=model.targets, base_model=model.base_name
            )  # fmt: skip

    def load_state(self, model_id: str, folder: Path, *, optimizer: bool) -> tuple[str, ...]:
        """As `TorchEngine.load_state`: written by any number of processes; each rank reads its rows."""
        _optimizer(self._get(model_id))
        done = self._all("load_state", model_id=model_id, folder=str(folder.resolve()), optimizer=optimizer)
        return tuple(done[0].fields["warnings"])

    def compile_layers(self, model_id: str, on: bool) -> None:
        """Raises EngineError: FSDP's layers are put together by hooks, and are computed as they are."""
        if on:
            what = "torch.compile is for one process: here layers are put together as they are computed"
            raise EngineError(what, where="training.compile", hint="Set training.compile=off.")

    def delete_model(self, model_id: str) -> None:
        self._get(model_id)
        self._all("delete_model", model_id=model_id)

    def _all(
        self, verb: str, *, together: bool = False, arrays: Mapping[str, np.ndarray] | None = None, **fields: Any
    ) -> list[Said]:
        """Rank 0: have every rank do it; what came of it, by rank."""
        arrays = dict(arrays or {})
        with self.ranks.leading(verb, together=together, engine=self._number, arrays=arrays, **fields) as answers:
            mine = self.obey(Said(verb, fields, arrays))
        return [mine, *answers]

    def obey(self, said: Said) -> Said:
        """This rank's share of a verb."""
        try:
            return VERBS[said.verb](self, said)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            hint = "Use more processes, or smaller batches."
            raise OutOfMemoryError(f"memory ran out ({reason})", hint=hint) from error

    def _held_model(self, model_id: str) -> _Model:
        self._get(model_id)
        return self._held[model_id]

    def _gathered(self, model_id: str, part: str) -> dict[str, torch.Tensor]:
        shards = self._held_model(model_id).shards(part)
        # Only what those do who save or compare tensors: see GatheredTensor.
        return {
            name: cast(Any, GatheredTensor(partial(self._gather, model_id, part, name), shard))
            for name, shard in shards.items()
        }

    def _gather(self, model_id: str, part: str, name: str) -> torch.Tensor:
        """Rank 0: a tensor's rows of all ranks, put together on the CPU."""
        shard = self._held_model(model_id).shards(part)[name]
        answers = self._all("fetch", model_id=model_id, part=part, name=name)
        rows = np.concatenate([answer.arrays["rows"] for answer in answers])
        return torch.from_numpy(rows).view(shard.holder.dtype).view(shard.shape)

    def _create_model(self, said: Said) -> Said:
        asked = said.fields
        base, trainable = Path(asked["base"]), bool(asked["trainable"])
        adapter = None if asked["adapter"] is None else Path(asked["adapter"])
        lora = None if asked["lora"] is None else _lora_of(asked["lora"])
        whole = trainable and lora is None and adapter is None
        model = lay_out(
            base, dtype=torch.float32 if whole else self.dtype, device=self.device, attention=self.attention,
            gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip
        counter = DropoutCounter(seed=asked["seed"])
        model.draw_dropout_by(counter)
        linears = model.linears()
        if adapter is not None:
            lora = agreed_lora(adapter, lora, linears)
        if lora is not None:
            adapt(linears, lora, seed=asked["seed"], counter=counter, every_target=adapter is None)
        if model.head_update is not None:
            what = "the output head is divided among the processes, and carries no adapter then"
            hint = "Leave lm_head out of lora.target_modules, or train in one process."
            raise ModelError(what, where="lora.target_modules", hint=hint)
        targets = target_names(linears)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable and (whole or ".lora_" in name))
        divide(model, self._mesh, self.device)
        read_base(model, base)
        if adapter is not None:
            _read_adapter(model, adapter)
        elif lora is not None:
            model.start_adapter(seed=asked["seed"])
        optimizer = None
        if trainable:
            optimizer = self._sharded_optimizer(model, asked["optimizer"])
            model.compute_in(self.dtype)
        model.train(trainable)
        if model.balance is not None:
            model.balance.total = self.ranks.total
        passes = ShardedPasses(
            model, counter, self.device, cast(Any, optimizer), planned_piece_tokens=self.micro_batch_tokens,
            loss_scale=self._new_loss_scale(), rank=self.ranks.rank, size=self.ranks.size,
        )  # fmt: skip
        model_id = f"model-{next(self._ids)}"
        self._held[model_id] = _Model(model, base, asked["base_name"], lora, targets, optimizer, passes)
        return Said("done", {"model_id": model_id})

    def _sharded_optimizer(self, model: ShardedModel, kind: OptimizerKind) -> ShardedOptimizer:
        trained = divided(item for item in model.named_parameters() if item[1].requires_grad)
        if kind == "adamw":
            return ShardedAdamW(trained, self.ranks.sum_in_order)
        hidden = model.hidden_matrices()
        return ShardedMuon(trained, self.ranks.sum_in_order, hidden=hidden, dtype=self._orthogonalising_dtype())

    def _do_pass(self, said: Said) -> Said:
        asked, passes = said.fields, self._held_model(said.fields["model_id"]).passes
        loss, data = choose_loss(asked["loss_fn"], asked["loss_config"]), rows_of_arrays(said.arrays)
        compute = passes.forward_backward if asked["backward"] else passes.forward
        output = compute(data, loss, scope=asked["scope"])
        flat = [logprobs.reshape(-1) for logprobs in output.logprobs]
        fields = {
            "loss": output.loss_sum,
            "router_loss": output.router_loss,
            "num_pieces": output.num_micro_batches,
            "rows": list(passes.rows),
        }
        return Said("done", fields, {"logprobs": np.concatenate([np.empty(0, np.float32), *flat])})

    def _do_optim_step(self, said: Said) -> Said:
        model = self._held_model(said.fields["model_id"])
        optimizer = _optimizer(model)
        output = model.passes.step(partial(optimizer.apply, optimizer.takes(**said.fields["params"])))
        return Said("done", asdict(output))

    def _do_discard(self, said: Said) -> Said:
        self._held_model(said.fields["model_id"]).passes.clear()
        return Said("done")

    def _do_fetch(self, said: Said) -> Said:
        asked = said.fields
        here = self._held_model(asked["model_id"]).shards(asked["part"])[asked["name"]].here
        if here is None:
            return Said("done", {}, {"rows": np.empty(0, np.uint8)})
        flat = here.detach().cpu().contiguous().reshape(-1)
        return Said("done", {}, {"rows": flat.view(torch.uint8).numpy()})

    def _do_load_state(self, said: Said) -> Said:
        model, folder = self._held_model(said.fields["model_id"]), Path(said.fields["folder"])
        state, counter = _optimizer(model), model.passes.counter
        facts = read_facts(folder) if said.fields["optimizer"] else None
        moments = folder / "state" / MOMENTS_NAME
        scale = None
        if model.passes.loss_scale is not None:
            scale = LossScale.of_facts((facts or {}).get("loss_scale"), str(folder))
        if facts is not None:
            where = str(folder / "state")
            require_optimizer(facts, state.kind, where=str(folder))
            require_fit(state.state_shards(), read_entries(moments), kind="optimizer state", where=where)
        if model.lora is not None:
            agreed_lora(folder / "adapter", model.lora, model.language_model.linears())
            _read_adapter(model.language_model, folder / "adapter")
        else:
            part = folder / "model"
            require_fit(model.language_model.base_shards(), stored_tensors(part), kind="weights", where=str(part))
            read_shards(model.language_model.base_shards(), weight_files(part))
        model.passes.clear()
        model.passes.loss_scale = scale
        model.language_model.settle()
        if facts is None:
            state.reset()
            counter.step = 0
            return Said("done", {"warnings": []})
        read_shards(state.state_shards(), [moments])
        state.step, counter.step, counter.seed = (int(facts[key]) for key in ("optimizer_step", "counter_step", "seed"))
        return Said("done", {"warnings": list(differences(facts, self.state_facts(said.fields["model_id"])))})

    def _do_delete_model(self, said: Said) -> Said:
        del self._held[said.fields["model_id"]]
        return Said("done")

    def _do_decode(self, said: Said) -> Said:
        asked, model = said.fields, self._held_model(said.fields["model_id"])
        was_training = model.language_model.training
        model.language_model.eval()
        try:
            if asked["do"] == "start":
                model.decoding = model.language_model.decoding(asked["num_sequences"], asked["capacity"])
                prompts = torch.from_numpy(said.arrays["tokens"]).split(said.arrays["lengths"].tolist())
                model.logits = model.decoding.start([prompt.to(self.device) for prompt in prompts])
            elif model.decoding is not None and asked["do"] == "step":
                model.logits = model.decoding.step(torch.from_numpy(said.arrays["tokens"]).to(self.device))
            elif model.decoding is not None:
                model.decoding.keep(torch.from_numpy(said.arrays["rows"]).to(self.device))
        finally:
            model.language_model.train(was_training)
        return Said("done")


VERBS: dict[str, Callable[[ShardedEngine, Said], Said]] = {
    "create_model": ShardedEngine._create_model,
    "pass": ShardedEngine._do_pass,
    "optim_step": ShardedEngine._do_optim_step,
    "discard_gradients": ShardedEngine._do_discard,
    "fetch": ShardedEngine._do_fetch,
    "load_state": ShardedEngine._do_load_state,
    "delete_model": ShardedEngine._do_delete_model,
    "decode": ShardedEngine._do_decode,
}
_numbers = itertools.count(1)
TOGETHER = {"pass", "optim_step", "decode"}
"""Verbs with collective calls in them: where one rank fails half-way, the others cannot go on."""


def follow(ranks: Ranks) -> None:
    """Ranks other than 0: do what they are told until they are sent home.

    Raises:
        LostRankError: rank 0, or another one, is gone. Any error that this rank had; rank 0 has been told.
    """
    engines: dict[int, ShardedEngine] = {}
    while (said := ranks.next()).verb != "leave":
        try:
            if said.verb == "open":
                engines[said.engine], done = ShardedEngine(ranks, **said.fields["options"]), Said("done")
            else:
                with ranks.noticing_loss():
                    done = engines[said.engine].obey(said)
            ranks.answer(done)
        except LostRankError:
            raise
        except FoundryError as error:
            if said.verb in TOGETHER:
                ranks.give_up(error)
                raise
            ranks.answer_failure(error)
        except BaseException as error:
            ranks.give_up(error)
            raise


def _check_options(options: Mapping[str, Any]) -> None:
    hint = "Train in one process, without torchrun, or change it."
    if (packing := options.get("quantization", "none")) != "none":
        what = f"{packing} weights are packed, and several processes divide plain ones"
        raise EngineError(what, where="model.quantization", hint=hint)
    if options.get("implementation") == "transformers":
        what = "several processes divide the native decoder alone"
        raise EngineError(what, where="model.implementation", hint=hint)
    if options.get("device") == "mps":
        raise EngineError("several processes need CPUs or CUDA", where="model.device", hint=hint)


def _read_adapter(model: ShardedModel, folder: Path) -> None:
    shards, path = model.adapter_shards(), folder / WEIGHTS_NAME
    require_fit(shards, read_entries(path), kind="adapter's tensors", where=str(folder))
    read_shards(shards, [path])


def _lora_of(fields: Mapping[str, Any]) -> LoraConfig:
    targets = fields["target_modules"]
    return LoraConfig(**{**fields, "target_modules": targets if isinstance(targets, str) else tuple(targets)})


def _optimizer(model: Any) -> ShardedOptimizer:
    if model.optimizer is None:
        raise EngineError("this model was loaded to be read, not trained", hint="Create it with trainable=True.")
    return model.optimizer
