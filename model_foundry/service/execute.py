"""Every operation, done: on the host's models, with a reply and the changes that are written together with it.

An operation that was cut off by the death of the process is done again from its beginning, so each can be: what it left
on the disk names the request that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from model_foundry.checkpoint.store import CheckpointStore
from model_foundry.errors import CheckpointError, DataError
from model_foundry.service import passes, sampling
from model_foundry.service.books import Books, Checkpoint, Effect, Model, Operation, Sampler
from model_foundry.service.curves import Curves
from model_foundry.service.host import Host, Resident
from model_foundry.service.journal import Work
from model_foundry.service.replies import sample_reply
from model_foundry.service.requests import (
    CreateModel,
    LoadWeights,
    Sample,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
    read_request,
)
from model_foundry.service.sampling_batch import SamplingBatch
from model_foundry.service.scoring import score
from model_foundry.service.tensors import Pass
from model_foundry.types import SampledSequence


@dataclass(slots=True)
class Outcome:
    """A reply with what it changes: in the journal in the same transaction, in memory after that.

    `model` is the operation's own model where it is another now.
    """

    reply_kind: str
    reply: bytes
    model: Model | None = None
    changes: list[Work[Any]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)

    def add(self, change: tuple[Work[None], Effect]) -> None:
        self.changes.append(change[0])
        self.effects.append(change[1])


@dataclass(frozen=True, slots=True)
class Executor:
    """Does operations one after the other.

    `base_models` are the names by which clients may ask for the base; the first is the one it is told by. A key with
    checkpoints of `max_checkpoint_bytes` or more makes no more.
    """

    books: Books
    host: Host
    texts: sampling.Texts
    samples: SamplingBatch
    base_models: tuple[str, ...]
    curves: Curves = field(default_factory=Curves)
    max_checkpoint_bytes: float = math.inf

    def execute(self, operation: Operation) -> Outcome:
        """Do an operation that is no pass and no sample.

        Raises:
            FoundryError: it is refused or failed; the model is as it was before.
        """
        return _KINDS[operation.kind](self, operation)

    def model(self, operation: Operation) -> Model:
        model = self.books.models.get(operation.lane)
        if model is None or model.state == "unloaded":
            raise DataError("there is no such model any more", where=operation.lane)
        if model.state == "failed":
            raise DataError("this model could not be created", where=operation.lane)
        return model

    def create_model(self, operation: Operation) -> Outcome:
        request: CreateModel = read_request("create_model", orjson.loads(operation.body))
        self.check_base(request.base_model)
        if request.lora_config is None:
            raise DataError("lora_config is missing; the service trains adapters", where="create_model")
        lora = request.lora_config
        seed = operation.seed if lora.seed is None else lora.seed
        # Where the head cannot be trained, sessions are told so, and what is said of a model is what is true of it.
        unembed = lora.train_unembed and self.host.adapts_head
        facts = {**lora.model_dump(), "train_unembed": unembed, "seed": seed % 2**63}
        facts["user_metadata"] = request.user_metadata
        model = self.named(operation, facts)
        self.host.create(model)
        return self.created(model, {"model_id": model.model_id, "type": "create_model"})

    def load_weights(self, operation: Operation) -> Outcome:
        request: LoadWeights = read_request("load_weights", orjson.loads(operation.body))
        checkpoint = self.checkpoint(request.path, operation.owner)
        reply = {"path": request.path, "model_id": operation.lane, "type": "load_weights"}
        if request.base_model is not None:
            self.check_base(request.base_model)
        if request.model_id is not None:
            model, seq = self.model(operation), int(operation.seq or 0)
            self.host.load(model, checkpoint, optimizer=request.optimizer, seq=seq)
            return _json(reply)
        facts = {**checkpoint.facts["lora"], "user_metadata": request.user_metadata}
        model = self.named(operation, facts)
        self.host.create(model)
        try:
            self.host.load(model, checkpoint, optimizer=request.optimizer, seq=0)
        except BaseException:
            self.host.drop(model.model_id)
            raise
        return self.created(model, reply)

    def check_base(self, name: str) -> None:
        if name not in self.base_models:
            raise DataError(f"this service has {self.base_models[0]}, not {name}", where="base_model")

    def named(self, operation: Operation, facts: dict[str, Any]) -> Model:
        return replace(self.books.models[operation.lane], facts=facts)

    def created(self, model: Model, reply: dict[str, Any]) -> Outcome:
        outcome = _json(reply)
        outcome.model = model
        return outcome

    def checkpoint(self, path: str, owner: str) -> Checkpoint:
        found = self.books.checkpoint_at(path, owner)
        if found is None:
            raise DataError("there is no such checkpoint", where=path)
        return found

    def read_pass(self, operation: Operation) -> Pass | None:
        """What a pass asks for; None of another operation.

        Raises:
            FoundryError: it is refused.
        """
        return passes.read_body(operation) if operation.kind in passes.KINDS else None

    def can_join(self, operation: Operation, asked: Pass) -> bool:
        """Whether a pass can be done together with those of other models; its model is in memory then.

        Raises:
            FoundryError: there is no such model, or it cannot be brought back.
        """
        return self.host.engine.can_join(self.host.resident(self.model(operation)).engine_id, asked.data)

    def run_pass(self, operation: Operation, asked: Pass) -> Outcome:
        """Do a pass alone, in pieces.

        Raises:
            FoundryError: it is refused or failed; the gradients are as they were.
        """
        resident = self.host.resident(self.model(operation))
        return self._pass_done(operation, resident, passes.do_pass(self.host.engine, resident.engine_id, asked))

    def _pass_done(self, operation: Operation, resident: Resident, done: passes.PassDone) -> Outcome:
        if done.adds_gradients:
            resident.has_gradients = resident.is_dirty = True
            operation.loss, operation.num_tokens = done.loss, done.num_tokens
            self.curves.of(operation.lane).note_pass(done.loss, done.num_tokens)
        return Outcome("pass", done.reply)

    def run_passes(self, operations: Sequence[Operation], asked: Sequence[Pass]) -> list[Outcome | Exception]:
        """Passes of different models that `can_join`, all forward only or none, at once.

        They are at most as many as stay in memory together.
        """
        residents = [self.host.resident(self.model(operation)) for operation in operations]
        results = passes.do_together(self.host.engine, [resident.engine_id for resident in residents], asked)
        return [
            result if isinstance(result, Exception) else self._pass_done(operation, resident, result)
            for operation, resident, result in zip(operations, residents, results, strict=True)
        ]

    def optim_step(self, operation: Operation) -> Outcome:
        resident = self.host.resident(self.model(operation))
        reply = passes.do_step(self.host.engine, resident.engine_id, operation)
        resident.has_gradients, resident.is_dirty = False, True
        self.curves.of(operation.lane).note_step()
        return _json(reply)

    def save_weights(self, operation: Operation) -> Outcome:
        request: SaveWeights = read_request("save_weights", orjson.loads(operation.body))
        name = request.path or f"step-{operation.seq:08d}"
        saved = self.save(operation, "training", name, request, overwrite=request.overwrite)
        outcome = _json({"path": saved.path, "type": "save_weights"})
        outcome.add(self.books.put(saved))
        return outcome

    def save_for_sampler(self, operation: Operation) -> Outcome:
        request: SaveForSampler = read_request("save_weights_for_sampler", orjson.loads(operation.body))
        model = self.model(operation)
        if request.path is None and request.sampling_session_seq_id is None:
            raise DataError("neither path nor sampling_session_seq_id", where="save_weights_for_sampler")
        # An in-flight sampler may go on with newer weights when they come; it need not, so it is a snapshot as well.
        name = request.path or f"session-{request.sampling_session_seq_id:08d}"
        saved = self.save(operation, "sampler", name, request, is_ephemeral=request.path is None)
        reply = {"path": saved.path, "type": "save_weights_for_sampler"}
        if request.path is None:
            sampler_id = f"{model.session_id}:sample:{request.sampling_session_seq_id}"
            sampler = Sampler(sampler_id, model.session_id, model.owner, operation.created, saved.path)
            reply = {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}
        outcome = _json(reply)
        outcome.add(self.books.put(saved))
        if request.path is None:
            outcome.add(self.books.put(sampler))
        return outcome

    def save_external(self, operation: Operation) -> Outcome:
        """The adapter as PEFT reads it, which is how it lies on the disk anyway."""
        request: SaveExternal = read_request("save_weights_external", orjson.loads(operation.body))
        saved = self.save(operation, "external", request.path, request)
        outcome = _json({"path": saved.path, "size_bytes": saved.size_bytes, "type": "save_weights_external"})
        outcome.add(self.books.put(saved))
        return outcome

    def save(
        self,
        operation: Operation,
        kind: str,
        name: str,
        request: SaveWeights | SaveForSampler | SaveExternal,
        *,
        overwrite: bool = False,
        is_ephemeral: bool = False,
    ) -> Checkpoint:
        """Write a checkpoint, or find that this very request has written it before it was cut off."""
        model = self.model(operation)
        store = self.host.store(model.model_id, kind)
        resident = self.host.resident(model)
        known = self.books.checkpoints.get((model.model_id, kind, name))
        if known is not None and not overwrite:
            raise DataError(
                "a checkpoint of this name exists", where=known.path, hint="Use overwrite, or another name."
            )
        self.check_quota(model.owner, where="save_weights")
        lora = {key: model.facts[key] for key in ("rank", "seed", "train_unembed", "train_mlp", "train_attn")}
        metadata = {
            "request_id": operation.request_id, "model": self.host.fingerprint,
            "base_model": self.base_models[0], "lora": lora,
        }  # fmt: skip
        if not _is_written(store, name, operation.request_id):
            write = self._writer(resident, kind)
            store.save(name, int(operation.seq or 0), write, metadata)
        now = self.books.clock()
        return Checkpoint(
            run_id=model.model_id, kind=kind, name=name, owner=model.owner, created=now,
            size_bytes=store.open(name, verify=False).total_bytes,
            expires=None if request.ttl_seconds is None else now + request.ttl_seconds,
            facts={"lora": lora, "user_metadata": request.user_metadata, "is_ephemeral": is_ephemeral},
        )  # fmt: skip

    def check_quota(self, owner: str, *, where: str) -> None:
        """Raises DataError where a key has its share of the disk."""
        used = sum(each.size_bytes for each in self.books.checkpoints.values() if each.owner == owner)
        if used >= self.max_checkpoint_bytes:
            what = f"checkpoints of this key take {used:,} bytes, and may take {self.max_checkpoint_bytes:,.0f}"
            raise DataError(what, where=where, hint="Delete some, or let them expire.")

    def _writer(self, resident: Resident, kind: str) -> Callable[[Any], None]:
        engine = self.host.engine
        if kind == "training":
            return lambda folder: engine.save_state(resident.engine_id, folder)
        return lambda folder: engine.save_weights(resident.engine_id, folder)

    def unload_model(self, operation: Operation) -> Outcome:
        model = self.model(operation)
        self.host.forget(model.model_id)
        self.curves.forget(model.model_id)
        outcome = self.created(replace(model, state="unloaded"), {"model_id": model.model_id, "type": "unload_model"})
        outcome.changes.append(self.books.drop_operations(model.model_id))
        return outcome

    def let_go(self, model_id: str) -> None:
        """Unload a model whose client has gone.

        Raises:
            FoundryError, SQLAlchemyError: the disk is full, say; it is there as it was.
        """
        model = self.books.models[model_id]
        if model.state != "live":
            return
        (put, apply), drop = self.books.put(replace(model, state="unloaded")), self.books.drop_operations(model_id)
        self.books.journal.run(lambda connection: [work(connection) for work in (put, drop)]).result()
        apply()
        self.host.forget(model_id)
        self.curves.forget(model_id)

    def begin_sample(self, operation: Operation) -> Outcome | None:
        """Let samples into the batch; what is known at once comes back, the rest from `step_samples`.

        Raises:
            FoundryError: it is refused.
        """
        if operation.is_cancelled:
            raise DataError("cancelled by its client before it was begun", where=operation.request_id)
        request: Sample = read_request("asample", orjson.loads(operation.body))
        path = request.model_path
        if request.sampling_session_id is not None:
            path = self.books.samplers[request.sampling_session_id].path
            if request.model_path not in (None, path) or (request.base_model is not None and path is not None):
                what = f"the session samples {path or 'the base'}, and model_path or base_model names another model"
                raise DataError(what, where="asample")
        if request.base_model is not None:
            self.check_base(request.base_model)
        checkpoint = None if path is None else self.checkpoint(path, operation.owner)
        context = self.host.facts["context"]
        can_batch = self.samples.can_batch()
        longest = min(context or self.samples.room_tokens, self.samples.room_tokens) if can_batch else context
        asked = sampling.prepare(request, self.texts, seed=operation.seed, longest=longest)
        if can_batch and asked.params.max_tokens > 0:
            self.samples.begin(operation, asked, checkpoint)
            return None
        sequences = sampling.sample_alone(self.host.engine, self.host.sampler(checkpoint), asked, self.texts)
        return self.sampled(asked, checkpoint, sequences)

    def sampled(
        self, asked: sampling.Prepared, checkpoint: Checkpoint | None, sequences: Sequence[SampledSequence]
    ) -> Outcome:
        """The reply to a request whose samples are there."""
        scores = score(
            self.host.engine, lambda: self.host.sampler(checkpoint), asked.wanted, asked.prompt, sequences,
            temperature=asked.params.temperature, seed=asked.params.seed,
        )  # fmt: skip
        return Outcome("sample", sample_reply(sequences, scores))

    def step_samples(self) -> Iterator[tuple[Operation, Outcome | Exception]]:
        """At most a token for every sample in the batch; the operations that are finished with it."""
        for done in self.samples.step():
            outcome: Outcome | Exception | None = done.error
            if outcome is None:
                try:
                    outcome = self.sampled(done.prepared, done.checkpoint, done.sequences)
                except Exception as error:
                    outcome = error
            yield done.operation, outcome


def _is_written(store: CheckpointStore, name: str, request_id: str) -> bool:
    try:
        return store.open(name).metadata.get("request_id") == request_id
    except CheckpointError:
        return False


def _json(reply: dict[str, Any]) -> Outcome:
    return Outcome("json", orjson.dumps(reply))


_KINDS: dict[str, Callable[[Executor, Operation], Outcome]] = {
    "create_model": Executor.create_model,
    "load_weights": Executor.load_weights,
    "optim_step": Executor.optim_step,
    "save_weights": Executor.save_weights,
    "save_weights_for_sampler": Executor.save_for_sampler,
    "save_weights_external": Executor.save_external,
    "unload_model": Executor.unload_model,
}
