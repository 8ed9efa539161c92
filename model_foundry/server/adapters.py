"""Adapters that come and go while the server runs: by an admin's word, or as the run that is served trains on."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from model_foundry.checkpoint.store import CheckpointStore
from model_foundry.errors import ArchitectureMismatchError, FoundryError, ModelError
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import fingerprint
from model_foundry.models.runs import checkpoint_of_run, checkpoint_part
from model_foundry.rendering import Renderer
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
            self._catalog.put(ServedModel(name, renderer, adapter=unique, parent=base.name, removable=True))

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
        self._run, self._name, self._backend, self._catalog = run, name, backend, catalog
        self._every, self._go_over = every_seconds, go_over
        self._leaving = _Leaving(backend, catalog)
        self._seen = self._tried = _newest(run)
        self._num_tries = 0

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
        newest = await asyncio.to_thread(_newest, self._run)
        if newest is None or newest == self._seen:
            return False
        self._num_tries = self._num_tries + 1 if newest == self._tried else 1
        self._tried = newest
        if self._num_tries == TRIES:
            self._seen = newest
        checkpoint, _ = await asyncio.to_thread(checkpoint_of_run, self._run)
        part, old = checkpoint_part(checkpoint), self._catalog.find(self._name)
        if part is None or part.name != ("adapter" if self._go_over is None else "model"):
            raise ModelError("it is of another kind than the checkpoints before it", where=str(checkpoint))
        if self._go_over is not None:
            await self._go_over(part)
            self._catalog.put(replace(old, note=checkpoint.name))
        else:
            adapter = f"{self._name}@{newest}"
            await self._backend.add_adapter(adapter, part)
            self._catalog.put(replace(old, adapter=adapter, note=checkpoint.name))
            if old.adapter is not None:
                self._leaving.add(old.adapter)
        self._seen = newest
        logger.info("%s is now %s", self._name, checkpoint.name)
        return True


def _newest(run: Path) -> str | None:
    """Name and digest of the newest checkpoint, without reading its contents."""
    found = CheckpointStore(run / "checkpoints").list()
    return f"{found[-1].name}-{found[-1].manifest.digest[:8]}" if found else None
