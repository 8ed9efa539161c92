"""metrics.jsonl: one JSON record a line, in the order things happened.

Whatever depends on the wall clock lies under the key "clock" and nowhere else, so two runs can be compared bit for
bit by the rest. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import orjson

from model_foundry.checkpoint.atomic import append_line, atomic_write, cut_torn_line
from model_foundry.errors import RunError

logger = logging.getLogger(__name__)

CLOCK = "clock"


class MetricsLog:
    """The metrics of one run, open for appending. A last line torn by a kill is removed on opening.

    Every record reaches the system before `append` returns, so a killed process loses none; `sync` before a
    checkpoint makes them survive a power cut as well. Append all of a step's records before saving that step: a
    resumed run goes on after the checkpoint, and cannot know what was still to be said about it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self.torn = cut_torn_line(path)
        except OSError as error:
            raise _explain(error, path) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record. JSON has no NaN or infinity: such a number is written as null.

        Raises:
            RunError: the disk is full; the unfinished line is taken back.
        """
        line = orjson.dumps(dict(record), option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            append_line(self._descriptor, line)
        except OSError as error:
            cut_torn_line(self.path)
            raise _explain(error, self.path) from error

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def read(self) -> list[dict[str, Any]]:
        """Every record; see `read_metrics`."""
        return read_metrics(self.path)

    def truncate_after(self, step: int) -> int:
        """Drop the first record of a step after `step` and all that follows it; how many went.

        Raises:
            RunError: a line cannot be read.
        """
        lines = _lines(self.path)
        num_kept, last_step = len(lines), 0
        for index, line in enumerate(lines):
            record_step = _parse(line, self.path, index + 1).get("step") or 0
            if record_step > step:
                num_kept = index
                break
            last_step = record_step
        if last_step < step:
            # Only a power cut, or a person, can do this: a killed process loses nothing that it appended.
            logger.warning("%s ends at step %d, the run goes on after step %d", self.path, last_step, step)
        if num_kept < len(lines):
            atomic_write(self.path, b"".join(line + b"\n" for line in lines[:num_kept]))
            os.close(self._descriptor)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        return len(lines) - num_kept

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of a metrics file, also of a run that is being written (its unfinished last line is not yet there).

    Raises:
        RunError: the file is missing, or a line is not a JSON object; none is skipped.
    """
    return [_parse(line, path, number) for number, line in enumerate(_lines(path), start=1)]


def comparable_lines(path: Path) -> list[bytes]:
    """The records without their "clock", one line of bytes each, for bit-by-bit comparison of two runs."""
    return [
        orjson.dumps({key: value for key, value in record.items() if key != CLOCK}) for record in read_metrics(path)
    ]


def _lines(path: Path) -> list[bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _explain(error, path) from error
    return data.split(b"\n")[:-1]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise RunError(f"not a JSON record ({error.msg})", where=f"{path}:{number}") from error
    if not isinstance(record, dict):
        raise RunError("not a JSON object", where=f"{path}:{number}")
    return record


def _explain(error: OSError, path: Path) -> RunError:
    return RunError(f"cannot be read or written ({error.strerror or error})", where=str(path))
