"""Rows as clients send them, in protobuf or JSON, to the engine's rows.

It knows the protocol's encodings (dense bytes, sparse CSR, lists) and the names of the inputs. Sizes are checked before
anything is allocated for them: what a shape claims must be what the bytes hold.

Shapes: T tokens of a row, K targets of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.errors import DataError
from model_foundry.service.messages import DTYPES
from model_foundry.types import Datum

_NUMPY = {
    DTYPES["float32"]: "<f4", DTYPES["int64"]: "<i8", DTYPES["int32"]: "<i4", DTYPES["bfloat16"]: "<u2",
}  # fmt: skip
_INPUT_TYPES = {"target_tokens": np.int32, "weights": np.float32, "logprobs": np.float32, "advantages": np.float32}
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
"""The protocol's; the engine's others are of rows that it cannot carry."""
MAX_CELLS = 64_000_000
"""Sparse tensors of a few bytes may claim any shape, and one row with many targets widens all; a request lays out no
more than this."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a forward or backward pass was asked for. `data` is in the engine's form; see `columns`."""

    model_id: str
    seq_id: int | None
    data: tuple[Datum, ...]
    columns: tuple[int | None, ...]
    loss_fn: str
    loss_config: Mapping[str, float]
    forward_only: bool


def read_pass(message: Any) -> Pass:
    """From a parsed `ForwardBackwardRequest`.

    Raises:
        DataError: what the rows hold cannot be meant; the row is named.
    """
    config: dict[str, Any] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    room = Room()
    rows = [_row_of_message(number, datum, room) for number, datum in enumerate(message.data)]
    return _pass(message.model_id, message.seq_id, rows, message.loss_fn, config, message.forward_only)


def read_json_pass(body: Mapping[str, Any], *, field: str, forward_only: bool) -> Pass:
    """From a JSON body with its rows under `field` (`forward_backward_input` or `forward_input`).

    Raises:
        DataError: as `read_pass`.
    """
    given = body.get(field)
    if not isinstance(given, dict) or not isinstance(given.get("data"), list):
        raise DataError(f"{field} holds no data")
    if unknown := sorted(given.keys() - {"data", "loss_fn", "loss_fn_config"}):
        raise DataError(f"{field} holds {unknown[0]}, which this service does not know")
    room = Room()
    rows = [_row_of_json(number, datum, room) for number, datum in enumerate(given["data"])]
    config = given.get("loss_fn_config")
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise DataError(f"loss_fn_config is {config!r}; it must be an object", where=field)
    return _pass(str(body["model_id"]), body.get("seq_id"), rows, str(given.get("loss_fn")), config, forward_only)


@dataclass(slots=True)
class Room:
    """Cells that the tensors of a request may still be laid out in."""

    left: int = MAX_CELLS

    def take(self, cells: int, what: str, *, where: str | None = None) -> None:
        """Raises DataError where there are not so many."""
        if cells > self.left:
            raise DataError(f"{what}, more than the {MAX_CELLS:,} cells of a request", where=where)
        self.left -= cells


Row = tuple[np.ndarray, dict[str, np.ndarray]]


def _pass(
    model_id: str, seq_id: int | None, rows: list[Row], loss_fn: str, config: Mapping[str, Any], forward_only: bool
) -> Pass:
    if loss_fn not in LOSSES:
        raise DataError(f"no loss {loss_fn!r}", hint=f"There is: {', '.join(LOSSES)}; and forward_backward_custom.")
    if not rows:
        raise DataError("there are no rows in the data")
    for number, (_, inputs) in enumerate(rows):
        for name, values in inputs.items():
            if name in ("weights", "logprobs", "advantages") and not np.isfinite(values).all():
                raise DataError(f"{name} holds values that are not finite", where=f"row {number}")
    columns = tuple(None if inputs.get("target_tokens", _EMPTY).ndim < 2 else inputs["target_tokens"].shape[1]
                    for _, inputs in rows)  # fmt: skip
    width = max((number for number in columns if number is not None), default=None)
    if width is not None:
        places = sum(max(len(tokens), *map(len, inputs.values())) for tokens, inputs in rows if inputs)
        Room().take(places * width, f"{places:,} tokens with {width:,} targets each")
    data = tuple(Datum(tokens, _widened(inputs, width)) for tokens, inputs in rows)
    return Pass(model_id, seq_id, data, columns, loss_fn, config, forward_only)


_EMPTY = np.zeros(0, dtype=np.int32)


def _widened(inputs: dict[str, np.ndarray], width: int | None) -> dict[str, np.ndarray]:
    """Every input [T, width] where any row of the batch has several targets; what is filled up has weight zero."""
    if width is None:
        return inputs
    out = {}
    for name, values in inputs.items():
        grid = values[:, None] if values.ndim == 1 else values
        out[name] = np.pad(grid, ((0, 0), (0, width - grid.shape[1]))) if grid.shape[1] <= width else grid
    return out


def _row_of_message(number: int, datum: Any, room: Room) -> Row:
    where = f"row {number}"
    parts = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise DataError(f"the model reads text alone, and got a chunk of kind {kind or 'none'}", where=where)
        parts.append(_buffer(chunk.encoded_text.tokens, "<i4", f"{where}, tokens"))
    inputs = {
        name: _tensor_of_message(tensor, f"{where}, {name}", room) for name, tensor in datum.loss_fn_inputs.items()
    }
    return _checked(parts, inputs, where)


def _row_of_json(number: int, datum: Any, room: Room) -> Row:
    where = f"row {number}"
    if not isinstance(datum, dict) or not isinstance(datum.get("loss_fn_inputs"), dict):
        raise DataError("it has no loss_fn_inputs", where=where)
    parts = [np.asarray(chunk, dtype=np.int64) for chunk in json_chunks(datum.get("model_input"), where)]
    inputs = {name: json_tensor(value, f"{where}, {name}", room) for name, value in datum["loss_fn_inputs"].items()}
    return _checked(parts, inputs, where)


def _checked(parts: list[np.ndarray], inputs: dict[str, np.ndarray], where: str) -> Row:
    unknown = sorted(inputs.keys() - _INPUT_TYPES.keys())
    if unknown:
        raise DataError(f"it has the input {unknown[0]!r}, which no loss here reads", where=where)
    tokens = np.concatenate(parts) if parts else _EMPTY
    if not tokens.size:
        raise DataError("it has no tokens", where=where)
    return _int32(tokens, where), {
        name: _int32(values, f"{where}, {name}") if name == "target_tokens" else values.astype(np.float32)
        for name, values in inputs.items()
    }


def _int32(values: np.ndarray, where: str) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"tokens are {values.dtype} instead of integers", where=where)
    if values.size and (values.min() < 0 or values.max() >= 2**31):
        raise DataError("a token is negative or beyond every vocabulary", where=where)
    return np.ascontiguousarray(values, dtype=np.int32)


def json_chunks(model_input: Any, where: str) -> list[list[int]]:
    """The token lists of a `model_input`.

    Raises:
        DataError: it is none, or holds something else than text.
    """
    chunks = model_input.get("chunks") if isinstance(model_input, dict) else None
    if not isinstance(chunks, list):
        raise DataError("it has no chunks of input", where=where)
    out = []
    for chunk in chunks:
        kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else None
        if kind != "encoded_text":
            raise DataError(f"the model reads text alone, and got a chunk of kind {kind}", where=where)
        tokens = chunk.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and abs(token) < 2**31 for token in tokens):
            raise DataError("its tokens are not a list of integers", where=where)
        out.append(tokens)
    return out


def json_tensor(value: Any, where: str, room: Room) -> np.ndarray:
    """`{data, dtype, shape?, sparse_crow_indices?, sparse_col_indices?}`.

    Raises:
        DataError: it is not one.
    """
    if not isinstance(value, dict) or value.get("dtype") not in ("float32", "int64"):
        raise DataError("it is no tensor of float32 or int64", where=where)
    data = _numbers(value.get("data"), value["dtype"], "data", where)
    shape = value.get("shape")
    shape = list(data.shape) if shape is None else shape
    if value.get("sparse_crow_indices") is None:
        return _shaped(data.reshape(-1), shape, where)
    return _dense(data.reshape(-1), *json_indices(value, where), shape, where, room)


def json_indices(value: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    """`sparse_crow_indices` and `sparse_col_indices`, int64, each a row.

    Raises:
        DataError: they are not integers.
    """
    names = ("sparse_crow_indices", "sparse_col_indices")
    crow, col = (_numbers(value.get(name), "int64", name, where).reshape(-1) for name in names)
    return crow, col


def _numbers(values: Any, dtype: str, name: str, where: str) -> np.ndarray:
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"its {name} are not numbers ({error})", where=where) from error
    if found.dtype.kind not in "iufb":
        raise DataError(f"its {name} are not numbers", where=where)
    if dtype == "int64" and found.dtype.kind in "uf" and not _are_whole(found):
        raise DataError(f"its {name} are not integers of 64 bits", where=where)
    with np.errstate(over="ignore"):  # the infinity that comes of it is refused
        return found.astype(dtype, copy=False)


def _are_whole(values: np.ndarray) -> bool:
    return bool(((values == np.trunc(values)) & (np.abs(values) < 2**63)).all())


def _tensor_of_message(tensor: Any, where: str, room: Room) -> np.ndarray:
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise DataError(f"a tensor of type number {tensor.dtype}", where=where)
    shape = list(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        sparse = tensor.sparse_csr
        crow, col = (_buffer(part, "<i8", where) for part in (sparse.crow_indices, sparse.col_indices))
        return _dense(_values(sparse.values, dtype, where), crow, col, shape, where, room)
    values = _values(tensor.dense, dtype, where)
    return _shaped(values, shape or [values.size], where)


def _values(data: bytes, dtype: str, where: str) -> np.ndarray:
    values = _buffer(data, dtype, where)
    # bfloat16 is the upper half of a float32.
    return (values.astype("<u4") << 16).view("<f4") if dtype == "<u2" else values


def _buffer(data: bytes, dtype: str, where: str) -> np.ndarray:
    if len(data) % np.dtype(dtype).itemsize:
        raise DataError(f"{len(data)} bytes are no whole number of {np.dtype(dtype).name}", where=where)
    return np.frombuffer(data, dtype=dtype)


def _shaped(values: np.ndarray, shape: Any, where: str) -> np.ndarray:
    _check_shape(shape, where)
    if math.prod(shape) != values.size:
        raise DataError(f"{values.size} values do not fill the shape {shape}", where=where)
    return values.reshape(shape)


def _check_shape(shape: Any, where: str) -> None:
    if not isinstance(shape, Sequence) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise DataError(f"its shape is {shape!r}", where=where)
    if len(shape) not in (1, 2):
        raise DataError(f"it has {len(shape)} dimensions; one, or two for several targets a token", where=where)


def _dense(values: np.ndarray, crow: np.ndarray, col: np.ndarray, shape: Any, where: str, room: Room) -> np.ndarray:
    """A compressed-sparse-row matrix laid out; what is not listed is zero."""
    _check_shape(shape, where)
    if len(shape) != 2:
        raise DataError(f"a sparse tensor of shape {shape}", where=where)
    rows, columns = shape
    room.take(rows * columns, f"a sparse tensor of shape {shape}", where=where)
    is_whole = (
        crow.size == rows + 1 and col.size == values.size and crow[0] == 0 and crow[-1] == values.size
        and bool((np.diff(crow) >= 0).all()) and (col.size == 0 or (col.min() >= 0 and col.max() < columns))
    )  # fmt: skip
    if not is_whole:
        raise DataError(f"its indices do not describe a matrix of {rows} by {columns}", where=where)
    out = np.zeros((rows, columns), dtype=values.dtype)
    out[np.repeat(np.arange(rows), np.diff(crow)), col] = values
    return out
