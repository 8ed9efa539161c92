"""The same answer, bit for bit, alone and in a crowd; that of each adapter on its own, and of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_foundry.engine.continuous import ContinuousBatch, TokenEvent
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ModelError
from model_foundry.models.finder import resolve_model
from model_foundry.models.language_model import load_language_model
from model_foundry.types import LoraConfig, SamplingParams
from tests.tiny_adapters import head_adapter, write_tiny_adapter
from tests.tiny_models import random_rows

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")
LORAS = {
    "lua": LoraConfig(r=3, lora_alpha=6),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=("q_proj", "o_proj", "up_proj")),
    "one": LoraConfig(r=1, use_rslora=True, target_modules=("v_proj", "down_proj", "lm_head")),
}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}


@dataclass(frozen=True)
class Request:
    prompt: np.ndarray
    params: SamplingParams
    adapter: str | None
    top_logprobs: int


@dataclass(frozen=True)
class Crowd:
    """A model with adapters, requests whose prompts begin alike, and each one's answer alone."""

    start: Callable[..., ContinuousBatch]
    requests: list[Request]
    alone: list[list[TokenEvent]]


def drain(batch: ContinuousBatch) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {}
    idle = 0
    while batch.num_running or batch.num_waiting:
        made = batch.step()
        idle = 0 if made else idle + 1
        assert idle < 50, "requests wait for nothing"
        for event in made:
            events.setdefault(event.number, []).append(event)
    return events


def make_requests(adapters: list[str | None]) -> list[Request]:
    long, other = (row.numpy().astype(np.int32) for row in random_rows((420, 90)))
    starts = [long[:5], long[:70], long[:128], long[:300], long, np.concatenate([long[:200], other]), other]
    requests = []
    for number, start in enumerate(starts * 2):
        chosen = {} if number % 2 else SAMPLED
        params = SamplingParams(max_tokens=4 + number % 5, seed=number, **chosen)
        requests.append(Request(start, params, adapters[number % len(adapters)], number % 3))
    return requests


def make_crowd(base: Path, folder: Path, dtype: torch.dtype, loras: dict[str, LoraConfig]) -> Crowd:
    model = load_language_model(base, dtype=dtype)
    folders = {name: write_tiny_adapter(folder / name, base, lora) for name, lora in loras.items()}

    def start(**sizes: int) -> ContinuousBatch:
        batch = ContinuousBatch(model, device=CPU, invariant=True, **sizes)
        for name, path in folders.items():
            batch.add_adapter(name, path)
        return batch

    requests = make_requests([None, *loras])
    alone = []
    for request in requests:
        batch = start(max_cache_tokens=2048)
        number = batch.add(request.prompt, request.params, adapter=request.adapter, top_logprobs=request.top_logprobs)
        alone.append(drain(batch)[number])
    return Crowd(start, requests, alone)


KINDS = {
    "dense, float32": ("qwen3-sliding", torch.float32, LORAS),
    "dense, bfloat16": ("llama-biases", torch.bfloat16, LORAS),
    "experts, float32": ("qwen3-moe", torch.float32, {"lua": LORAS["lua"], "one": LORAS["one"]}),
}


@pytest.fixture(scope="module", params=KINDS)
def crowd(request: pytest.FixtureRequest, tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    kind, dtype, loras = KINDS[request.param]
    return make_crowd(tiny_folder(kind), tmp_path_factory.mktemp("adapters"), dtype, loras)


def seen(events: list[TokenEvent]) -> list[tuple[Any, ...]]:
    """All of an answer but how much of its prompt was found, which is allowed to depend on the others."""
    return [(event.token, event.logprob, event.top, event.finish) for event in events]


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_answer_is_the_same_bits_in_every_company(crowd: Crowd, data: st.DataObject) -> None:
    """Greedy and drawn, with adapters and without; others arrive, are cancelled, are found in the cache meanwhile."""
    batch = crowd.start(
        max_sequences=data.draw(st.integers(1, 20)), max_cache_tokens=256 * data.draw(st.integers(2, 16))
    )
    numbers: dict[int, int] = {}
    cancelled: set[int] = set()
    events: dict[int, list[TokenEvent]] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        for which in data.draw(st.lists(st.integers(0, len(crowd.requests) - 1), max_size=6)):
            request = crowd.requests[which]
            number = batch.add(
                request.prompt, request.params, adapter=request.adapter, top_logprobs=request.top_logprobs
            )
            numbers[number] = which
        if numbers and data.draw(st.booleans()):
            number = data.draw(st.sampled_from(sorted(numbers)))
            batch.cancel(number)
            cancelled.add(number)
        for _ in range(data.draw(st.integers(0, 6))):
            for event in batch.step():
                events.setdefault(event.number, []).append(event)
    for number, rest in drain(batch).items():
        events.setdefault(number, []).extend(rest)
    for number, which in numbers.items():
        want, got = seen(crowd.alone[which]), seen(events.get(number, []))
        assert got == want[: len(got)]
        assert number in cancelled or len(got) == len(want)
    assert batch.cache_tokens_used == 0


@pytest.mark.slow
def test_a_full_house_is_the_same_bits(crowd: Crowd) -> None:
    """More answers than a piece of rows holds, all prompts at once."""
    batch = crowd.start(max_cache_tokens=32768)
    numbers = [
        (which, batch.add(r.prompt, r.params, adapter=r.adapter, top_logprobs=r.top_logprobs))
        for which, r in list(enumerate(crowd.requests)) * 3
    ]
    events = drain(batch)
    for which, number in numbers:
        assert seen(events[number]) == seen(crowd.alone[which])


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_the_real_model_on_two_threads_is_the_same_bits(tmp_path: Path) -> None:
    """Tiny models have products so small that one thread computes them whole."""
    base, before = resolve_model("smollm2-135m-instruct").folder, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        crowd = make_crowd(base, tmp_path, torch.bfloat16, {"lua": LORAS["lua"], "dora": LORAS["dora"]})
        batch = crowd.start(max_cache_tokens=32768)
        numbers = [
            (which, batch.add(r.prompt, r.params, adapter=r.adapter, top_logprobs=r.top_logprobs))
            for which, r in list(enumerate(crowd.requests)) * 2
        ]
        events = drain(batch)
    finally:
        torch.set_num_threads(before)
    for which, number in numbers:
        assert seen(events[number]) == seen(crowd.alone[which])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3-moe"])
@pytest.mark.parametrize("invariant", [True, False])
def test_each_adapter_answers_as_a_model_that_has_it_alone(
    kind: str, invariant: bool, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    base = tiny_folder(kind)
    loras: dict[str, LoraConfig] = {name: lora for name, lora in LORAS.items() if kind == "qwen3" or name != "dora"}
    loras["all"] = LoraConfig(r=2, target_modules="all-linear")
    start = random_rows((40,))[0].numpy().astype(np.int32)
    params = SamplingParams(max_tokens=10)
    batch = ContinuousBatch(
        load_language_model(base, dtype=torch.float32), device=CPU, max_cache_tokens=8192, invariant=invariant
    )
    numbers: dict[str | None, int] = {None: batch.add(start, params)}
    for name, lora in loras.items():
        batch.add_adapter(name, write_tiny_adapter(tmp_path / name, base, lora, seed=len(name), scale=0.1))
        numbers[name] = batch.add(start, params, adapter=name)
    events = drain(batch)
    engine = TorchEngine(device="cpu", dtype="float32", num_threads=1)
    answers = set()
    for name, number in numbers.items():
        model_id = engine.create_model(
            base, lora=None, adapter=None if name is None else tmp_path / name, trainable=False
        )
        (want,) = engine.sample(model_id, [start], params)
        assert [event.token for event in events[number]] == want.tokens.tolist()
        assert np.abs(np.array([event.logprob for event in events[number]]) - want.logprobs).max() < 1e-5
        answers.add(tuple(want.logprobs.tolist()))
    assert len(answers) == len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-tied", "mistral", "qwen2", "qwen3-moe-mixed"])
def test_greedy_answers_are_those_of_transformers(kind: str, tiny_folder: TinyFolder) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(kind)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = ContinuousBatch(load_language_model(folder, dtype=torch.float32), device=CPU, max_cache_tokens=8192)
    rows = random_rows((3, 64, 290))
    numbers = [batch.add(row.numpy().astype(np.int32), SamplingParams(max_tokens=12)) for row in rows]
    events = drain(batch)
    for row, number in zip(rows, numbers, strict=True):
        made = theirs.generate(row[None], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        assert [event.token for event in events[number]] == made[0, len(row) :].tolist()


def test_an_adapter_on_the_head_needs_no_dropout_to_answer(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """PEFT's config keeps the dropout of the training, and such adapters were refused where nothing is dropped."""
    base = tiny_folder("llama-tied")
    batch = ContinuousBatch(load_language_model(base, dtype=torch.float32), device=CPU, max_cache_tokens=2048)
    prompt = random_rows((20,))[0].numpy().astype(np.int32)
    answers = []
    for dropout in (0.0, 0.1):
        folder = head_adapter(tmp_path / str(dropout), base, dropout=dropout)
        batch.add_adapter(folder.name, folder)
        number = batch.add(prompt, SamplingParams(max_tokens=4), adapter=folder.name, top_logprobs=2)
        answers.append(seen(drain(batch)[number]))
        TorchEngine(device="cpu").create_model(base, lora=None, adapter=folder, trainable=False)
    assert answers[0] == answers[1]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match="DoRA is not computed on the output head"):
        batch.add_adapter("dora", folder)
