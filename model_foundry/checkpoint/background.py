"""A save that does not hold the training loop up: a thread writes while the next forward and backward run.

Between two optimizer steps the weights stand still, so nothing need be copied: `start` the save, and call
`wait_until_read` before the step that changes what is saved. One save at a time, in order. What is on the disk when
the process dies is what `CheckpointStore.save` promises: the checkpoint whole, or the one before it. Knows nothing of
what is saved.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from model_foundry.checkpoint.store import CheckpointStore


class BackgroundSaver:
    """Saves into a store from a thread. Leave the `with` block, or call `wait`, before the process ends.

    `write` runs beside the training loop: whatever it reads must stand still until `wait_until_read` returns.
    """

    def __init__(self, store: CheckpointStore, *, keep: int | None = None) -> None:
        self._store = store
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._was_read = threading.Event()

    def start(
        self,
        name: str,
        step: int,
        write: Callable[[Path], None],
        metadata: Mapping[str, Any] | None = None,
        *,
        expected_bytes: int = 0,
    ) -> None:
        """Begin a save, then prune to `keep`; waits for the one before it first.

        Raises:
            CheckpointError: what the save before this one failed with.
        """
        self.wait()
        was_read = self._was_read = threading.Event()

        def write_and_tell(folder: Path) -> None:
            write(folder)
            was_read.set()

        def work() -> None:
            try:
                self._store.save(name, step, write_and_tell, metadata, expected_bytes=expected_bytes)
                self._store.prune(self._keep)
            except BaseException as error:
                self._error = error
            finally:
                was_read.set()

        # The log filters of a run live in context variables, which a new thread does not inherit.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(work,), name=f"save {name}")
        self._thread.start()

    def wait_until_read(self) -> None:
        """Wait until the running save has read all it writes: from here on the weights may change.

        Raises:
            CheckpointError: what the save failed with, when it already has.
        """
        if self._thread is not None:
            self._was_read.wait()
            if not self._thread.is_alive():
                self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk; raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # the block's own error is the one to see
