"""What was trained by `foundry train`, or an adapter of PEFT's, as a checkpoint of a service: clients go on from it."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from pathlib import Path

from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.errors import DataError, RunError, UsageError
from model_foundry.models.adapter import read_adapter_config
from model_foundry.models.config import HEAD_LAYER
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import fingerprint
from model_foundry.service.books import Books, Checkpoint, Model, Session
from model_foundry.service.host import ATTENTION, LORA_ALPHA, MLP, stored_checkpoints
from model_foundry.service.journal import Journal
from model_foundry.service.keys import Keys
from model_foundry.service.requests import MAX_RANK
from model_foundry.types import LoraConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def import_checkpoint(
    source: str, *, state_dir: Path, name: str, key: str | None, journal_url: str | None = None
) -> str:
    """Copy a run's last checkpoint, a checkpoint or an adapter folder into a service's state.

    Args:
        key: whose it is, by the name of a key that was minted; None publishes it, so that everybody may read it.
        journal_url: of the PostgreSQL database in which the service keeps its journal; None: it is in `state_dir`.

    Returns:
        Its `tinker://` path.

    Raises:
        DataError: it is a whole model, or an adapter of a shape that the service has none of.
        RunError: the service is running, or holds another base.
        UsageError: no such key, or no possible name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a checkpoint's name", hint="Use letters, digits, -, _ and dots.")
    model = resolve_model(source)
    if model.adapter is None:
        raise DataError("it is a whole model, and the service trains adapters", where=source,
                        hint="Serve it as the base: foundry service base_model=FOLDER.")  # fmt: skip
    adapter = model.adapter
    lora = service_shape(read_adapter_config(adapter), where=str(adapter))
    state_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock.acquire(state_dir / ".lock", wait_seconds=1.0)
    except LockHeldError as error:
        what = f"{error.holder} serves from here, and would not see it"
        raise RunError(what, where=str(state_dir), hint="Stop it, import, and start it again.") from None
    journal = None
    try:
        journal = Journal(state_dir, url=journal_url, exclusive=True)
        base = fingerprint(model.folder)
        journal.claim("base", base, what="models trained over another base")
        books = Books(journal)
        owner = "imported" if key is None else _owner(journal, key)
        session = Session(f"import-{uuid.uuid4().hex}", owner, time.time(), {"user_metadata": None}, time.time())
        facts = {**lora, "user_metadata": {"imported_from": source}}
        run = Model(f"{session.session_id}:train:0", session.session_id, owner, session.created, session.created,
                    facts, state="unloaded", done_seq=0)  # fmt: skip
        metadata = {"request_id": None, "model": base, "base_model": model.provenance.get("base"), "lora": lora}
        store = stored_checkpoints(state_dir, run.model_id, "training")
        store.save(name, 0, lambda folder: _copy(adapter, folder), metadata)
        checkpoint = Checkpoint(
            run.model_id, "training", name, owner, session.created, store.open(name).total_bytes,
            {"lora": lora, "user_metadata": facts["user_metadata"], "is_ephemeral": False}, public=key is None,
        )  # fmt: skip
        works = [books.put(item)[0] for item in (session, run, checkpoint)]
        journal.run(lambda connection: [work(connection) for work in works]).result()
        return checkpoint.path
    finally:
        if journal is not None:
            journal.close()
        lock.release()


def _copy(adapter: Path, folder: Path) -> None:
    """The adapter, and the optimizer's state where it lies beside it."""
    shutil.copytree(adapter, folder / "adapter")
    if (adapter.parent / "state").is_dir():
        shutil.copytree(adapter.parent / "state", folder / "state")


def service_shape(lora: LoraConfig, *, where: str) -> dict[str, int | bool]:
    """An adapter's shape as clients of the service say it.

    Raises:
        DataError: they cannot say it; what is different is named.
    """
    differs = [
        text
        for text, is_so in (
            (f"lora_alpha is {lora.lora_alpha:g}, not {LORA_ALPHA:g}", lora.lora_alpha != LORA_ALPHA),
            ("use_rslora is on", lora.use_rslora),
            ("use_dora is on", lora.use_dora),
            (f"lora_dropout is {lora.lora_dropout:g}", lora.lora_dropout != 0),
            (f"its rank is {lora.r}, over {MAX_RANK}", lora.r > MAX_RANK),
        )
        if is_so
    ]
    named = (*ATTENTION, *MLP) if lora.target_modules == "all-linear" else lora.target_modules
    targets = frozenset((named,) if isinstance(named, str) else named)
    unembed = HEAD_LAYER in targets
    shapes = {
        frozenset((*ATTENTION * attention, *MLP * mlp, *(HEAD_LAYER,) * unembed)): (attention, mlp)
        for attention in (False, True) for mlp in (False, True) if attention or mlp or unembed
    }  # fmt: skip
    if targets not in shapes:
        differs.append(f"target_modules are {lora.target_modules}")
    if differs:
        raise DataError(f"the service's adapters are of another shape ({'; '.join(differs)})", where=where,
                        hint="Train it with the service's: lora_alpha 32, all-linear, nothing else on.")  # fmt: skip
    attention, mlp = shapes[targets]
    return {"rank": lora.r, "seed": 0, "train_unembed": unembed, "train_mlp": mlp, "train_attn": attention}


def _owner(journal: Journal, name: str) -> str:
    found = next((key for key in Keys(journal, is_open=False).list() if key.name == name and key.revoked is None), None)
    if found is None:
        raise UsageError(f"no key named {name!r} is in use", hint="List them with: foundry service keys list")
    return found.key_id
