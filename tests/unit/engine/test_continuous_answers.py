"""Answers by the compiled loop: what torch gives, in the same bits whatever company and threads there are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_foundry.engine.continuous import ContinuousBatch, TokenEvent
from model_foundry.engine.continuous_answers import AnswerLoop
from model_foundry.models.decoder import Decoder
from model_foundry.models.language_model import LanguageModel, NativeModel, load_language_model
from model_foundry.models.small_products import have_products
from model_foundry.types import LoraConfig, SamplingParams
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_models import random_rows, write_tiny_model

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")
WIDE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
"""Sides that tiles can be cut from, and three queries to a key."""


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return load_language_model(folder, dtype=dtype)


def batch_of(model: LanguageModel, *, by_loop: bool = True) -> ContinuousBatch:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=8192)
    assert batch._decoder.answers is not None
    if not by_loop:
        batch._decoder.answers = None
    return batch


def ask(batch: ContinuousBatch, lengths: list[int], **settings: Any) -> list[list[TokenEvent]]:
    params = SamplingParams(**{"max_tokens": 9, **settings})
    rows = [random_rows((length,), seed=length)[0].numpy().astype(np.int32) for length in lengths]
    numbers = [batch.add(row, params) for row in rows]
    found: dict[int, list[TokenEvent]] = {number: [] for number in numbers}
    while batch.num_running or batch.num_waiting:
        for event in batch.step():
            found[event.number].append(event)
    return [found[number] for number in numbers]


def bits(events: list[TokenEvent]) -> list[tuple[int, float]]:
    return [(event.token, event.logprob) for event in events]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "llama"}, {"kind": "qwen2"}, {"kind": "qwen3"}, {"kind": "mistral"},
        {"kind": "qwen3-sliding", "attention_bias": False},
        {"kind": "llama", "rms_norm_eps": 1e-3}, {"kind": "llama-rope-yarn-mscale"},
        {"kind": "qwen3", "head_dim": 80, "num_attention_heads": 10},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow
def test_answers_are_those_of_torch(changes: dict[str, Any], threads: int, tmp_path: Path) -> None:
    """Prompts of one block, of several, at the edges of segments and beyond them, in one batch."""
    folder = write_tiny_model(tmp_path / "model", **{"hidden_size": 64, "head_dim": 16, **changes})
    model, lengths = load(folder), [1, 9, 250, 256, 300, 600]
    found, wanted = ask(batch_of(model), lengths), ask(batch_of(model, by_loop=False), lengths)
    for mine, other in zip(found, wanted, strict=True):
        assert [event.token for event in mine] == [event.token for event in other]
        assert [event.logprob for event in mine] == pytest.approx([event.logprob for event in other], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_has_its_bits_in_any_company_and_on_any_threads(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path / "model", "qwen3", **WIDE), dtype)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads, lengths in ((1, [300]), (2, [9, 300]), (3, [300, *range(20, 57)])):
            torch.set_num_threads(num_threads)
            answers = ask(batch_of(model), lengths)
            found.append(bits(answers[lengths.index(300)]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.skipif(not have_products(), reason="this processor multiplies no bfloat16")
def test_tiles_give_what_torch_gives(threads: int, tmp_path: Path) -> None:
    """In bfloat16, where torch rounds elsewhere within attention: near, and as near to float32 as torch is."""
    folder = write_tiny_model(tmp_path / "model", "qwen3", **WIDE, num_hidden_layers=4)
    model, lengths = load(folder, torch.bfloat16), [9, 250, 256, 300]
    batch = batch_of(model)
    assert batch._decoder.answers is not None
    assert batch._decoder.answers.by_tiles
    exact = ask(batch_of(load(folder)), lengths, max_tokens=1)
    for by_loop in (True, False):
        asked = ask(batch_of(model, by_loop=by_loop), lengths, max_tokens=1)
        assert [each[0].logprob for each in asked] == pytest.approx([each[0].logprob for each in exact], abs=0.05)
    states = {by_loop: _states(model, by_loop=by_loop) for by_loop in (True, False)}
    exactly = _states(load(folder), by_loop=True)
    far = {by_loop: float((state - exactly).norm() / exactly.norm()) for by_loop, state in states.items()}
    assert far[True] < 1.2 * far[False] < 0.05


def _states(model: LanguageModel, *, by_loop: bool) -> torch.Tensor:
    """After one more token of a prompt of 300: [1, D], float32."""
    batch = batch_of(model, by_loop=by_loop)
    batch.add(random_rows((300,), seed=3)[0].numpy().astype(np.int32), SamplingParams(max_tokens=3))
    while not batch._running or not batch._running[0].num_generated:
        batch.step()
    sequence = batch._running[0]
    sequence.last_token = 7
    batch._continue([sequence])
    assert sequence.end is not None
    return sequence.end.float().clone()


ADAPTERS = {
    "every": LoraConfig(r=3, lora_alpha=6),
    "some": LoraConfig(r=33, target_modules=("q_proj", "v_proj", "up_proj")),
    "others": LoraConfig(r=16, target_modules=("k_proj", "o_proj", "down_proj", "gate_proj")),
    "dora": LoraConfig(r=4, use_dora=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_row_by_row(dtype: torch.dtype, threads: int, tmp_path: Path) -> None:
    """What torch gives, and in the bits that an answer has alone; DoRA's rows go through torch, beside the others."""
    base = write_tiny_model(tmp_path / "model", "qwen3", **WIDE)
    model, (row,) = load(base, dtype), random_rows((70,), seed=5)
    start, params = row.numpy().astype(np.int32), SamplingParams(max_tokens=8)
    for seed, (name, lora) in enumerate(ADAPTERS.items()):
        write_tiny_adapter(tmp_path / name, base, lora, seed=seed)

    def answers(names: list[str | None], *, by_loop: bool = True) -> list[list[TokenEvent]]:
        batch = batch_of(model, by_loop=by_loop)
        for name in ADAPTERS:
            batch.add_adapter(name, tmp_path / name)
        numbers = [batch.add(start, params, adapter=name) for name in names]
        found: dict[int, list[TokenEvent]] = {number: [] for number in numbers}
        while batch.num_running or batch.num_waiting:
            for event in batch.step():
                found[event.number].append(event)
        return [found[number] for number in numbers]

    names = [None, *ADAPTERS, "every", None]
    together, by_torch = answers(names), answers(names, by_loop=False)
    alone = {name: bits(answers([name])[0]) for name in {*names}}
    assert [bits(events) for events in together] == [alone[name] for name in names]
    assert len({tuple(each) for each in alone.values()}) == len(alone)
    for mine, other in zip(together, by_torch, strict=True):
        if dtype == torch.float32:
            assert [event.token for event in mine] == [event.token for event in other]
            assert [event.logprob for event in mine] == pytest.approx([event.logprob for event in other], abs=5e-5)
        else:  # near, as long as they have said the same
            same = [a.token == b.token for a, b in zip(mine, other, strict=True)]
            said = same.index(False) if False in same else len(same)
            assert [e.logprob for e in mine[:said]] == pytest.approx([e.logprob for e in other[:said]], abs=0.1)


def test_an_adapter_that_is_gone_is_not_kept(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    base = tiny_folder("qwen3")
    batch = batch_of(load(base))
    batch.add_adapter("lua", write_tiny_adapter(tmp_path / "lua", base, LoraConfig(r=3), seed=1))
    loop = batch._decoder.answers
    assert loop is not None
    start = random_rows((9,), seed=9)[0].numpy().astype(np.int32)
    batch.add(start, SamplingParams(max_tokens=3), adapter="lua")
    while batch.num_running or batch.num_waiting:
        batch.step()
    assert len(loop._adapters) == 1
    batch.remove_adapter("lua")
    ask(batch, [9], max_tokens=3)
    assert not loop._adapters


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama-biases", {}), ("qwen3-moe", {}), ("llama", {}), ("llama", {"head_dim": 16, "intermediate_size": 50})],
)
def test_what_the_loop_does_not_do_goes_through_torch(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Another activation, experts, heads of 8 and sides that are no whole blocks."""
    model = load(write_tiny_model(tmp_path / "model", kind, **changes))
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    assert batch._decoder.answers is None
    assert [event.finish for event in ask(batch, [9], max_tokens=2)[0]] == [None, "length"]


@pytest.mark.slow
def test_packed_weights_are_not_read_as_numbers(tiny_folder: TinyFolder) -> None:
    model = load_language_model(tiny_folder("qwen3"), dtype=torch.float32, quantization="nf4")
    assert isinstance(model, NativeModel)
    assert not AnswerLoop.fits(model.decoder)


def test_places_that_are_none_are_refused(tiny_folder: TinyFolder) -> None:
    """The loop does not look where it reads and writes."""
    model = load(tiny_folder("qwen3"))
    assert isinstance(model, NativeModel)
    decoder: Decoder = model.decoder
    loop = batch_of(model)._decoder.answers
    assert loop is not None
    x = decoder.embed(torch.tensor([5]))
    for positions, segments in ((-1, 0), (300, 0), (0, 32), (0, -1)):
        with pytest.raises(IndexError, match="out of bounds"):
            loop.run(x, torch.tensor([positions]), torch.tensor([[segments]]), [None])
    # Of two rows the first has one segment, and its position is in a second.
    with pytest.raises(IndexError, match="-1 is out of bounds"):
        loop.run(x.expand(2, -1).contiguous(), torch.tensor([300, 300]), torch.tensor([[0, -1], [1, 2]]), [None] * 2)


def test_two_batches_at_once_end(tiny_folder: TinyFolder) -> None:
    """Threads that wait for each other, of two callers, could each keep the other's from starting."""
    models = [load(tiny_folder("qwen3")) for _ in range(2)]
    wanted = [bits(each) for each in ask(batch_of(models[0]), [9, 30, 60])]
    before, found = torch.get_num_threads(), [[], []]

    def answer(index: int) -> None:
        batch = batch_of(models[index])
        for _ in range(5):
            found[index].append([bits(each) for each in ask(batch, [9, 30, 60])])

    torch.set_num_threads(3)
    try:
        callers = [threading.Thread(target=answer, args=(index,), daemon=True) for index in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=120)
            assert not caller.is_alive()
    finally:
        torch.set_num_threads(before)
    assert found == [[wanted] * 5] * 2
