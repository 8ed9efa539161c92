"""The native decoder computes what transformers computes: logits, whole rows, packed rows, and token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_foundry.errors import ArchitectureMismatchError
from model_foundry.models.decoder import Decoder, KeyValueCache, decode_step, prefill
from model_foundry.models.folder import read_config, read_tensors, write_model_folder
from model_foundry.models.language_model import NativeModel, load_language_model
from tests.tiny_models import NATIVE, random_rows, write_with_transformers

pytestmark = pytest.mark.slow  # importing transformers takes seconds

TinyFolder = Callable[[str], Path]
LENGTHS = (1, 70, 5, 13, 12, 300, 13)
"""One token; rows that stack, padded and not; rows longer than a block of queries and than every sliding window."""


def native(folder: Path) -> NativeModel:
    model = load_language_model(folder, dtype=torch.float32, implementation="native")
    assert isinstance(model, NativeModel)
    return model


def theirs(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_close(got: torch.Tensor, want: torch.Tensor, *, bound: float = 1e-4) -> None:
    """The issue's measure: the largest difference over the range of the logits."""
    assert float((got - want).abs().max()) < bound * float(want.max() - want.min())


@torch.no_grad()
@pytest.mark.parametrize("kind", NATIVE)
def test_packed_logits_equal_each_row_in_transformers(kind: str, tiny_folder: TinyFolder) -> None:
    """A bias, norm, window or rope variant read wrongly still trains, on another model than the one saved."""
    model, peer = native(tiny_folder(kind)), theirs(tiny_folder(kind))
    rows = random_rows(LENGTHS)
    logits = model.decoder.logits(model.hidden(rows)).split(LENGTHS)
    for row, got in zip(rows, logits, strict=True):
        assert_close(got, peer(row[None]).logits[0], bound=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", NATIVE)
def test_transformers_own_folders_load(kind: str, tmp_path: Path) -> None:
    """`config.json` as transformers 5 writes it: rope nested, defaults spelled out, layer types listed."""
    folder = write_with_transformers(tmp_path / kind, kind, seed=1)
    model, peer = native(folder), theirs(folder)
    row = random_rows([40])[0]
    assert_close(model.decoder.logits(model.hidden([row])), peer(row[None]).logits[0], bound=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", NATIVE)
def test_prefill_and_single_steps_equal_the_whole_row(kind: str, tiny_folder: TinyFolder) -> None:
    """Prompts of different lengths share a cache; a place off by one shows only while decoding."""
    decoder, peer = native(tiny_folder(kind)).decoder, theirs(tiny_folder(kind))
    rows = random_rows([9, 30, 1, 17])
    steps = random_rows([25] * 4, seed=5)
    cache = KeyValueCache(decoder, 4, 60)
    got = [decoder.logits(prefill(decoder, rows, cache))]
    got += [decoder.logits(decode_step(decoder, torch.stack([s[i] for s in steps]), cache)) for i in range(25)]
    for number, (row, rest) in enumerate(zip(rows, steps, strict=True)):
        want = peer(torch.cat([row, rest])[None]).logits[0][len(row) - 1 :]
        assert_close(torch.stack([step[number] for step in got]), want, bound=1e-5)


@torch.no_grad()
def test_sequences_that_end_leave_the_others_as_they_were(tiny_folder: TinyFolder) -> None:
    decoder, peer = native(tiny_folder("qwen3-sliding")).decoder, theirs(tiny_folder("qwen3-sliding"))
    rows, token = random_rows([20, 6, 14]), torch.tensor([7, 8])
    cache = KeyValueCache(decoder, 3, 40)
    prefill(decoder, rows, cache)
    cache.keep(torch.tensor([0, 2]))
    got = decoder.logits(decode_step(decoder, token, cache))
    for number, row in enumerate((rows[0], rows[2])):
        assert_close(got[number], peer(torch.cat([row, token[number : number + 1]])[None]).logits[0, -1], bound=1e-5)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_own(tiny_folder: TinyFolder) -> None:
    exact, peer = theirs(tiny_folder("llama")), theirs(tiny_folder("llama")).bfloat16()
    ours = load_language_model(tiny_folder("llama"), dtype=torch.bfloat16)
    rows = random_rows([100, 60, 80])
    head = ours.head
    assert head is not None
    got = (ours.hidden(rows) @ head.t()).float().split([100, 60, 80])
    want = [exact(row[None]).logits[0] for row in rows]
    error_ours = max(float((a - b).abs().mean()) for a, b in zip(got, want, strict=True))
    error_theirs = max(
        float((peer(row[None]).logits[0].float() - b).abs().mean()) for row, b in zip(rows, want, strict=True)
    )
    assert error_ours < 1.2 * error_theirs


@torch.no_grad()
def test_a_tied_folder_that_stores_only_the_head_or_the_same_twice_loads(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Old checkpoints hold the tied matrix under either name, or under both."""
    source = tiny_folder("llama-tied")
    tensors = dict(read_tensors(source))
    embedding = tensors["model.embed_tokens.weight"]
    row = random_rows([12])[0]
    want = native(source).hidden([row])
    both = tensors | {"lm_head.weight": embedding.clone()}
    head_only = {name: t for name, t in both.items() if name != "model.embed_tokens.weight"}
    for name, stored in {"both": both, "head": head_only}.items():
        write_model_folder(tmp_path / name, read_config(source), stored.items(), tokenizer_from=source)
        assert torch.equal(native(tmp_path / name).hidden([row]), want)
        assert_close(native(tmp_path / name).decoder.logits(want), theirs(tmp_path / name)(row[None]).logits[0])


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """transformers then uses the stored head; a decoder that drops it answers differently and says nothing."""
    source = tiny_folder("llama-tied")
    tensors = dict(read_tensors(source))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_model_folder(tmp_path / "out", read_config(source), tensors.items(), tokenizer_from=source)
    with pytest.raises(ArchitectureMismatchError, match="tie_word_embeddings"):
        native(tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "left over", "reshaped"])
def test_weights_of_another_shape_are_refused_by_name(change: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = tiny_folder("llama")
    tensors = dict(read_tensors(source))
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "reshaped":
        tensors[name] = tensors[name][:-1].clone()
    else:
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = torch.zeros(3)
    write_model_folder(tmp_path / "out", read_config(source), tensors.items(), tokenizer_from=source)
    with pytest.raises(ArchitectureMismatchError, match=name) as error:
        native(tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)


@torch.no_grad()
def test_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M-Instruct, from the cache or fetched."""
    from model_foundry.models.finder import resolve_model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = resolve_model("smollm2-135m-instruct").folder
    model, peer = native(folder), theirs(folder)
    rows = random_rows([64, 3, 300], vocab_size=49152)
    logits = model.decoder.logits(model.hidden(rows)).split([64, 3, 300])
    for row, got in zip(rows, logits, strict=True):
        assert_close(got, peer(row[None]).logits[0])


def test_rope_is_applied_in_float32_at_far_positions(tiny_folder: TinyFolder) -> None:
    """Angles in bfloat16 are off by radians after a few hundred tokens."""
    model: Decoder = load_language_model(tiny_folder("llama"), dtype=torch.bfloat16).decoder  # pyright: ignore
    cos = model.rope(torch.tensor([2000]))[2].float()[0, 0]
    want = (2000 * model.frequencies.double()).cos()
    assert float((cos.double() - want).abs().max()) < 5e-3
