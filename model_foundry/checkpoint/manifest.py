"""manifest.json: the size and SHA-256 of every file of a folder, written last, so that its presence means complete.

Knows nothing of what the files mean. Files written through `HashedFile` (or `write_file`) are hashed while they are
written and not read again; any other file is read once. Verifying reads several at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from model_foundry.checkpoint.direct import DirectFile
from model_foundry.errors import CheckpointCorruptError, CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
_BLOCK_BYTES = 1 << 20
_READ_BYTES = 8 << 20
"""Two files of 500 MB together, not in the cache: 0.6 s in two threads; 1.1 to 1.5 s in one, in blocks of 1 MB."""
_NUM_READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class FileRecord:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder must hold. `fields` are the writer's own JSON values; `digest` identifies all of it."""

    fields: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    digest: str

    @property
    def total_bytes(self) -> int:
        return sum(record.size_bytes for record in self.files.values())


@dataclass(slots=True)
class Recording:
    """Hashes of files as they were closed, and how large each announced that it would be."""

    planned_bytes: dict[str, int] = field(default_factory=dict)
    records: dict[str, tuple[tuple[int, ...], FileRecord]] = field(default_factory=dict)


_recording: ContextVar[Recording | None] = ContextVar("checkpoint_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Within this block files written through `HashedFile` need not be read again by `write_manifest`."""
    current = Recording()
    token = _recording.set(current)
    try:
        yield current
    finally:
        _recording.reset(token)


class HashedFile:
    """A new binary file that hashes what is written to it. `planned_bytes` lets a full disk name the need."""

    def __init__(self, path: Path, *, planned_bytes: int = 0) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        current = _recording.get()
        if current is not None:
            current.planned_bytes[os.fspath(path)] = planned_bytes
        self._file = DirectFile(path, planned_bytes=planned_bytes)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            self._hash.update(block)
            self._file.write(block)
        self._size_bytes += len(view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.finish()
            identity = _identity(os.fstat(self._file.fileno()))
        finally:
            self._file.close()
        current = _recording.get()
        if kind is None and current is not None:
            record = FileRecord(self._size_bytes, self._hash.hexdigest())
            current.records[os.fspath(self._path)] = (identity, record)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a new file inside a checkpoint that is being saved; hashed on the way."""
    content = data.encode() if isinstance(data, str) else data
    with HashedFile(path, planned_bytes=len(content)) as file:
        file.write(content)


def link_file(source: Path, target: Path, *, record: FileRecord) -> None:
    """Give a file another name, inside a checkpoint that is being saved; it is not read for the manifest.

    Args:
        record: what the file was just found to be.

    Raises:
        OSError: the file system has no such names, or the source is gone.
    """
    os.link(source, target)
    current = _recording.get()
    if current is not None:
        current.records[os.fspath(target)] = (_identity(target.lstat()), record)


def write_manifest(folder: Path, *, fields: Mapping[str, Any] | None = None) -> Manifest:
    """Write `folder`/manifest.json over every file below it. Syncing is the caller's (`atomic_directory` does it).

    Raises:
        CheckpointError: something below `folder` is neither a file nor a folder (a link would not travel with it).
    """
    current = _recording.get()
    known = current.records if current is not None else {}
    files: dict[str, FileRecord] = {}
    for path in _files_below(folder):
        status = path.lstat()
        identity, record = known.get(os.fspath(path), (None, None))
        if record is None or identity != _identity(status):
            record = hash_file(path)
        files[path.relative_to(folder).as_posix()] = record
    body = _body(dict(fields or {}), files)
    digest = hashlib.sha256(_encode(body)).hexdigest()
    (folder / MANIFEST_NAME).write_bytes(_encode({**body, "sha256": digest}))
    return Manifest(fields=dict(fields or {}), files=files, digest=digest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json itself; the files it lists are not touched.

    Raises:
        CheckpointCorruptError: it is missing (the save never ended), not readable, or not as it was written.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointCorruptError(f"no {MANIFEST_NAME}, so the save never finished", where=str(folder)) from None
    except OSError as error:
        raise CheckpointCorruptError(f"cannot be read ({error.strerror})", where=str(path)) from error
    try:
        content = json.loads(data)
        digest = content.pop("sha256")
        if content["format"] != FORMAT:
            raise CheckpointCorruptError(
                f"format {content['format']!r} is not known here", where=str(path), hint="A newer version wrote it."
            )
        files = {name: FileRecord(entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
        fields = content["fields"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError("is damaged: not the JSON that was written", where=str(path)) from error
    # Byte for byte, so that no flipped byte goes unseen, not even one that leaves valid JSON behind.
    found = hashlib.sha256(_encode(content)).hexdigest()
    if found != digest or _encode({**content, "sha256": digest}) != data:
        raise CheckpointCorruptError(f"is damaged: expected sha256 {digest}, found {found}", where=str(path))
    return Manifest(fields=fields, files=files, digest=digest)


def verify_manifest(folder: Path) -> Manifest:
    """Read every file of a folder and hold it against the manifest.

    Raises:
        CheckpointCorruptError: naming the first file that differs, with the expected and found size or SHA-256.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        reads = {name: _begin_hash(readers, folder / name) for name in manifest.files}
        try:
            for name, expected in manifest.files.items():
                _check_hash(folder / name, reads[name], expected)
        finally:
            for read in reads.values():
                read.cancel()
    return manifest


def _begin_hash(readers: ThreadPoolExecutor, path: Path) -> Future[FileRecord]:
    try:
        return readers.submit(hash_file, path)
    except RuntimeError:  # the interpreter is ending, and starts no thread any more; what it still does is done here
        done: Future[FileRecord] = Future()
        try:
            done.set_result(hash_file(path))
        except OSError as error:
            done.set_exception(error)
        return done


def _check_hash(path: Path, read: Future[FileRecord], expected: FileRecord) -> None:
    try:
        found = read.result()
    except OSError as error:  # a bad sector, or no permission
        raise CheckpointCorruptError(f"cannot be read ({error.strerror})", where=str(path)) from error
    if found != expected:
        what = f"is damaged: expected sha256 {expected.sha256}, found {found.sha256}"
        raise CheckpointCorruptError(what, where=str(path))


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """The cheap part of verification: names and sizes, no file is read.

    Raises:
        CheckpointCorruptError: a file is missing, has another size, or is not in the manifest.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointCorruptError(f"names a file outside the folder: {name!r}", where=str(folder))
        if not path.is_file():
            raise CheckpointCorruptError(f"is missing, expected {expected.size_bytes} bytes", where=str(path))
        found_bytes = path.stat().st_size
        if found_bytes != expected.size_bytes:
            raise CheckpointCorruptError(
                f"is damaged: expected {expected.size_bytes} bytes, found {found_bytes}", where=str(path)
            )
    for path in _files_below(folder, strict=False):
        # What a file manager leaves behind (.DS_Store) is nobody's weights; anything else could be loaded by mistake.
        if path.relative_to(folder).as_posix() not in manifest.files and not path.name.startswith("."):
            raise CheckpointCorruptError("is not in the manifest", where=str(path), hint="Move it elsewhere.")


def hash_file(path: Path) -> FileRecord:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    size_bytes = 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_READ_BYTES, os.fstat(file.fileno()).st_size + 1)))
        while num_read := file.readinto(buffer):
            digest.update(buffer[:num_read])
            size_bytes += num_read
    return FileRecord(size_bytes, digest.hexdigest())


def _files_below(folder: Path, *, strict: bool = True) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        if strict and (path.is_symlink() or not (path.is_file() or path.is_dir())):
            raise CheckpointError("only files and folders can be saved in a checkpoint", where=str(path))
        if not path.is_dir() and path != folder / MANIFEST_NAME:
            found.append(path)
    return found


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _body(fields: Mapping[str, Any], files: Mapping[str, FileRecord]) -> dict[str, Any]:
    entries = {name: {"size": record.size_bytes, "sha256": record.sha256} for name, record in files.items()}
    return {"format": FORMAT, "fields": dict(fields), "files": entries}


def _encode(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
