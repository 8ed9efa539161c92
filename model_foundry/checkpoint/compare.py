"""Whether two checkpoints hold the same bits, and where they first do not.

Reads files, not models: works without torch, on any dtype, NaN included. Wall-clock facts live in the manifest, which
is not compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model_foundry.checkpoint.tensors import TensorEntry, read_entries, read_metadata
from model_foundry.errors import CheckpointError

COMPARED_FOLDERS = ("adapter", "model", "state")
_NUMPY_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2",
}  # fmt: skip


def compare_checkpoints(a: Path, b: Path) -> list[str]:
    """Compare every file below adapter, model and state bit by bit.

    Returns:
        One sentence for each file that differs, naming the first tensor and element; [] when all bits are equal.

    Raises:
        CheckpointError: one of the two holds none of these folders.
    """
    left, right = _files(a), _files(b)
    differences = []
    for name in sorted(left.keys() | right.keys()):
        if name not in right:
            differences.append(f"{name}: only in {a}")
        elif name not in left:
            differences.append(f"{name}: only in {b}")
        else:
            difference = _compare_files(left[name], right[name])
            if difference is not None:
                differences.append(f"{name}: {difference}")
    return differences


def _files(checkpoint: Path) -> dict[str, Path]:
    files = {
        path.relative_to(checkpoint).as_posix(): path
        for folder in COMPARED_FOLDERS
        for path in (checkpoint / folder).rglob("*")
        if path.is_file()
    }
    if not files:
        raise CheckpointError("holds no adapter, model or state to compare", where=str(checkpoint))
    return files


def _compare_files(a: Path, b: Path) -> str | None:
    left, right = _bytes_of(a), _bytes_of(b)
    if left.shape == right.shape and _first_difference(left, right) is None:
        return None
    if a.suffix == ".safetensors":
        return _compare_tensors(a, b, left, right)
    shorter = min(len(left), len(right))
    position = _first_difference(left[:shorter], right[:shorter])
    if position is None:
        return f"{len(left)} and {len(right)} bytes"
    return f"byte {position} is 0x{left[position]:02x} and 0x{right[position]:02x}"


def _compare_tensors(a: Path, b: Path, left: np.ndarray, right: np.ndarray) -> str:
    ours, theirs = read_entries(a), read_entries(b)
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"tensor {name} is only in {a if name in ours else b}"
    # In the order of the layers as people count them would need the model; the order of names is stable and enough.
    for name in sorted(ours):
        one, other = ours[name], theirs[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"tensor {name} is {one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
        difference = _first_difference(left[one.start : one.end], right[other.start : other.end])
        if difference is not None:
            return _describe_element(name, one, other, difference, left, right)
    if read_metadata(a) != read_metadata(b):
        return f"the header's metadata is {read_metadata(a)} and {read_metadata(b)}"
    return "same tensors, other bytes in the header"


def _describe_element(
    name: str, one: TensorEntry, other: TensorEntry, position: int, left: np.ndarray, right: np.ndarray
) -> str:
    num_elements = max(1, int(np.prod(one.shape, dtype=np.int64)))
    width = (one.end - one.start) // num_elements
    index = position // width
    at = [int(part) for part in np.unravel_index(index, one.shape)] if one.shape else []
    num_different = int(
        np.any(
            left[one.start : one.end].reshape(-1, width) != right[other.start : other.end].reshape(-1, width), axis=1
        ).sum()
    )
    values = [
        _value(data[entry.start + index * width : entry.start + (index + 1) * width], one.dtype)
        for data, entry in ((left, one), (right, other))
    ]
    return f"tensor {name} element {at} is {values[0]} and {values[1]} ({num_different} of {num_elements} differ)"


def _value(data: np.ndarray, dtype: str) -> str:
    if dtype not in _NUMPY_DTYPES:
        return f"0x{data.tobytes()[::-1].hex()}"
    value = np.frombuffer(data.tobytes(), dtype=_NUMPY_DTYPES[dtype])
    if dtype == "BF16":
        value = (value.astype("<u4") << 16).view("<f4")
    return repr(value[0].item())


def _first_difference(left: np.ndarray, right: np.ndarray, block_bytes: int = 1 << 22) -> int | None:
    for start in range(0, len(left), block_bytes):
        unequal = left[start : start + block_bytes] != right[start : start + block_bytes]
        if unequal.any():
            return start + int(unequal.argmax())
    return None


def _bytes_of(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
