"""A small model with an adapter and a renderer, ready to be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_foundry.export.certificate import Origin
from model_foundry.export.measure import Subject
from model_foundry.models.folder import copy_tokenizer
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import LoraConfig, Message
from tests.conftest import CHATML, byte_level_tokenizer, save_folder
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_models import write_tiny_model

PROMPTS = tuple((Message("user", text),) for text in ("What is 3 + 4?", "naïve <|im_end|> café", "Name the capital."))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
KINDS: dict[str, dict] = {
    "llama": {}, "llama-tied": {"head_dim": 16, "num_attention_heads": 4}, "llama-rope-yarn": {},
    "llama-rope-llama3": {"rope_parameters": LLAMA3}, "mistral-full": {"head_dim": 16}, "qwen2": {}, "qwen3": {},
    "qwen3-moe": {"moe_intermediate_size": 32},
}  # fmt: skip
"""What can be written as a GGUF, and what of it differs from `tests.tiny_models`."""


def make_subject(
    folder: Path,
    kind: str = "llama",
    *,
    adapter_scale: float = 0.2,
    seed: int = 0,
    lora: LoraConfig | None = None,
    tokenizer_size: int = 500,
    merges: tuple[tuple[str, str], ...] = (),
    **changes: Any,
) -> Subject:
    """Base, adapter and tokenizer in `folder`; every width divides into blocks of 32.

    Args:
        tokenizer_size: the bytes and three control tokens are 259; merges: further ones, each a further token.
        changes: keys of `config.json` to set otherwise.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = save_folder(
        folder / "tokenizer", byte_level_tokenizer(specials, vocab_size=tokenizer_size), eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip
    written = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    for left, right in merges:
        written["model"]["vocab"][left + right] = len(written["model"]["vocab"])
        written["model"]["merges"].append([left, right])
    (tokenizer / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    size = Tokenizer.load(tokenizer).vocab_size
    base = write_tiny_model(
        folder / "base",
        kind,
        seed=seed,
        **({"vocab_size": size, "hidden_size": 64, "intermediate_size": 96} | KINDS[kind] | changes),
    )
    copy_tokenizer(tokenizer, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    lora = lora or LoraConfig(r=4, lora_alpha=4)
    adapter = write_tiny_adapter(folder / "final" / "adapter", base, lora, scale=adapter_scale, manifest=True)
    renderer = Renderer(Tokenizer.load(base))
    origin = Origin("tiny run", "tiny", "0" * 64, "1" * 64, renderer.name, "the test")
    return Subject(base, adapter, renderer, PROMPTS, origin)
