"""Adapters that come and go while the server runs: by an admin's word, or as the run that is served trains on."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from model_foundry.checkpoint.store import Checkpoint, CheckpointStore
from model_foundry.errors import ArchitectureMismatchError, FoundryError, ModelError
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import fingerprint
from model_foundry.models.runs import checkpoint_part
from model_foundry.rendering import Renderer
from model_foundry.run.directory import is_run
from model_foundry.run.trained import trained_model_fields
from model_foundry.server.backends.base import Backend
from model_foundry.server.catalog import Catalog, ServedModel
from model_foundry.server.problems import Problem
from model_foundry.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
TRIES = 3
"""How often a checkpoint is tried: memory that was short may be there a little later, a damaged file stays so."""


def find_adapter(name: str, base: Path, *, pull: bool) -> Path:
    """The PEFT folder that a run, checkpoint or adapter folder stands for.

    Raises:
        ModelError: it holds none, or cannot be read. ArchitectureMismatchError: it is for another base.
    """
    source = resolve_model(name, pull=pull)
    if source.adapter is None:
        raise ModelError("it holds no adapter", where=name, hint="Serve it as the model instead.")
    if source.folder != base and fingerprint(source.folder) != fingerprint(base):
        raise ArchitectureMismatchError("it was trained on another base than the one that is served", where=name)
    return source.adapter


def renderer_for(name: str, tokenizer: Tokenizer, fallback: Renderer) -> Renderer:
    """The renderer of the run that trained `name`; the base's where no run did."""
    fields, now = trained_model_fields(name)
    return Renderer(tokenizer, str(fields["template"]), now=now) if "template" in fields else fallback


def checkpoint_name(part: Path) -> str | None:
    """Name of the run's checkpoint whose `adapter` or `model` folder this is; None where it is none of a run."""
    checkpoint = part.parent
    is_of_run = checkpoint.parent.name == "checkpoints" and is_run(checkpoint.parent.parent)
    return checkpoint.name if is_of_run else None


class _Leaving:
    """Adapters that no name stands for any more: they go when the requests that hold them have ended."""

    def __init__(self, backend: Backend, catalog: Catalog) -> None:
        self._backend, self._catalog = backend, catalog
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, adapter: str) -> None:
        task = asyncio.create_task(self._remove(adapter))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _remove(self, adapter: str) -> None:
        await self._catalog.unused(adapter)
        await self._backend.remove_adapter(adapter)


class AdapterShelf:
    """The adapters of one folder, and what of them is served."""

    def __init__(self, backend: Backend, catalog: Catalog, *, base: Path | None, folder: Path | None) -> None:
        self._backend, self._catalog, self._base, self._folder = backend, catalog, base, folder
        self._lock, self._leaving = asyncio.Lock(), _Leaving(backend, catalog)
        self._numbers = itertools.count(1)

    def served(self) -> list[str]:
        return [model.name for model in self._catalog if model.adapter is not None]

    def available(self) -> dict[str, Path]:
        """Name -> folder, of what lies in the folder itself: links and what begins with a dot are left out."""
        if self._folder is None:
            return {}
        try:
            entries = list(os.scandir(self._folder))
        except OSError as error:
            raise Problem(500, "the adapter folder cannot be read", code="internal_error") from error
        return {
            entry.name: Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        }

    async def add(self, name: str, folder: str) -> None:
        """Serve the adapter in `folder` as `name`.

        Raises:
            Problem: the name is taken, or there is no such folder. ModelError: the adapter does not fit.
        """
        async with self._lock:
            if name in self._catalog:
                raise Problem(409, "a model of this name is served already", param="name", code="name_taken")
            path = self.available().get(folder)
            if path is None or self._base is None:
                raise Problem(404, "there is no such adapter folder", param="folder", code="adapter_not_found")
            adapter = await asyncio.to_thread(find_adapter, str(path), self._base, pull=False)
            base = next(model for model in self._catalog if model.adapter is None)
            renderer = await asyncio.to_thread(renderer_for, str(path), base.renderer.tokenizer, base.renderer)
            # One that was removed may still be there under this name, for requests that hold it.
            unique = f"{name}@{next(self._numbers)}"
            await self._backend.add_adapter(unique, adapter)
            served = ServedModel(
                name, renderer, adapter=unique, parent=base.name, checkpoint=checkpoint_name(adapter), removable=True
            )
            self._catalog.put(served)

    async def remove(self, name: str) -> None:
        """Requests for it that run or wait end undisturbed. Raises: Problem."""
        async with self._lock:
            if name not in self._catalog:
                raise Problem(404, "no adapter of this name is served", param="name", code="model_not_found")
            model = self._catalog.find(name)
            if not model.removable or model.adapter is None:
                raise Problem(409, "this model was given at the start and stays", param="name", code="not_removable")
            self._catalog.remove(name)
            self._leaving.add(model.adapter)


class Follower:
    """Keeps a served name at the newest checkpoint of a run that is being trained.

    Args:
        go_over: serves the model in a folder from now on, where the run trains every weight; None where it trains an
            adapter.
    """

    def __init__(
        self,
        run: Path,
        name: str,
        backend: Backend,
        catalog: Catalog,
        *,
        every_seconds: float,
        go_over: Callable[[Path], Awaitable[None]] | None = None,
    ) -> None:
        self._name, self._backend, self._catalog = name, backend, catalog
        self._every, self._go_over = every_seconds, go_over
        self._leaving = _Leaving(backend, catalog)
        self._store = CheckpointStore(run / "checkpoints")
        self._served = self._opened(catalog)
        self._seen = self._tried = _identity(self._served)
        self._num_tries = 0

    def _opened(self, catalog: Catalog) -> Checkpoint | None:
        """The checkpoint that the server began with; None where its name cannot be read there any more."""
        name = catalog.find(self._name).checkpoint
        found = [checkpoint for checkpoint in self._store.list() if checkpoint.name == name]
        return found[0] if found else None

    async def run(self, until: Callable[[], bool]) -> None:
        """Look again and again. What cannot be used is said whenever it is tried, and the checkpoint before stays."""
        while not until():
            await asyncio.sleep(self._every)
            try:
                await self.look()
            except (FoundryError, OSError) as error:
                logger.warning("the newest checkpoint of %s is not served: %s", self._name, error)
            except Exception:  # short memory, for one: later checkpoints are looked for all the same
                logger.exception("the newest checkpoint of %s is not served", self._name)

    async def look(self) -> bool:
        """Whether there was a newer one, which is served from now on."""
        listed = await asyncio.to_thread(self._store.list)
        newest = _identity(listed[-1] if listed else None)
        if newest is None or newest == self._seen:
            return False
        self._num_tries = self._num_tries + 1 if newest == self._tried else 1
        self._tried = newest
        if self._num_tries == TRIES:
            self._seen = newest
        passed_over: list[str] = []
        checkpoint = await asyncio.to_thread(self._store.newest_valid, passed_over.append)
        for reason in passed_over:
            logger.warning("%s is not served at its newest: %s", self._name, reason)
        if checkpoint is None or self._is_no_news(checkpoint, fallen_back=bool(passed_over)):
            self._seen = newest
            return False
        await self._go_to(checkpoint)
        self._served, self._seen = checkpoint, newest
        logger.info("%s is now %s", self._name, checkpoint.name)
        return True

    def _is_no_news(self, checkpoint: Checkpoint, *, fallen_back: bool) -> bool:
        """Whether it is served already, or comes before what is, whose successors are damaged."""
        served = self._served
        if served is None:
            return False
        return _identity(served) == _identity(checkpoint) or (fallen_back and checkpoint.step <= served.step)

    async def _go_to(self, checkpoint: Checkpoint) -> None:
        part, old = checkpoint_part(checkpoint.path), self._catalog.find(self._name)
        if part is None or part.name != ("adapter" if self._go_over is None else "model"):
            raise ModelError("it is of another kind than the checkpoints before it", where=str(checkpoint.path))
        if self._go_over is not None:
            await self._go_over(part)
            self._catalog.put(replace(old, checkpoint=checkpoint.name))
            return
        adapter = f"{self._name}@{_identity(checkpoint)}"
        await self._backend.add_adapter(adapter, part)
        self._catalog.put(replace(old, adapter=adapter, checkpoint=checkpoint.name))
        if old.adapter is not None:
            self._leaving.add(old.adapter)


def _identity(checkpoint: Checkpoint | None) -> str | None:
    """Name and digest: one that is written anew under its old name is another one."""
    return None if checkpoint is None else f"{checkpoint.name}-{checkpoint.manifest.digest[:8]}"
