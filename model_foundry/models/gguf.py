"""Turn a GGUF file into a Hugging Face folder, through transformers, and mend what that loses.

The work is done in a child process (`python -m model_foundry.models.gguf SOURCE FOLDER [--tokenizer]`): transformers'
memory and global state stay out of the caller. What a plain conversion loses or hides, and this one does not:
the top-level `rope_theta`; rope scaling; the vocabulary's own way of splitting digits; readable file modes; a tokenizer
class that older readers know; the exact values (the stored dtype is the smallest that holds every one of them).
It does not know where files come from.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_foundry.errors import FoundryError, ModelError
from model_foundry.models.folder import (
    TOKENIZER_FILES,
    portable_config,
    portable_tokenizer_config,
    read_config,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    import torch

SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Values of `tokenizer.ggml.pre` under which every digit is a piece of its own, before GPT-2's splitting.

transformers 5.23 leaves that step out, and then "\\n\\n1." becomes other tokens than the model was trained on.
"""
GPT2_SPLIT = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "default")
TIMEOUT_S = 3600.0


def convert_gguf(source: Path, folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Fill an existing, empty folder from a GGUF file; without `weights`, with the tokenizer alone.

    Returns:
        What is worth keeping about the conversion: architecture, stored types, dtype, pre-tokenizer, notes.

    Raises:
        ModelError: not a GGUF file, or one that transformers or we cannot turn into the same model.
    """
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("it is not a GGUF file", where=str(source))
    quiet = {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "model_foundry.models.gguf", str(source.resolve()), str(folder.resolve())]
    command += [] if weights else ["--tokenizer"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            child = subprocess.run(
                command, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise ModelError(f"converting took longer than {TIMEOUT_S:.0f} s", where=str(source)) from None
        log.seek(0)
        tail = log.read()[-2000:].strip()
    lines = child.stdout.decode("utf-8", "replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    if child.returncode == 0 and "made" in answer:
        return answer["made"]
    last = tail.splitlines()[-1] if tail else f"exit status {child.returncode}"
    what = answer.get("error", f"converting it failed ({last})")
    raise ModelError(what, where=str(source), hint=answer.get("hint") or "It may be damaged: fetch it again.")


def _convert_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    facts = _read_facts(source)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name, local_files_only=True)
    tokenizer.save_pretrained(folder)
    notes = _mend_tokenizer(folder, facts["pre_tokenizer"], None)
    return {"architecture": facts["architecture"], "pre_tokenizer": facts["pre_tokenizer"], "notes": notes}


def _convert(source: Path, folder: Path) -> dict[str, Any]:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    facts = _read_facts(source)
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    dtype = smallest_exact_dtype(model.state_dict())
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = read_config(folder)
    notes = list(facts["notes"])
    config.pop("_model_name_or_path", None)
    for key, number in config.items():
        if isinstance(number, float):  # a GGUF keeps float32: 1e-05 comes back as 9.999999747378752e-06
            config[key] = float(str(np.float32(number)))
    if facts["rope_scaling"] is not None:
        config["rope_parameters"] = {**config["rope_parameters"], **facts["rope_scaling"]}
        notes.append(f"rope scaling {facts['rope_scaling']['rope_type']} restored from the file")
    write_json(folder / "config.json", portable_config(config))
    notes += _mend_tokenizer(folder, facts["pre_tokenizer"], config.get("max_position_embeddings"))
    for path in folder.iterdir():
        path.chmod(0o644)
    return {
        "architecture": facts["architecture"],
        "stored_types": facts["stored_types"],
        "dtype": str(dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "pre_tokenizer": facts["pre_tokenizer"],
        "notes": notes,
    }


def smallest_exact_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """The smallest of bfloat16, float16 and float32 that holds every value of these float32 tensors unchanged."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors.values()):
            return dtype
    return torch.float32


def _read_facts(source: Path) -> dict[str, Any]:
    """What transformers does not carry over, read with the gguf package."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ModelError(f"it is damaged or of an unknown version ({error})", where=str(source)) from error

    def value(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    architecture = value("general.architecture")
    freqs = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    scaling = _stated_scaling({key: value(f"{architecture}.rope.scaling.{key}") for key in _SCALING_KEYS}, source)
    if freqs is not None:
        theta = value(f"{architecture}.rope.freq_base") or 10_000.0
        scaling = llama3_scaling([float(item) for item in freqs], theta)
        if scaling is None:
            what = "its rope_freqs table is not one that Llama 3's scaling gives, so the folder would be another model"
            raise ModelError(what, where=str(source))
    return {
        "architecture": architecture,
        "stored_types": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "pre_tokenizer": value("tokenizer.ggml.pre"),
        "rope_scaling": scaling,
        "notes": [],
    }


_SCALING_KEYS = ("type", "factor", "original_context_length")


def _stated_scaling(stated: dict[str, Any], source: Path) -> dict[str, Any] | None:
    kind = stated["type"]
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn") or stated["factor"] is None:
        raise ModelError(f"its rope scaling is {kind!r}, which cannot be carried over", where=str(source))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(stated["factor"])}
    if kind == "yarn" and stated["original_context_length"] is not None:
        scaling["original_max_position_embeddings"] = int(stated["original_context_length"])
    return scaling


def llama3_scaling(divisors: list[float], theta: float) -> dict[str, Any] | None:
    """The Llama 3 parameters whose table of frequency divisors this is, or None.

    A GGUF keeps only the table. `factor` is its largest entry; the other three have the same values in every Llama
    3.1 to 3.3 checkpoint, and the table they give is compared with the one in the file.
    """
    factor, low, high, original = max(divisors), 1.0, 4.0, 8192
    for index, divisor in enumerate(divisors):
        wavelength = 2 * math.pi * theta ** (index / len(divisors))
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        if abs(divisor - 1 / ((1 - smooth) / factor + smooth)) > 1e-3 * divisor:
            return None
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def _mend_tokenizer(folder: Path, pre: str | None, max_length: int | None) -> list[str]:
    """Restore digit splitting, name a class both transformers 4 and 5 know, and inline the chat template."""
    notes: list[str] = []
    tokenizer = read_json(folder / "tokenizer.json")
    current = tokenizer.get("pre_tokenizer") or {}
    plain_byte_level = current.get("type") == "ByteLevel" and current.get("use_regex", True)
    if plain_byte_level and pre in SPLIT_DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, current]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        notes.append(f"digit splitting of pre-tokenizer {pre} restored")
    elif plain_byte_level and pre is not None and pre not in GPT2_SPLIT:
        notes.append(f"pre-tokenizer {pre} is not known here; text was split as GPT-2 does, so token ids may differ")
    config = portable_tokenizer_config(read_json(folder / "tokenizer_config.json"))
    template = folder / "chat_template.jinja"
    if template.exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if max_length is not None:
        config["model_max_length"] = max_length
    write_json(folder / "tokenizer_config.json", config)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ModelError("no tokenizer came out of it", where=str(folder))
    return notes


def main(arguments: list[str]) -> int:
    """Child side: prints one JSON line, `{"made": …}` or `{"error": …, "hint": …}`."""
    source, folder = Path(arguments[0]), Path(arguments[1])
    try:
        convert = _convert_tokenizer if "--tokenizer" in arguments[2:] else _convert
        answer = {"made": convert(source, folder)}
    except FoundryError as error:
        answer = {"error": error.what, "hint": error.hint}
    except ImportError as error:
        hint = "Install what reading GGUF needs with: pip install 'model-foundry[train]'"
        answer = {"error": f"a package is missing ({error})", "hint": hint}
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        answer = {"error": f"it cannot be converted ({text})"}
    print(json.dumps(answer))
    return 0 if "made" in answer else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
