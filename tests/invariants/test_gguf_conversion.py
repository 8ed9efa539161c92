"""A GGUF and the folder made of it are the same model: values, rope, tokens. Real conversions, in child processes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from model_foundry.errors import ModelError
from model_foundry.models.config import ModelConfig
from model_foundry.models.finder import resolve_model
from model_foundry.models.folder import read_config, read_tensors

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 96, 260
Q4_1, Q8_0, F32 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {byte: chr(byte) for byte in kept} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def llama_permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Hugging Face's row order of a query or key projection -> GGUF's."""
    return weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, rope_divisors: list[float] | None = None) -> dict[str, np.ndarray]:
    """A one-layer Llama; returns the dequantised values under their Hugging Face names."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16384)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCAB)
    tokens = [*SPECIAL, *byte_alphabet(), "ĊĊ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_divisors, dtype=np.float32))
    kv = KV_HEADS * HEAD_DIM
    layout = [
        ("token_embd", "model.embed_tokens", (VOCAB, WIDTH), Q8_0, 0),
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj", (WIDTH, WIDTH), Q4_1, HEADS),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", (kv, WIDTH), Q4_1, KV_HEADS),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj", (kv, WIDTH), Q4_1, 0),
        ("blk.0.attn_output", "model.layers.0.self_attn.o_proj", (WIDTH, WIDTH), Q4_1, 0),
        ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj", (INNER, WIDTH), Q4_1, 0),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj", (INNER, WIDTH), Q4_1, 0),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", (WIDTH, INNER), Q4_1, 0),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm", (WIDTH,), F32, 0),
        ("blk.0.ffn_norm", "model.layers.0.post_attention_layernorm", (WIDTH,), F32, 0),
        ("output_norm", "model.norm", (WIDTH,), F32, 0),
    ]  # fmt: skip
    values: dict[str, np.ndarray] = {}
    for short, name, shape, kind, permuted_heads in layout:
        weight = random.standard_normal(shape).astype(np.float32)
        data = weight if kind == F32 else quantize(weight, kind)
        value = weight if kind == F32 else dequantize(data, kind)
        # The values are the file's; which row of the file they are is the permutation's doing.
        if permuted_heads:
            inverse = value.reshape(permuted_heads, shape[0] // permuted_heads // 2, 2, -1).swapaxes(1, 2)
            value = inverse.reshape(shape)
            assert np.array_equal(llama_permuted(value, permuted_heads), dequantize(data, kind))
        writer.add_tensor(f"{short}.weight", data, raw_dtype=None if kind == F32 else kind)
        values[f"{name}.weight"] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], Path]:
    """One conversion with Llama 3's rope table, shared by the tests that look at it."""
    home = tmp_path_factory.mktemp("home")
    divisors = [1.0, 1.0, 1.0, 1.0, *expected_divisors()]
    values = write_gguf(home / "tiny.gguf", rope_divisors=divisors)
    source = resolve_model(str(home / "tiny.gguf"), home=home, say=lambda line: None)
    return source.folder, values, home


def expected_divisors() -> list[float]:
    """The upper half of Llama 3's table for eight frequencies at theta 500,000 and factor 8."""
    table = []
    for index in range(4, 8):
        wavelength = 2 * np.pi * 500_000.0 ** (index / 8)
        smooth = min(max((8192 / wavelength - 1) / 3, 0.0), 1.0)
        table.append(1 / ((1 - smooth) / 8 + smooth))
    return table


def test_every_value_of_the_gguf_is_in_the_folder_unchanged(
    converted: tuple[Path, dict[str, np.ndarray], Path],
) -> None:
    folder, values, _ = converted
    tensors = dict(read_tensors(folder))
    assert tensors.keys() == values.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.float().numpy(), values[name]), name


def test_rope_theta_and_llama3_scaling_survive(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    folder, _, _ = converted
    raw = read_config(folder)
    config = ModelConfig.from_hf(raw)
    assert raw["rope_theta"] == config.rope_theta == 500_000.0
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("llama3", 8.0)
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    assert config.rms_norm_eps == 1e-5


def test_digits_stand_alone_before_merges(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    assert tokenizer.encode("\n\n1").tokens == ["ĊĊ", "1"]


def test_files_are_readable_and_named_for_old_readers(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    folder, _, _ = converted
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_second_use_does_not_convert_again(converted: tuple[Path, dict[str, np.ndarray], Path]) -> None:
    folder, _, home = converted
    said: list[str] = []
    assert resolve_model(str(home / "tiny.gguf"), home=home, say=said.append).folder == folder
    assert said == []


def test_an_unknown_rope_table_is_refused(tmp_path: Path) -> None:
    """Dropping it would give another model with the same name."""
    write_gguf(tmp_path / "odd.gguf", rope_divisors=[3.0] * 8)
    with pytest.raises(ModelError, match="rope_freqs"):
        resolve_model(str(tmp_path / "odd.gguf"), home=tmp_path, say=lambda line: None)


def test_a_truncated_gguf_is_one_sentence(tmp_path: Path) -> None:
    write_gguf(tmp_path / "cut.gguf")
    data = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError) as caught:
        resolve_model(str(tmp_path / "cut.gguf"), home=tmp_path, say=lambda line: None)
    assert "Traceback" not in str(caught.value)


def test_the_real_models_tokenizer_splits_digits_as_it_was_trained() -> None:
    """Numbered lists are everywhere in chat data, and each would start with another token than in training."""
    source = resolve_model("smollm2-135m-instruct")
    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    assert tokenizer.encode("\n\n1. a  2").tokens == ["ĊĊ", "1", ".", "Ġa", "ĠĠ", "2"]
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]


def test_the_real_model_is_whole() -> None:
    source = resolve_model("smollm2-135m-instruct")
    config = ModelConfig.from_hf(read_config(source.folder))
    assert config.num_parameters == 134_515_008
    assert config.tie_word_embeddings
    assert sum(tensor.numel() for _, tensor in read_tensors(source.folder)) == config.num_parameters
