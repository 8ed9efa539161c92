"""Functions over plain memory, compiled by Numba to code that is called by address and kept in the user's cache.

A loop gets pointers, numbers and the rows it is to do, [first, last). It is compiled once a machine for the types of
its pointers. What is kept is machine code and two names, no objects: a file is named by the hash of all that decides
what is in it, written in one go, and taken only where it is whole, the user's own, and not writable by others.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

from model_foundry.checkpoint.atomic import atomic_file
from model_foundry.models.hashes import cache_home

REORDERED = frozenset({"reassoc", "contract", "nsz"})
"""What sums may be: taken apart into lanes. Not that numbers are finite: what is no number has to come out as such."""
IN_ORDER = frozenset({"contract"})
FLOAT32, BFLOAT16 = types.float32, types.uint16
_KINDS: dict[str, tuple[Any, Any]] = {
    "int": (types.int64, ctypes.c_int64),
    "float": (types.float32, ctypes.c_float),
    "float32*": (types.CPointer(types.float32), ctypes.c_void_p),
    "int64*": (types.CPointer(types.int64), ctypes.c_void_p),
    "bool*": (types.CPointer(types.uint8), ctypes.c_void_p),
}
_DIGEST_BYTES = 32


@functools.cache
def _hash_of(file: str) -> str:
    """As it is when it is imported: what is changed later is not what runs."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


_ALL_LOOPS = tuple(
    _hash_of(str(Path(__file__).with_name(name)))
    for name in ("compiled_loop.py", "primitives.py", "lanes.py", "tiles.py", "dots.py", "answer_plan.py")
)


def compiles_for(*features: str) -> bool:
    """Whether loops are compiled for a processor that has these, which may be less than this one has."""
    context: Any = cpu_target.target_context
    _, _, known = context.codegen().magic_tuple()
    return {f"+{feature}" for feature in features} <= set(known.split(","))


def _sources(function: Callable[..., None]) -> list[str]:
    """Hashes of the files of a loop and of the parts that it can be made of; names of those that were handed to it."""
    handed = [cell.cell_contents.py_func for cell in function.__closure__ or () if _is_part(cell.cell_contents)]
    left, files = [function, *handed], set()
    while left:
        each = left.pop()
        if (file := inspect.getfile(each)) not in files:
            files.add(file)
            left += [part.py_func for part in each.__globals__.values() if _is_part(part)]
    return [*sorted(_hash_of(file) for file in files), *(each.__qualname__ for each in handed)]


def _is_part(value: Any) -> bool:
    return hasattr(value, "py_func")


class CompiledLoop:
    """A function, and its machine code for each choice of types.

    Args:
        kinds: of each argument but the last two, `first` and `last`: a name in `_KINDS`, or `x*` and `w*`, pointers to
            numbers whose type is chosen when the loop is called.
    """

    def __init__(self, function: Callable[..., None], kinds: tuple[str, ...], flags: frozenset[str]) -> None:
        self.function, self.kinds, self.flags = function, (*kinds, "int", "int"), flags
        self._sources = _sources(function)
        self._ready: dict[tuple[Any, Any], Callable[..., None]] = {}

    def of(self, x: Any, w: Any = None) -> Callable[..., None]:
        """Numbers of `x*` and of `w*` are FLOAT32, or BFLOAT16 as its bits. Addresses are passed as int."""
        ready = self._ready.get((x, w))
        if ready is None:
            with global_compiler_lock:
                # Without a `w` the code is that of two alike, and is not loaded twice.
                if (same := (x, w or x)) not in self._ready:
                    self._ready[same] = self._load(*same)
                ready = self._ready[x, w] = self._ready[same]
        return ready

    def _load(self, x: Any, w: Any) -> Callable[..., None]:
        chosen = {"x*": (types.CPointer(x), ctypes.c_void_p), "w*": (types.CPointer(w), ctypes.c_void_p)}
        kinds = [(_KINDS | chosen)[kind] for kind in self.kinds]
        signature = types.void(*(kind for kind, _ in kinds))
        path = self.kept_at(signature)
        found = None if path is None else _read(path)
        library, name = found or self._compile(signature, path)
        address = library.get_pointer_to_function(name)
        function = ctypes.CFUNCTYPE(None, *(kind for _, kind in kinds))(address)
        function.library = library  # pyright: ignore[reportAttributeAccessIssue] - its code lives as long
        return function

    def kept_at(self, signature: Any) -> Path | None:
        """The file of its machine code; None where this user has no home."""
        context: Any = cpu_target.target_context
        machine = context.codegen().magic_tuple()
        made_of = (
            _ALL_LOOPS, self._sources, self.function.__qualname__, str(signature), sorted(self.flags),
            sys.version, numba.__version__, llvmlite.__version__, machine,
        )  # fmt: skip
        try:
            return cache_home() / "loops" / hashlib.sha256(repr(made_of).encode()).hexdigest()
        except RuntimeError:
            return None

    def _compile(self, signature: Any, path: Path | None) -> tuple[Any, str]:
        compiled: Any = numba.cfunc(signature, fastmath=set(self.flags), error_model="numpy")(self.function)
        library, wrapper = compiled._library, compiled.native_name
        name, _, (code, bitcode) = library.serialize_using_object_code()
        if path is not None:
            # Where it cannot be written, the next process compiles again.
            with contextlib.suppress(OSError):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _write(path, {"library": name, "function": wrapper, "code_bytes": len(code)}, code + bitcode)
        return library, wrapper


def loop(
    *kinds: str, flags: frozenset[str] = REORDERED
) -> Callable[[Callable[..., None]], CompiledLoop]:  # fmt: skip
    """Declares a function to be a loop."""
    return lambda function: CompiledLoop(function, kinds, flags)


def part(*, flags: frozenset[str] = REORDERED) -> Callable[[Callable[..., Any]], Any]:
    """Declares a function to be part of loops, which are compiled with it."""
    return lambda function: numba.njit(fastmath=set(flags), error_model="numpy")(function)


def _write(path: Path, header: dict[str, Any], content: bytes) -> None:
    body = json.dumps({"loop": path.name, **header}).encode() + b"\n" + content
    with atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(hashlib.sha256(body).digest() + body)


def _read(path: Path) -> tuple[Any, str] | None:
    """(the code, the name of the function in it); None where there is nothing that may be taken."""
    try:
        with path.open("rb") as file:
            if not (_is_own(os.fstat(file.fileno())) and _is_own(path.parent.stat())):
                return None
            content = file.read()
    except OSError:
        return None
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    header, _, rest = body.partition(b"\n")
    facts = json.loads(header)
    if facts["loop"] != path.name:
        return None
    context: Any = cpu_target.target_context
    rtsys.initialize(context)  # code names Numba's runtime, needed or not
    code, bitcode = rest[: facts["code_bytes"]], rest[facts["code_bytes"] :]
    return context.codegen().unserialize_library((facts["library"], "object", (code, bitcode))), facts["function"]


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
