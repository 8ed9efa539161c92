"""The transformers fallback: same logits as transformers alone, and refusals where they would be silently wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model_foundry.errors import ModelError
from model_foundry.models.fallback import TransformersModel, load_transformers_model
from model_foundry.models.folder import read_config, write_model_folder
from model_foundry.models.language_model import load_language_model

WIDE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma": WIDE | {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": WIDE | {"head_dim": 8, "num_key_value_heads": 2},
    "phi3": WIDE | {"pad_token_id": 0, "num_key_value_heads": 2},
    "gpt_neox": WIDE,
    "opt": {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": WIDE | {"num_local_experts": 4, "num_key_value_heads": 2},
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip
Made = tuple[PreTrainedModel, Path]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Made]:
    """A random small model of a kind, and its folder."""

    def build(kind: str) -> Made:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **KINDS[kind], bos_token_id=1, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        model.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "tokenizer.json").write_text("{}")
        return model, tmp_path / kind

    return build


def load(folder: Path) -> TransformersModel:
    return load_transformers_model(folder, torch.float32, "cpu")


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 97, (length,), generator=generator) for length in (7, 3, 12)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_each_row_the_logits_it_has_alone(kind: str, make: Callable[[str], Made]) -> None:
    """Padding that leaks into a row changes its loss, and no error says so."""
    model, folder = make(kind)
    for row, got in zip(rows(), load(folder).logits(rows()), strict=True):
        want = model(row[None]).logits[0]
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_all_at_once(kind: str, make: Callable[[str], Made]) -> None:
    model, folder = make(kind)
    row, wrapped = rows()[2], load(folder)
    want = model(row[None]).logits[0]
    logits, cache = wrapped.start(row[:5])
    for position in range(5, 12):
        assert (logits - want[position - 1]).abs().max() <= 1e-5 * want.abs().max()
        logits, cache = wrapped.step(int(row[position]), cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "gemma", "mixtral"])
def test_what_is_written_loads_as_the_same_model(kind: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    """transformers keeps some weights (a mixture's experts) under other names than the folder does."""
    model, folder = make(kind)
    wrapped = load(folder)
    write_model_folder(tmp_path / "out", read_config(folder), wrapped.tensors(), tokenizer_from=folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(rows()[0][None]).logits, model(rows()[0][None]).logits)


def test_linear_modules_are_all_but_the_head(make: Callable[[str], Made]) -> None:
    """GPT-2's layers are Conv1D, and an adapter on the tied head would change the embeddings too."""
    names = load(make("gpt2")[1]).linear_modules()
    assert len(names) == 8
    assert "transformer.h.1.mlp.c_proj" in names
    assert not any("lm_head" in name for name in names)


def test_dropout_is_off_even_in_training_mode_and_that_is_said(make: Callable[[str], Made]) -> None:
    """GPT-2 drops a tenth by default, drawn from hidden random state: no run could be repeated."""
    wrapped = load(make("gpt2")[1])
    wrapped.train()
    assert torch.equal(wrapped.logits(rows())[0], wrapped.logits(rows())[0])
    assert any("resid_pdrop" in note for note in wrapped.notes)


def test_experts_that_carry_no_adapter_are_said_to(
    make: Callable[[str], Made], caplog: pytest.LogCaptureFixture
) -> None:
    """all-linear used to leave Mixtral's experts out, nine tenths of its weights, without a word."""
    folder = make("mixtral")[1]
    model = load_language_model(folder, dtype=torch.float32)
    assert not any("expert" in name for name in model.linears())
    assert "weights of experts are not linear modules" in caplog.text
    assert "all-linear included" in caplog.text


def test_the_attention_that_was_asked_for_is_taken_or_its_replacement_said(make: Callable[[str], Made]) -> None:
    folder = make("gemma")[1]
    assert load_transformers_model(folder, torch.float32, "cpu", attention="eager").attention == "eager"
    wrapped = load_transformers_model(folder, torch.float32, "cpu", attention="flash")
    assert any(f"computed by {wrapped.attention}" in note for note in wrapped.notes)


def test_a_model_that_reads_ahead_is_refused(tmp_path: Path) -> None:
    """BERT loads as a "causal" model and reads the answer it is to predict: the loss falls to nothing."""
    config = AutoConfig.for_model("bert", **WIDE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="later tokens"):
        load(tmp_path)


def test_a_missing_weight_is_refused_and_not_made_up(make: Callable[[str], Made], tmp_path: Path) -> None:
    _, folder = make("gpt2")
    tensors = [(name, tensor) for name, tensor in load(folder).tensors() if "h.1.mlp.c_proj.weight" not in name]
    write_model_folder(tmp_path / "out", read_config(folder), tensors, tokenizer_from=folder)
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_proj\.weight"):
        load(tmp_path / "out")


def test_code_from_the_models_folder_is_never_run(make: Callable[[str], Made], tmp_path: Path) -> None:
    _, folder = make("gpt2")
    canary = tmp_path / "ran"
    (folder / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    auto_map = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config = read_config(folder) | {"model_type": "made-up", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="never run"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("kind, words", [("clip", "not a causal"), ("made-up", "not known"), (None, "not known")])
def test_another_kind_of_model_is_refused_by_name(kind: str | None, words: str, make: Callable[[str], Made]) -> None:
    _, folder = make("gpt2")
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"model_type": kind}))
    with pytest.raises(ModelError, match=words):
        load(folder)
