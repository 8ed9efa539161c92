"""The memory estimate as arithmetic; tests/recipes/test_memory_measured.py holds it against real processes."""

from __future__ import annotations

import pytest

from model_foundry.engine import losses
from model_foundry.models import attention, memory
from model_foundry.models.config import ModelConfig
from model_foundry.models.decoder import Decoder, expected_shapes
from model_foundry.models.memory import estimate_memory, num_adapter_parameters
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.types import LoraConfig

SMOLLM2 = ModelConfig(
    architecture="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
TINY = ModelConfig(
    architecture="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
)  # fmt: skip


def test_the_constants_are_those_of_the_modules_they_describe() -> None:
    """A block size changed there and not here would make the plan wrong without a test failing."""
    assert memory.QUERY_BLOCK_TOKENS == attention.QUERY_BLOCK_TOKENS
    assert memory.KEEP_PROBABILITIES_TOKENS == attention.KEEP_PROBABILITIES_TOKENS
    assert memory.CHUNK_LOGITS == losses.CHUNK_LOGITS


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_parameters_are_those_that_are_made(use_dora: bool) -> None:
    import torch

    tensors = [(name, torch.ones(shape)) for name, shape in expected_shapes(TINY).items()]
    lora = LoraConfig(r=4, use_dora=use_dora)
    adapted = adapt(Decoder(TINY, tensors).linears(), lora, seed=0, counter=DropoutCounter())
    parts = ("lora_A", "lora_B", "lora_magnitude")
    made = sum(
        part.numel() for linear in adapted.values() for name in parts if (part := getattr(linear, name)) is not None
    )
    assert num_adapter_parameters(TINY, lora) == made


def test_parts_add_up_and_grow_with_the_batch() -> None:
    small = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=[256] * 2)
    large = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=[256] * 4)
    parts = large.as_dict()
    assert parts.pop("total") == sum(parts.values())
    assert large.activations == 2 * small.activations - 36 * num_adapter_parameters(SMOLLM2, LoraConfig()) // 30 * 4
    assert large.weights == small.weights


def test_lora_full_bfloat16_and_checkpointing_differ_the_way_they_should() -> None:
    rows = [256] * 4
    lora = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=rows)
    full = estimate_memory(SMOLLM2, lora=None, rows=rows)
    half = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=rows, dtype_bytes=2)
    redone = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=rows, gradient_checkpointing=True)
    assert full.gradients == 4 * SMOLLM2.num_parameters
    assert full.total > 1.5 * lora.total
    assert half.activations * 2 == lora.activations
    assert redone.activations < lora.activations / 3
    muon = estimate_memory(SMOLLM2, lora=None, rows=rows, optimizer="muon")
    saved = 4 * (SMOLLM2.num_parameters - SMOLLM2.vocab_size * SMOLLM2.hidden_size - 61 * SMOLLM2.hidden_size)
    assert full.optimizer - muon.optimizer == saved


def test_long_rows_do_not_keep_their_probabilities() -> None:
    """Counting them would foretell eight gigabytes for what takes one."""
    short = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=[512] * 8)
    long = estimate_memory(SMOLLM2, lora=LoraConfig(), rows=[4096])
    assert long.activations < short.activations


def test_a_tiny_batch_of_full_training_needs_what_starting_needs() -> None:
    """All weights are there twice for a moment, before the first step; a short run's peak is there."""
    estimate = estimate_memory(SMOLLM2, lora=None, rows=[8])
    assert estimate.total >= 5 * 4 * SMOLLM2.num_parameters


def test_what_is_measured_between_steps_counts_where_it_needs_more() -> None:
    """Prevents a prediction for two rows a step of a run that measures sixteen of them at once."""
    step = estimate_memory(SMOLLM2, lora=None, rows=[256])
    same = estimate_memory(SMOLLM2, lora=None, rows=[256], held_out_rows=[64], sampled_rows=[32])
    held_out = estimate_memory(SMOLLM2, lora=None, rows=[256], held_out_rows=[512] * 64)
    sampled = estimate_memory(SMOLLM2, lora=None, rows=[256], sampled_rows=[8192] * 16)
    assert same == step
    assert held_out.total > step.total
    assert sampled.activations >= 16 * 8192 * 30 * 2 * 3 * 64 * 4


def test_what_composed_adapters_keep_beside_the_fast_path_is_counted() -> None:
    """Prevents a plan for DoRA that is a fifth short: its gain needs every output, and dropout copies every input."""
    plain, dora, dropped = (
        estimate_memory(SMOLLM2, lora=lora, rows=[256] * 4, dtype_bytes=2).activations
        for lora in (LoraConfig(), LoraConfig(use_dora=True), LoraConfig(lora_dropout=0.1))
    )
    outputs, inputs = 4 * 576 + 2 * 192 + 2 * 1536 - 576, 5 * 576 + 576 + 1536
    layers = 30 + memory.HOLES_LAYERS
    magnitudes = 2 * layers * outputs
    assert dora - plain == 2 * layers * 4 * 256 * outputs + magnitudes
    assert dropped - plain == 2 * layers * 4 * 256 * inputs


def test_the_second_model_at_the_end_counts_where_steps_are_small() -> None:
    small, large = ([64], [256] * 4)
    for rows, adds in ((small, True), (large, False)):
        plain, again = (
            estimate_memory(SMOLLM2, lora=LoraConfig(), rows=rows, dtype_bytes=2, loaded_again=each).total
            for each in (False, True)
        )
        assert (again > plain) == adds
