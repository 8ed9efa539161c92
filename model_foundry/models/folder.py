"""Hugging Face model folders: config.json, safetensors weights (one file or shards with an index), tokenizer files.

It reads tensors one by one and writes folders whole or not at all. It never opens a pickle.
It does not know architectures. torch is imported only where tensors are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_foundry.checkpoint.atomic import atomic_directory
from model_foundry.checkpoint.tensors import TensorEntry, read_entries, write_tensors
from model_foundry.errors import CheckpointCorruptError, ModelError
from model_foundry.models.hashes import file_sha256

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
_FETCH_AGAIN = "Fetch or copy it again."
_PICKLE_HINT = (
    "Convert it once where you trust it, with "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER) of transformers."
)


_TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""torch's names of safetensors' types."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=str(path.parent)) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"it is not readable JSON ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("it is not a JSON object", where=str(path))
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's parsed `config.json`."""
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, all present.

    Raises:
        ModelError: no safetensors weights, a shard is missing, or there are only pickled weights.
    """
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            what = f"the weights are pickled ({pickles[0]}), and loading a pickle can run any code"
            raise ModelError(what, where=str(folder), hint=_PICKLE_HINT)
        raise ModelError(f"it holds no weights ({SINGLE} or {INDEX})", where=str(folder))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"the weight file {name} is missing", where=str(folder), hint=_FETCH_AGAIN)
    return tuple(folder / name for name in names)


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("it has no weight_map", where=str(folder / INDEX))
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"it names {name!r}, which is not a safetensors file beside it", where=str(folder / INDEX))
    return weight_map


def stored_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor's dtype (safetensors' name, such as `BF16`), shape and place, from the headers alone.

    Raises:
        ModelError: a file is missing, truncated or not safetensors, or the index does not match the shards.
    """
    found: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        try:
            entries = read_entries(path)
        except CheckpointCorruptError as error:
            raise ModelError(f"it {error.what}", where=str(path), hint=_FETCH_AGAIN) from error
        end = max((entry.end for entry in entries.values()), default=0)
        if (size := path.stat().st_size) < end:
            what = f"it is truncated: {size} bytes instead of {end}"
            raise ModelError(what, where=str(path), hint=_FETCH_AGAIN)
        found |= entries
    if (folder / INDEX).exists() and (lost := set(_weight_map(folder)) ^ set(found)):
        what = f"index and shards disagree about {len(lost)} tensors, {min(lost)} first"
        raise ModelError(what, where=str(folder), hint=_FETCH_AGAIN)
    return found


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name, read one at a time, so that no more than one is in memory beside what the caller keeps.

    Mapping the files instead would count them, whole, to the memory of the process.

    Raises:
        ModelError: as `stored_tensors`.
    """
    stored_tensors(folder)
    for path in weight_files(folder):
        with path.open("rb") as file:
            for name, entry in sorted(read_entries(path).items(), key=lambda item: item[1].start):
                file.seek(entry.start)
                data = bytearray(entry.end - entry.start)
                if file.readinto(data) != len(data):
                    raise ModelError(f"it ends within {name}", where=str(path), hint=_FETCH_AGAIN)
                yield name, _tensor(data, entry, path)


def _tensor(data: bytearray, entry: TensorEntry, path: Path) -> torch.Tensor:
    if entry.dtype not in _TORCH_DTYPES:
        raise ModelError(f"it holds tensors of type {entry.dtype}, which are not loaded here", where=str(path))
    import torch

    dtype = getattr(torch, _TORCH_DTYPES[entry.dtype])
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out what readers of other ages look for: rope at the top and nested, dtype under both names."""
    out = dict(config)
    rope = out.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        out.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default" and not out.get("rope_scaling"):
            out["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    dtype = out.get("dtype", out.get("torch_dtype"))
    return out if dtype is None else out | {"dtype": dtype, "torch_dtype": dtype}


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`TokenizersBackend` is a name only transformers 5 knows; the old one means the same to both."""
    out = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    return out


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_model_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer_from: Path,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model folder whole or not at all; it must not exist yet, or be empty.

    Args:
        config: the content of `config.json`; written through `portable_config`.
        tensors: name and tensor, consumed once, so they may be made on the way; tied copies left out.
        tokenizer_from: a model folder whose tokenizer and generation files are copied.

    Raises:
        ModelError: the folder holds something, or no tensor was given.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ModelError("it is not empty", where=str(folder), hint="Choose another folder, or remove this one.")
    with atomic_directory(folder) as target:
        fill_model_folder(target, config, tensors, tokenizer_from=tokenizer_from, max_shard_bytes=max_shard_bytes)


def fill_model_folder(
    target: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer_from: Path,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """As `write_model_folder`, into an empty folder whose atomicity is the caller's: a checkpoint being saved."""
    total_bytes, shards = _write_shards(target, tensors, max_shard_bytes)
    if not shards:
        raise ModelError("there are no tensors to write", where=str(target))
    if len(shards) > 1:
        _number_shards(target, shards, total_bytes)
    write_json(target / "config.json", portable_config(config))
    copy_tokenizer(tokenizer_from, target)
    if (tokenizer_from / "generation_config.json").exists():
        shutil.copyfile(tokenizer_from / "generation_config.json", target / "generation_config.json")
    for path in target.iterdir():
        path.chmod(0o644)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy every tokenizer file that is there, mended for old and new readers."""
    if not (source / "tokenizer.json").exists():
        raise ModelError("tokenizer.json is missing", where=str(source))
    for name in TOKENIZER_FILES:
        if name == "tokenizer_config.json" and (source / name).exists():
            write_json(target / name, portable_tokenizer_config(read_json(source / name)))
        elif (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _write_shards(
    target: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> tuple[int, list[list[str]]]:
    """Write numbered files as tensors come in; returns bytes in all and the tensor names of each file."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush(name: str) -> None:
        nonlocal pending_bytes
        write_tensors(target / name, pending, metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + num_bytes > max_shard_bytes:
            flush(f"shard-{len(shards)}")
        pending[name] = tensor
        pending_bytes += num_bytes
        total_bytes += num_bytes
    if pending:
        flush(f"shard-{len(shards)}" if shards else SINGLE)
    return total_bytes, shards


def _number_shards(target: Path, shards: list[list[str]], total_bytes: int) -> None:
    """How many there are is only known at the end, and their names say it."""
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (target / f"shard-{number}").rename(target / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    write_json(target / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and the weight files; moving or copying the folder does not change it."""
    digest = sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        if not path.is_file():
            raise ModelError(f"{path.name} is missing", where=str(folder))
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
