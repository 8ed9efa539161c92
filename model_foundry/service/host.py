"""Models in memory over one base, and how each comes back: its newest whole snapshot, and what was done since.

Used by one thread. A snapshot is a checkpoint with optimizer, named by the operation that it was taken after; the two
newest are kept, and the journal keeps what was done since the older one, so that a damaged snapshot costs time alone.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from model_foundry.checkpoint import atomic
from model_foundry.checkpoint.store import Checkpoint as StoredCheckpoint
from model_foundry.checkpoint.store import CheckpointStore
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import (
    ArchitectureMismatchError,
    CheckpointCorruptError,
    CheckpointError,
    DataError,
    EngineError,
    ModelError,
)
from model_foundry.models.config import HEAD_LAYER
from model_foundry.models.finder import ModelSource
from model_foundry.models.folder import fingerprint, read_config
from model_foundry.service import passes
from model_foundry.service.books import SEGMENTS, Books, Checkpoint, Model, Operation
from model_foundry.service.requests import LoadWeights, read_request
from model_foundry.types import LoraConfig

LORA_ALPHA = 32.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TRAINED = ("train_attn", "train_mlp", "train_unembed")
"""What of a model is trained, as its facts have it."""
_BODY_BYTES = 64_000_000
"""Bodies kept for doing a model's operations again; with more, a snapshot is taken sooner."""
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Resident:
    """A model in the engine. `seconds` and `body_bytes` are what was done since its last snapshot."""

    engine_id: str
    seq: int
    num_bytes: int
    has_gradients: bool = False
    seconds: float = 0.0
    body_bytes: int = 0
    is_dirty: bool = False


class Host:
    """The engine's models by the service's ids.

    Args:
        folder: the state folder.
        max_models: models of clients in memory at once, beside as many samplers; the rest is on the disk.
        snapshot_seconds: work after which a model is written down.
        max_bytes: that models of clients take together, with gradients and moments; a single one may take more.
        shares_passes: do short passes of several models as one, where this base and machine give each the same bits.
        linked_from_bytes: of a checkpoint this large, the snapshot taken right after its load shares the files: writing
            them again takes longer than a client wants to wait. A smaller one is on the disk twice from then on.

    Attributes:
        kept: models that stay in memory for what is being done.

    Raises:
        ModelError: the base cannot be loaded, or is an adapter.
    """

    def __init__(
        self,
        books: Books,
        engine: TorchEngine,
        source: ModelSource,
        *,
        folder: Path,
        max_models: int,
        snapshot_seconds: float,
        max_bytes: float = math.inf,
        shares_passes: bool = True,
        linked_from_bytes: float = 200e6,
    ) -> None:
        if source.adapter is not None:
            hint = "Merge it first: foundry export RUN; then serve the merged folder."
            raise ModelError(
                "the service trains adapters over a base, and this is an adapter", where=source.name, hint=hint
            )
        self.books, self.engine, self.source, self.folder = books, engine, source, folder
        self.max_models, self.max_bytes, self.snapshot_seconds = max_models, max_bytes, snapshot_seconds
        self.fingerprint = fingerprint(source.folder)
        self.base_id = engine.create_model(source.folder, lora=None, trainable=False)
        self.shares_passes = shares_passes and self._share_base()
        self.facts = engine.describe(self.base_id)
        self.architecture = str(read_config(source.folder).get("model_type"))
        self.kept: set[str] = set()
        self.linked_from_bytes = linked_from_bytes
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._samplers: OrderedDict[tuple[str, float], str] = OrderedDict()

    def _share_base(self) -> bool:
        try:
            self.engine.share_base(self.base_id)
        except EngineError as error:
            logger.warning("every pass is done alone: %s", error)
            return False
        return True

    def lora(self, model: Model) -> LoraConfig:
        """An adapter's shape from what was asked for.

        Raises:
            DataError: nothing would be trained, or the parts have names that only `all-linear` reaches.
        """
        attention, mlp, head = (bool(model.facts[f"train_{part}"]) for part in ("attn", "mlp", "unembed"))
        if not (attention or mlp or head):
            what = "train_attn, train_mlp and train_unembed are false, so no layer would be trained"
            raise DataError(what, where="lora_config")
        if attention and mlp and not head:
            targets: str | tuple[str, ...] = "all-linear"
        elif self.adapts_head:
            targets = ATTENTION * attention + MLP * mlp + (HEAD_LAYER,) * head
        else:
            what = "which layers are attention and which are not is not known for this architecture"
            raise DataError(what, where="lora_config", hint="Leave train_attn and train_mlp true.")
        return LoraConfig(r=int(model.facts["rank"]), lora_alpha=LORA_ALPHA, target_modules=targets)

    def create(self, model: Model) -> None:
        """A new model; nothing is left behind where that fails."""
        self._make_room()
        resident = self._resident(model, seq=0)
        resident.is_dirty = True
        self._residents[model.model_id] = resident
        self._keep_within(model.model_id)

    def load(self, model: Model, checkpoint: Checkpoint, *, optimizer: bool, seq: int) -> None:
        """Put a checkpoint into a model, and write the model down: the checkpoint may be gone when it is needed again.

        Layers that the checkpoint's model was asked not to train, and this one is, begin afresh: so where nothing has
        been done to the model, and no optimizer comes with the weights.

        Args:
            seq: of the operation that asks for it.

        Raises:
            FoundryError: it is damaged or does not fit, or the disk is full; the model is as it was.
        """
        resident = self.resident(model)
        stored, is_whole = self._load(resident, model, checkpoint, optimizer=optimizer)
        parts = () if not is_whole else ("adapter", "state") if optimizer else ("adapter",)
        resident.seq = seq
        try:
            self._snapshot(model.model_id, lambda folder: self._write_loaded(resident, stored, parts, folder))
        except BaseException:
            # In memory it is what the journal will say it is not: it comes back from the disk, as it was.
            self.drop(model.model_id)
            snapshot = self.snapshots(model.model_id).path(_snapshot_name(seq))
            if snapshot.is_dir():
                atomic.remove_directory(snapshot)
            raise

    def _load(
        self, resident: Resident, model: Model, checkpoint: Checkpoint, *, optimizer: bool
    ) -> tuple[StoredCheckpoint, bool]:
        """Every byte is verified first; where it fails, nothing was changed.

        Returns:
            The checkpoint, and whether it holds every layer of the model.
        """
        stored, theirs = self.open_for_base(checkpoint), checkpoint.facts["lora"]
        may_lack = not optimizer and resident.seq <= 0 and any(model.facts[key] and not theirs[key] for key in TRAINED)
        try:
            notes = self.engine.load_state(
                resident.engine_id, stored.path, optimizer=optimizer, may_lack=may_lack
            )  # fmt: skip
        except ArchitectureMismatchError as error:
            hint = "A client made from the checkpoint's path has the checkpoint's shape."
            raise ArchitectureMismatchError(error.what, where=checkpoint.path, hint=hint) from error
        for note in notes:
            logger.warning("%s: %s", checkpoint.path, note)
        resident.has_gradients, resident.is_dirty = False, True
        return stored, not may_lack

    def _write_loaded(self, resident: Resident, stored: StoredCheckpoint, parts: Sequence[str], folder: Path) -> None:
        """The state of a model that was just loaded.

        Args:
            parts: what is the same as in the checkpoint that it was loaded from; shared with it where that pays.
        """
        if not parts or stored.total_bytes < self.linked_from_bytes or not stored.link_into(folder, parts):
            self.engine.save_state(resident.engine_id, folder)
        elif "state" not in parts:
            tensors, facts = self.engine.state_tensors(resident.engine_id), self.engine.state_facts(resident.engine_id)
            self.engine.write_state(resident.engine_id, folder, tensors, facts)

    def resident(self, model: Model) -> Resident:
        """The model, brought back where it is not in memory.

        Raises:
            CheckpointError: it cannot be: its snapshots are damaged, and what they stood for is not kept.
        """
        found = self._residents.get(model.model_id)
        if found is not None:
            self._residents.move_to_end(model.model_id)
            return found
        self._make_room()
        resident = self._bring_back(model)
        self._residents[model.model_id] = resident
        self._keep_within(model.model_id)
        return resident

    def is_resident(self, model_id: str) -> bool:
        """Whether a model is in memory; asked from any thread."""
        return model_id in self._residents

    def _resident(self, model: Model, *, seq: int) -> Resident:
        """A fresh one."""
        engine_id = self.engine.create_model(
            self.source.folder, lora=self.lora(model), seed=int(model.facts["seed"]), base_name=self.base_name
        )
        facts = self.engine.describe(engine_id)
        # Weights and what the optimizer remembers, and the gradients.
        return Resident(engine_id, seq, num_bytes=facts["checkpoint_bytes"] + 4 * facts["trained_parameters"])

    @property
    def adapts_head(self) -> bool:
        """Whether adapters can be put on the output head."""
        return self.facts["implementation"] == "native"

    @property
    def base_name(self) -> str:
        """What adapters name as their base."""
        is_here = Path(self.source.name).exists()
        return str(self.source.folder.resolve()) if is_here else self.source.name

    def _bring_back(self, model: Model) -> Resident:
        store = self.snapshots(model.model_id)
        for later in store.list():
            # Taken by an operation that was cut off before it was answered, and will be done again.
            if later.step > model.done_seq:
                atomic.remove_directory(later.path)
        snapshot = store.newest_valid(logger.warning)
        resident = self._resident(model, seq=-1 if snapshot is None else snapshot.step)
        try:
            if snapshot is not None:
                self.engine.load_state(resident.engine_id, snapshot.path, optimizer=True)
            self._do_again(model, resident)
        except BaseException:
            self.engine.delete_model(resident.engine_id)
            raise
        return resident

    def _do_again(self, model: Model, resident: Resident) -> None:
        for operation in self.books.done_after(model.model_id, resident.seq):
            if operation.kind in ("forward_backward", "optim_step", "load_weights") and not operation.body:
                what = f"its snapshots are damaged, and its operation {operation.seq} is not kept any more"
                raise CheckpointError(what, where=model.model_id, hint="Go on from its last checkpoint.")
            if operation.kind == "forward_backward":
                done = passes.do_pass(self.engine, resident.engine_id, passes.read_body(operation))
                resident.has_gradients |= done.adds_gradients
            elif operation.kind == "optim_step":
                passes.do_step(self.engine, resident.engine_id, operation)
                resident.has_gradients = False
            elif operation.kind == "load_weights":
                self._load_again(model, resident, operation)
            resident.seq, resident.is_dirty = int(operation.seq or 0), True
        # What changed nothing is not done again.
        resident.seq = max(resident.seq, model.done_seq)

    def _load_again(self, model: Model, resident: Resident, operation: Operation) -> None:
        request: LoadWeights = read_request("load_weights", orjson.loads(operation.body))
        checkpoint = self.books.checkpoint_at(request.path, model.owner)
        if checkpoint is None or checkpoint.created > operation.created:
            what = f"the snapshot after its load of {request.path} is damaged, and that checkpoint is gone"
            raise CheckpointError(what, where=model.model_id)
        self._load(resident, model, checkpoint, optimizer=request.optimizer)

    def snapshot(self, model_id: str) -> None:
        """Write a model down, and forget the bodies that no snapshot needs any more."""
        engine_id = self._residents[model_id].engine_id
        self._snapshot(model_id, lambda part: self.engine.save_state(engine_id, part))

    def _snapshot(self, model_id: str, write: Callable[[Path], None]) -> None:
        resident, store = self._residents[model_id], self.snapshots(model_id)
        store.save(_snapshot_name(resident.seq), resident.seq, write)
        store.prune(keep=2)
        kept = store.list()
        if len(kept) > 1:
            self.books.journal.run(self.books.drop_bodies(model_id, kept[0].step), durable=False)
        resident.seconds, resident.body_bytes, resident.is_dirty = 0.0, 0, False

    def note(self, model_id: str, *, seq: int | None, seconds: float, body_bytes: int) -> None:
        """An operation of a model was done, and is in the journal."""
        resident = self._residents.get(model_id)
        if resident is None or seq is None:
            return
        resident.seq = seq
        resident.seconds += seconds
        resident.body_bytes += body_bytes

    def snapshot_if_due(self, model_id: str) -> None:
        resident = self._residents.get(model_id)
        if resident is None or resident.has_gradients or not resident.is_dirty:
            return
        if resident.seconds >= self.snapshot_seconds or resident.body_bytes >= _BODY_BYTES:
            self.snapshot(model_id)

    def snapshot_all(self) -> None:
        """Before the end: a start afterwards has nothing to do again."""
        for model_id, resident in self._residents.items():
            if resident.is_dirty and not resident.has_gradients:
                self.snapshot(model_id)

    def evict(self, model_id: str) -> None:
        """Out of memory, on to the disk."""
        resident = self._residents.get(model_id)
        if resident is None:
            return
        if resident.is_dirty and not resident.has_gradients:
            self.snapshot(model_id)
        self.drop(model_id)

    def drop(self, model_id: str) -> None:
        """Out of memory, with what was done since its last snapshot; that is done again when it comes back."""
        resident = self._residents.pop(model_id, None)
        if resident is not None:
            self.engine.delete_model(resident.engine_id)

    def forget(self, model_id: str) -> None:
        """A model that nobody will ask for again, with its snapshots."""
        self.drop(model_id)
        if self.snapshots(model_id).root.is_dir():
            atomic.remove_directory(self.snapshots(model_id).root)

    def _make_room(self) -> None:
        """For one more."""
        while len(self._residents) >= self.max_models and self._evict_one():
            pass

    def _keep_within(self, model_id: str) -> None:
        """Others give way until the memory for models is kept to, with this one in it."""
        while sum(resident.num_bytes for resident in self._residents.values()) > self.max_bytes:
            if not self._evict_one(besides=model_id):
                return

    def _evict_one(self, besides: str | None = None) -> bool:
        """The one not used for longest; rather one without gradients, which would be computed again."""
        free = [name for name in self._residents if name not in self.kept and name != besides]
        if free:
            self.evict(next((name for name in free if not self._residents[name].has_gradients), free[0]))
        return bool(free)

    def sampler(self, checkpoint: Checkpoint | None) -> str:
        """The engine's model to sample from; the base for None."""
        if checkpoint is None:
            return self.base_id
        key = (checkpoint.path, checkpoint.created)
        if key not in self._samplers:
            stored = self.open_for_base(checkpoint)
            while len(self._samplers) >= self.max_models:
                self.engine.delete_model(self._samplers.popitem(last=False)[1])
            adapter = stored.path / "adapter"
            self._samplers[key] = self.engine.create_model(
                self.source.folder, lora=None, adapter=adapter, trainable=False
            )
        self._samplers.move_to_end(key)
        return self._samplers[key]

    def forget_unloaded(self) -> None:
        """What a kill left of models that were being unloaded: their snapshots, whole or half removed."""
        for model in self.books.models.values():
            folder = self.snapshots(model.model_id).root.parent
            if model.state != "live" and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)

    def snapshots(self, model_id: str) -> CheckpointStore:
        return CheckpointStore(self.folder / "snapshots" / folder_name(model_id) / "kept")

    def store(self, run_id: str, kind: str) -> CheckpointStore:
        return stored_checkpoints(self.folder, run_id, kind)

    def open_for_base(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """`open`; refused where it is an adapter over another base.

        Raises:
            DataError: it is.
        """
        stored = self.open(checkpoint)
        if stored.metadata.get("model") != self.fingerprint:
            base = stored.metadata.get("base_model")
            raise DataError(f"it was trained on another base ({base})", where=checkpoint.path)
        return stored

    def open(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """Every byte verified.

        Raises:
            CheckpointCorruptError: it is damaged, or gone.
        """
        try:
            return self.store(checkpoint.run_id, checkpoint.kind).open(checkpoint.name)
        except CheckpointCorruptError:
            raise
        except CheckpointError as error:
            raise CheckpointCorruptError("its folder is gone", where=checkpoint.path) from error


def _snapshot_name(seq: int) -> str:
    return f"seq-{seq:010d}"


def stored_checkpoints(state_dir: Path, run_id: str, kind: str) -> CheckpointStore:
    """The checkpoints of a run, of one kind."""
    return CheckpointStore(state_dir / "runs" / folder_name(run_id) / SEGMENTS[kind])


def folder_name(run_id: str) -> str:
    """`SESSION:train:0` as a folder's name; ids are the service's own, so nothing else is in them."""
    return run_id.replace(":", "-")
