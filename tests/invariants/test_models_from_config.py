"""A model made from nothing is transformers' model of the same config.json; its dropout belongs to rows and steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ModelError
from model_foundry.models.architecture import Architecture, count_parameters, to_config
from model_foundry.models.attention import choose_attention
from model_foundry.models.initialise import write_fresh_model
from model_foundry.models.language_model import load_language_model
from model_foundry.models.packed_rows import PackedRows
from model_foundry.types import AdamParams, Datum, LoraConfig
from tests.tiny_models import VOCAB_SIZE, random_data, random_rows, write_tokenizer

LENGTHS = (30, 1, 7, 61)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "llama, untied, head of its own width": {
        "architecture": "llama", "tie_word_embeddings": False, "head_dim": 10, "rope_theta": 5e5, "hidden_act": "gelu",
    },
    "qwen3": {"architecture": "qwen3", "head_dim": 16, "num_key_value_heads": 1},
    "qwen3_moe": {"architecture": "qwen3_moe", "num_experts": 5, "decoder_sparse_step": 2, "moe_intermediate_size": 24},
    "gpt2": {"architecture": "gpt2"},
    "gpt2, untied": {"architecture": "gpt2", "tie_word_embeddings": False, "intermediate_size": 40},
}  # fmt: skip


def shape(**changes: Any) -> Architecture:
    return Architecture(**{
        "architecture": "llama", "vocab_size": VOCAB_SIZE, "max_position_embeddings": 700, "num_hidden_layers": 4,
        "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_ids": (2,), **changes,
    })  # fmt: skip


def fresh(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    tokenizer = write_tokenizer(folder.parent / "tokenizer")
    write_fresh_model(folder, to_config(shape(**changes)), seed=seed, tokenizer_from=tokenizer)
    return folder


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", SHAPES)
def test_transformers_loads_the_folder_with_equal_logits(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = fresh(tmp_path / "model", initializer_range=0.3, **SHAPES[case])
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    peer, loading = loaded
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.num_parameters() == count_parameters(to_config(shape(**SHAPES[case])))
    model, rows = load_language_model(folder, dtype=torch.float32), random_rows(LENGTHS)
    assert model.implementation == ("transformers" if "gpt2" in case else "native")
    hidden = model.hidden(rows)
    logits = hidden if model.head is None else functional.linear(hidden, model.head)
    for row, got in zip(rows, logits.split(LENGTHS), strict=True):
        want = peer.eval()(row[None]).logits[0]
        assert float((got - want).abs().max()) < 1e-5 * float(want.max() - want.min())


@pytest.mark.slow
def test_parameters_of_many_shapes_are_counted_as_transformers_builds_them() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    rng = random.Random(0)
    for _ in range(60):
        kind = rng.choice(["llama", "qwen3", "qwen3_moe", "gpt2"])
        keys, groups, own = rng.randint(1, 4), rng.randint(1, 4), rng.random() < 0.5 and kind.startswith("qwen")
        heads = keys * groups
        config = to_config(Architecture(
            architecture=kind,  # pyright: ignore[reportArgumentType]
            vocab_size=rng.randint(10, 900), max_position_embeddings=rng.randint(8, 99),
            num_hidden_layers=rng.randint(1, 5), num_attention_heads=heads,
            num_key_value_heads=heads if kind == "gpt2" else keys,
            hidden_size=rng.randint(5, 60) if own else heads * 2 * rng.randint(1, 9),
            head_dim=2 * rng.randint(1, 20) if own else None,
            intermediate_size=rng.choice([None, rng.randint(1, 200)]), tie_word_embeddings=rng.random() < 0.5,
            num_experts=rng.randint(1, 9) if kind == "qwen3_moe" else None, num_experts_per_tok=1,
            decoder_sparse_step=rng.randint(1, 3), mlp_only_layers=rng.choice([(), (0,)]),
        ))  # fmt: skip
        with torch.device("meta"):
            keys_of = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
            peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys_of))
        assert count_parameters(config) == peer.num_parameters(), config


@pytest.mark.slow
@pytest.mark.parametrize("case", SHAPES)
def test_a_fresh_model_learns_whole_and_by_adapters(case: str, tmp_path: Path) -> None:
    data = random_data((40, 30))
    # An adapter can do little on top of weights that are nearly nothing: there they are larger.
    for lora, rate, deviation in ((None, 1e-2, 0.02), (LoraConfig(r=8, lora_alpha=32.0), 1e-2, 0.3)):
        folder = fresh(tmp_path / f"model-{deviation}", initializer_range=deviation, **SHAPES[case])
        own = engine()
        model_id = own.create_model(folder, lora=lora)
        start = own.forward(model_id, data).loss_sum
        for _ in range(25):
            own.forward_backward(model_id, data)
            own.optim_step(model_id, AdamParams(learning_rate=rate))
        assert own.forward(model_id, data).loss_sum < 0.8 * start
        assert own.describe(model_id)["base_parameters"] == count_parameters(to_config(shape(**SHAPES[case])))


def gradient(own: TorchEngine, model_id: str) -> torch.Tensor:
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    return optimizer.grad.clone()


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


RATES: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3}
LONG = (40, 41, 5, 300, 1, 40, 600)
"""Rows that stack, one longer than a block of queries, one whose probabilities are not kept."""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dropout": 0.2}, {"attention_dropout": 0.3}, RATES], ids=["x", "p", "both"])
def test_dropout_belongs_to_the_row_however_the_batch_is_packed_or_split(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Drawn by place in the batch, a run that recovers from out-of-memory would be another run."""
    folder, data = fresh(tmp_path / "model", initializer_range=0.2, **changes), random_data(LONG)
    wanted: tuple[float, torch.Tensor] | None = None
    for options in ({}, {"micro_batch_tokens": 350}, {"micro_batch_tokens": 1}, {"gradient_checkpointing": True}):
        own = engine(**options)
        model_id = own.create_model(folder, lora=None, seed=3)
        loss = own.forward_backward(model_id, data).loss_sum
        if wanted is None:
            wanted = (loss, gradient(own, model_id))
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        assert_same(gradient(own, model_id), wanted[1])
    assert wanted is not None
    own = engine()
    model_id = own.create_model(folder, lora=None, seed=3)
    plain = own.forward(model_id, data).loss_sum
    losses = {plain}
    for _ in range(2):
        losses.add(own.forward_backward(model_id, data).loss_sum)
        own.optim_step(model_id, AdamParams(learning_rate=1e-30))
    losses.add(loss_of_seed(folder, data, seed=4))
    assert len(losses) == 4, "a step, a seed or the mask itself made no difference"
    assert own.forward(model_id, data).loss_sum == pytest.approx(plain, rel=1e-6)


def loss_of_seed(folder: Path, data: Sequence[Datum], *, seed: int) -> float:
    own = engine()
    return own.forward_backward(own.create_model(folder, lora=None, seed=seed), data).loss_sum


def test_the_same_seed_gives_the_same_bits_with_dropout(tmp_path: Path) -> None:
    folder, data = fresh(tmp_path / "model", **RATES), random_data(LENGTHS)
    seen = []
    for _ in range(2):
        own = engine()
        model_id = own.create_model(folder, lora=None, seed=1)
        for _ in range(3):
            own.forward_backward(model_id, data)
            own.optim_step(model_id, AdamParams(learning_rate=1e-2))
            torch.rand(5)
        seen.append({name: tensor.clone() for name, tensor in own.trained_tensors(model_id).items()})
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in seen[0].items())


@pytest.mark.parametrize("lengths", [(5, 9, 6, 1), (300, 4), (40, 41)])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_dropout_equals_plain_autograd(lengths: tuple[int, ...], window: int | None) -> None:
    """The mask stands on the probabilities after the softmax, in both passes, the same for stacked and single rows."""
    from model_foundry.models.attention import attend_packed
    from model_foundry.models.randomness import AttentionDropout, DropoutCounter

    torch.manual_seed(0)
    counter = DropoutCounter(seed=1, step=2, rows=tuple((10 + row, tokens) for row, tokens in enumerate(lengths)))
    dropout, rows = AttentionDropout(0.4, counter, 77), PackedRows.of(lengths)
    q, k, v = (
        torch.randn(sum(lengths), heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )  # fmt: skip
    one, zero = torch.ones(sum(lengths), 1, 3).double(), torch.zeros(sum(lengths), 1, 3).double()
    grad = torch.randn(sum(lengths), 4, 6, dtype=torch.float64)
    got = attend_packed(q, k, v, (one, zero, one, zero), rows, window, dropout=dropout)
    parts = []
    for row, (rq, rk, rv) in enumerate(zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)):
        place = torch.arange(len(rq))
        hidden = place[None, :] > place[:, None]
        if window is not None:
            hidden |= place[None, :] <= place[:, None] - window
        scores = torch.einsum("qhgd,khd->hgqk", rq.view(len(rq), 2, 2, 6), rk).masked_fill(hidden, float("-inf"))
        mask = torch.ones(2, 2, len(rq), len(rq), dtype=torch.float64)
        for first in range(0, len(rq), 256):
            last, first_key = min(first + 256, len(rq)), 0 if window is None else max(0, first - window + 1)
            mask[:, :, first:last, first_key:last] = dropout.mask(row, (2, 2), (first, last), (first_key, last))
        parts.append(torch.einsum("hgqk,khd->qhgd", scores.softmax(-1) * mask, rv).reshape(len(rq), 4, 6))
    want = torch.cat(parts)
    assert torch.allclose(got, want, atol=1e-12)
    theirs = torch.autograd.grad(want, (q, k, v), grad)
    for mine, their in zip(torch.autograd.grad(got, (q, k, v), grad), theirs, strict=True):
        assert torch.allclose(mine, their, atol=1e-11)


def test_share_and_scale_of_dropped_probabilities_are_as_asked_for() -> None:
    from model_foundry.models.randomness import AttentionDropout, DropoutCounter

    mask = AttentionDropout(0.25, DropoutCounter(rows=((0, 200),)), 5).mask(0, (2, 2), (0, 200), (0, 200))
    assert set(mask.unique().tolist()) == {0.0, np.float32(1 / 0.75).item()}
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_a_model_that_drops_is_not_trained_without_knowing_its_rows(tmp_path: Path) -> None:
    """Without counters the masks would come from nowhere, or from hidden state."""
    model = load_language_model(fresh(tmp_path / "model", attention_dropout=0.1), dtype=torch.float32).train()
    with pytest.raises(ModelError, match="rows are not known"):
        model.hidden(random_rows((5,)))


BACKENDS: list[tuple[Any, str, str, torch.dtype, float, str]] = [
    ("auto", "eager", "cpu", torch.float32, 0.0, "CPU"),
    ("flash", "eager", "cpu", torch.float32, 0.0, "needs CUDA"),
    ("flash", "sdpa", "cuda", torch.float32, 0.0, "bfloat16"),
    ("flash", "flash", "cuda", torch.bfloat16, 0.0, "asked"),
    ("sdpa", "sdpa", "cpu", torch.float32, 0.0, "asked"),
    ("auto", "sdpa", "cuda", torch.bfloat16, 0.0, "cuda"),
    ("auto", "sdpa", "mps", torch.float32, 0.0, "mps"),
    ("sdpa", "eager", "cpu", torch.float32, 0.1, "dropout"),
]


@pytest.mark.parametrize("asked, chosen, device, dtype, rate, word", BACKENDS)
def test_the_back_end_is_what_was_asked_for_or_says_why_not(
    asked: Any, chosen: str, device: str, dtype: torch.dtype, rate: float, word: str
) -> None:
    choice = choose_attention(asked, torch.device(device), dtype, attention_dropout=rate)
    assert choice.chosen == chosen
    assert word in choice.why


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3-moe"])
def test_back_ends_compute_the_same(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    data, wanted = random_data((30, 7, 300)), None
    for attention in ("eager", "sdpa"):
        own = engine(attention=attention)
        model_id = own.create_model(tiny_folder(kind), lora=None)
        loss = own.forward_backward(model_id, data).loss_sum
        if wanted is None:
            wanted = (loss, gradient(own, model_id))
        assert loss == pytest.approx(wanted[0], rel=1e-6)
        assert_same(gradient(own, model_id), wanted[1])


def test_a_back_end_that_does_not_run_is_replaced_with_a_word(
    tiny_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    load_language_model(tiny_folder("llama"), dtype=torch.float32, attention="sdpa")
    assert not caplog.records
    load_language_model(tiny_folder("llama"), dtype=torch.float32, attention="flash")
    assert "attention: eager (flash cannot be used: it needs CUDA" in caplog.text
