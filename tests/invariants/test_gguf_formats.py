"""K-quants through llama.cpp's own quantiser: the types that llama-quantize chooses, and what the files compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from model_foundry.export.gguf import plan_layout, write_gguf
from model_foundry.export.measure import check_gguf
from model_foundry.export.merge import plan_merge
from model_foundry.export.parity import WEIGHT_ERRORS, make_probe
from model_foundry.export.quantise import FORMATS, pack
from model_foundry.models.config import ModelConfig
from model_foundry.models.decoder import expected_shapes
from tests.tiny_exports import make_subject
from tests.tiny_models import config_of

K_QUANTS = ["q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"]
# What llama_model_quantize of llama-cpp-python 0.3.36 chose for a Llama of twelve layers with rows of 256 (and gave the
# same bytes for): head, embedding, then layers whose value and down projections are not of the usual type.
CHOSEN = {
    "q3_k_m": ("Q6_K", "Q3_K", "Q4_K", {0: "Q5_K", 1: "Q5_K"} | dict.fromkeys(range(2, 12), "Q4_K"),
               dict.fromkeys(range(12), "Q4_K")),
    "q4_k_s": ("Q6_K", "Q4_K", "Q4_K", dict.fromkeys(range(4), "Q5_K"), {0: "Q5_K"}),
    "q4_k_m": ("Q6_K", "Q4_K", "Q4_K", dict.fromkeys((0, 3, 6, 9, 10, 11), "Q6_K"),
               dict.fromkeys((0, 3, 6, 9, 10, 11), "Q6_K")),
    "q5_k_s": ("Q6_K", "Q5_K", "Q5_K", {}, {}),
    "q5_k_m": ("Q6_K", "Q5_K", "Q5_K", dict.fromkeys((0, 3, 6, 9, 10, 11), "Q6_K"),
               dict.fromkeys((0, 3, 6, 9, 10, 11), "Q6_K")),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K", {}, {}),
}  # fmt: skip


def kinds_of(kind: str, format: str, **changes: object) -> tuple[dict[str, str], list[str]]:
    config = ModelConfig.from_hf({**config_of(kind), **changes})
    notes: list[str] = []
    layouts = plan_layout(config, expected_shapes(config), format, notes)
    return {layout.name.removesuffix(".weight"): layout.kind for layout in layouts}, notes


@pytest.mark.parametrize("format", K_QUANTS)
def test_the_types_are_those_that_llama_quantize_chooses(format: str) -> None:
    """Any other mix would be another model under a name that people know."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
    kinds, notes = kinds_of("llama", format, **shape)
    head, embedding, output, values, downs = CHOSEN[format]
    assert notes == []
    assert (kinds["output"], kinds["token_embd"], kinds["output_norm"]) == (head, embedding, "F32")
    assert {kinds[f"blk.{layer}.attn_output"] for layer in range(12)} == {output}
    for role, special in {"attn_v": values, "ffn_down": downs}.items():
        wanted = [special.get(layer, FORMATS[format][0]) for layer in range(12)]
        assert [kinds[f"blk.{layer}.{role}"] for layer in range(12)] == wanted, role


def test_narrow_rows_fall_back_as_in_llama_cpp_and_it_is_said() -> None:
    """SmolLM2's rows of 576 divide into blocks of 32 and not of 256."""
    narrow = {"hidden_size": 96, "intermediate_size": 512, "tie_word_embeddings": True}
    kinds, notes = kinds_of("llama", "q4_k_m", **narrow)
    assert kinds["token_embd"] == "Q8_0"  # it is the head as well
    assert {kinds["blk.0.attn_q"], kinds["blk.0.ffn_up"]} == {"Q5_0"}
    assert kinds["blk.0.ffn_down"] in ("Q4_K", "Q6_K")
    assert any("do not divide into blocks of 256" in note for note in notes)
    assert kinds_of("llama", "q4_k_m", hidden_size=40, intermediate_size=512)[0]["blk.0.attn_q"] == "F16"


def test_eight_experts_get_what_llama_cpp_gives_eight() -> None:
    wide = {"hidden_size": 256, "num_experts": 8, "moe_intermediate_size": 256}
    kinds, _ = kinds_of("qwen3-moe", "q4_k_m", **wide)
    assert (kinds["blk.0.attn_k"], kinds["blk.0.attn_v"]) == ("Q8_0", "Q8_0")
    assert kinds["blk.0.ffn_gate_inp"] == "F32"


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_packed_values_are_the_weights_again(kind: str) -> None:
    """A wrong stride or a wrong block size packs noise, and the file loads."""
    import gguf

    weight = np.random.default_rng(0).standard_normal((2, 3, 512)).astype(np.float32)
    back = dequantize(pack(weight, kind), gguf.GGMLQuantizationType[kind])
    assert back.shape == weight.shape
    assert float(((back - weight) ** 2).mean() / (weight**2).mean()) < WEIGHT_ERRORS[kind.lower()] / 3
    assert np.array_equal(pack(weight[0], kind), pack(weight, kind)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind, certified", [("llama", K_QUANTS[1:]), ("qwen3-moe", ["q6_k"])])
def test_llama_cpp_computes_the_model_within_the_stated_bounds(tmp_path: Path, kind: str, certified: list[str]) -> None:
    """Rows of 256, so that K-blocks are used for real.

    Rounding hits random weights harder than trained ones, whose columns differ in size; random routers choose other
    experts as well. So not every format is certified here, but each is closer than the coarser one.
    """
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256}
    wide = make_subject(tmp_path / "wide", kind, adapter_scale=0.15, num_attention_heads=8, **sizes)
    renderer, merge = wide.renderer, plan_merge(wide.base, wide.adapter)
    probe = make_probe(merge, renderer, wide.prompts)
    errors = {}
    for format in K_QUANTS:
        written = write_gguf(
            tmp_path / f"{format}.gguf", merge, format=format, tokenizer=renderer.tokenizer, name="wide",
            chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids,
        )  # fmt: skip
        checks = check_gguf(written, wide, merge, probe, readers=("llama.cpp",))
        failed = [check for check in checks if not check.passed]
        assert format not in certified or failed == [], format
        errors[format] = next(float(check.value or 0) for check in checks if check.name == "llama.cpp: logits")
        types = {tensor.tensor_type.name for tensor in GGUFReader(written.path).tensors}
        assert FORMATS[format][0] in types
    assert errors["q6_k"] < errors["q5_k_m"] < errors["q4_k_m"] < errors["q3_k_m"] < 0.6
