"""Named arrays in the safetensors format, written once and hashed on the way.

Takes numpy arrays and torch tensors; imports torch never (a tensor at hand means that its caller has) and safetensors
only to read. Writes what safetensors writes, byte for byte, except that it needs no second copy of the weights in
memory and no second reading to hash them. Knows nothing of models or optimizers.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model_foundry.checkpoint.manifest import HashedFile
from model_foundry.errors import CheckpointCorruptError, CheckpointError

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000
# In the order in which safetensors lays tensors out: the widest types first, so that each lies at its own alignment.
_DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file: safetensors dtype name, shape, and bytes [start, end) from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write_tensors(path: Path, tensors: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a new safetensors file; inside `CheckpointStore.save` it is not read again for the manifest.

    Args:
        tensors: numpy arrays or torch tensors of any device, of any shape; not complex or object dtypes.
        metadata: strings for the header's `__metadata__`.

    Raises:
        CheckpointError: a dtype that the format does not have.
        OSError: the file exists, or the disk is full.
    """
    order = sorted(tensors, key=lambda name: (list(_DTYPES).index(_dtype_name(name, tensors[name])), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        end = offset + _num_bytes(tensors[name])
        header[name] = {
            "dtype": _DTYPES[_dtype_name(name, tensors[name])],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path, planned_bytes=_LENGTH.size + len(text) + offset) as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for name in order:
            file.write(_bytes(tensors[name]))


def read_tensors(path: Path, *, framework: Literal["torch", "numpy"] = "torch") -> dict[str, Any]:
    """Read a safetensors file of a verified checkpoint into tensors on the CPU (numpy has no bfloat16).

    Raises:
        CheckpointCorruptError: it is missing or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointCorruptError(f"cannot be read ({error})", where=str(path)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file."""
    return _read_header(path)[0].get("__metadata__", {})


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file without their values.

    Raises:
        CheckpointCorruptError: it is missing or not a safetensors file.
    """
    header, data_start = _read_header(path)
    try:
        return {
            name: TensorEntry(
                entry["dtype"],
                tuple(entry["shape"]),
                data_start + entry["data_offsets"][0],
                data_start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointCorruptError("has no valid safetensors header", where=str(path)) from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with open(path, "rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > min(_MAX_HEADER_BYTES, os.fstat(file.fileno()).st_size):
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointCorruptError(f"has no valid safetensors header ({error})", where=str(path)) from error
    if not isinstance(header, dict):
        raise CheckpointCorruptError("has no valid safetensors header", where=str(path))
    return header, _LENGTH.size + length


def _dtype_name(name: str, tensor: Any) -> str:
    # numpy's name says nothing of the byte order, which writing settles; torch's dtypes have none.
    dtype = (
        tensor.dtype.name if isinstance(tensor, (np.ndarray, np.generic)) else str(tensor.dtype).removeprefix("torch.")
    )
    if dtype not in _DTYPES:
        raise CheckpointError(f"tensor {name!r} has dtype {dtype}, which safetensors cannot hold")
    return dtype


def _num_bytes(tensor: Any) -> int:
    return int(tensor.nbytes)


def _bytes(tensor: Any) -> memoryview:
    if _num_bytes(tensor) == 0:
        return memoryview(b"")
    if isinstance(tensor, (np.ndarray, np.generic)):
        flat = np.ascontiguousarray(np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"))).reshape(-1)
        return flat.view(np.uint8).data
    torch = sys.modules["torch"]
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
