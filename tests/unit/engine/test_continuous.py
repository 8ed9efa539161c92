"""The running batch: who is let in, what is reported, and that room comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_foundry.engine.continuous import ContinuousBatch, TokenEvent
from model_foundry.engine.sampling import collect, stream_tokens
from model_foundry.errors import ArchitectureMismatchError, EngineError, ModelError
from model_foundry.models.language_model import LanguageModel, load_language_model
from model_foundry.types import LoraConfig, SamplingParams
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_models import VOCAB_SIZE, random_rows

TinyFolder = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_folder: TinyFolder) -> LanguageModel:
    return load_language_model(tiny_folder("qwen3-sliding"), dtype=torch.float32)


def prompts(*lengths: int) -> list[np.ndarray]:
    """Rows that do not begin alike."""
    rows = [random_rows((length,), seed=length)[0] for length in lengths]
    return [row.numpy().astype(np.int32) for row in rows]


def drain(batch: ContinuousBatch, before: list[TokenEvent] | None = None) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {}
    for event in before or []:
        events.setdefault(event.number, []).append(event)
    while batch.num_running or batch.num_waiting:
        for event in batch.step():
            events.setdefault(event.number, []).append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 4}])
def test_answers_are_those_of_the_engine(settings: dict[str, Any], model: LanguageModel) -> None:
    """Prompts of one block, of several, of several segments: the other path keeps its cache in one piece."""
    starts = prompts(9, 1, 64, 65, 300)
    params = SamplingParams(max_tokens=9, **settings)
    want = collect(stream_tokens(model, starts, params, CPU), len(starts), params)
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    numbers = [batch.add(start, params) for start in starts]
    events = drain(batch)
    for number, result in zip(numbers, want, strict=True):
        assert tokens(events[number]) == result.tokens.tolist()
        assert np.allclose([event.logprob for event in events[number]], result.logprobs, atol=1e-4)
        assert [event.finish for event in events[number]] == [None] * 8 + ["length"]
    assert batch.cache_tokens_used == 0


@pytest.mark.slow
def test_one_token_a_step_and_none_when_idle(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    assert batch.step() == []
    first = batch.add(prompts(9)[0], SamplingParams(max_tokens=4))
    assert [event.number for event in batch.step()] == [first]
    second = batch.add(prompts(5, 6)[1], SamplingParams(max_tokens=2))
    assert sorted(event.number for event in batch.step()) == [first, second]
    assert (batch.num_running, batch.num_waiting) == (2, 0)
    drain(batch)
    assert batch.step() == []


def test_a_long_prompt_does_not_hold_up_an_answer(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    short = batch.add(prompts(9)[0], SamplingParams(max_tokens=12))
    batch.step()
    long = batch.add(prompts(1500)[0], SamplingParams(max_tokens=1))
    steps = [[event.number for event in batch.step()] for _ in range(6)]
    assert steps == [[short]] * 5 + [[short, long]] or steps == [[short]] * 5 + [[long, short]]


def test_a_short_prompt_overtakes_a_long_one_that_is_being_read(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=8192)
    for long in prompts(1500, 1501):
        batch.add(long, SamplingParams(max_tokens=1))
    batch.step()
    short = batch.add(prompts(9)[0], SamplingParams(max_tokens=1))
    assert [event.number for event in batch.step()] == [short]


def test_stop_tokens_end_a_sequence_and_are_reported(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    (start,) = prompts(9)
    number = batch.add(start, SamplingParams(max_tokens=9))
    free = tokens(drain(batch)[number])
    number = batch.add(start, SamplingParams(max_tokens=9, stop_token_ids=(free[3],)))
    events = drain(batch)[number]
    end = free.index(free[3])
    assert tokens(events) == free[: end + 1]
    assert [event.finish for event in events] == [None] * end + ["stop"]


def test_top_logprobs_are_the_largest_and_add_up(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    number = batch.add(prompts(9)[0], SamplingParams(max_tokens=3), top_logprobs=VOCAB_SIZE)
    other = batch.add(prompts(9, 8)[1], SamplingParams(max_tokens=3), top_logprobs=2)
    events = drain(batch)
    for event in events[number]:
        assert event.top[0] == (event.token, pytest.approx(event.logprob, abs=1e-6))
        assert sum(np.exp(logprob) for _, logprob in event.top) == pytest.approx(1, abs=1e-4)
        assert list(event.top) == sorted(event.top, key=lambda pair: -pair[1])
    assert [len(event.top) for event in events[other]] == [2, 2, 2]


def test_samples_of_one_prompt_read_it_once(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=8192)
    (start,) = prompts(530)
    numbers = [batch.add(start, SamplingParams(max_tokens=6, temperature=1.0, seed=seed)) for seed in range(4)]
    before = batch.step()
    assert (batch.num_running, batch.num_waiting) == (1, 3)
    before += batch.step()
    assert batch.num_running == 4
    # Two whole segments in common, and one for each.
    assert batch.cache_tokens_used == 256 * (2 + 4)
    events = drain(batch, before)
    assert len({tuple(tokens(events[number])) for number in numbers}) == 4
    again = batch.add(start, SamplingParams(max_tokens=6, temperature=1.0, seed=2))
    events |= drain(batch)
    assert events[again][0].cached_tokens == 530
    assert tokens(events[again]) == tokens(events[numbers[2]])
    longer = batch.add(np.concatenate([start[:400], start[:50]]), SamplingParams(max_tokens=2))
    assert [event.cached_tokens for event in drain(batch)[longer]] == [384, 0]


def test_who_does_not_fit_waits_and_who_never_could_is_refused(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=1024, max_sequences=3)
    with pytest.raises(EngineError, match="exceed the cache of 1024"):
        batch.add(prompts(1000)[0], SamplingParams(max_tokens=26))
    big = batch.add(prompts(700)[0], SamplingParams(max_tokens=30))
    wide = batch.add(prompts(300)[0], SamplingParams(max_tokens=5))
    small = batch.add(prompts(4)[0], SamplingParams(max_tokens=5))
    events = batch.step()
    assert (batch.num_running, batch.num_waiting, batch.cache_tokens_used) == (1, 2, 768)
    for event in events:
        assert event.number == big
    done = drain(batch)
    assert (len(done[wide]), len(done[small])) == (5, 5)


def test_no_more_sequences_run_than_were_allowed(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096, max_sequences=3)
    for start in prompts(9, 10, 11, 12, 13):
        batch.add(start, SamplingParams(max_tokens=2))
    batch.step()
    assert (batch.num_running, batch.num_waiting) == (3, 2)
    batch.step()
    batch.step()
    assert (batch.num_running, batch.num_waiting) == (2, 0)


def test_a_request_for_all_of_the_cache_is_let_in_though_it_would_copy_from_it(model: LanguageModel) -> None:
    """It waited for ever: what it had found was kept for it, and left too little room."""
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=512)
    (start,) = prompts(100)
    batch.add(start, SamplingParams(max_tokens=2))
    drain(batch)
    number = batch.add(start, SamplingParams(max_tokens=400))
    for _ in range(3):
        batch.step()
    assert (batch.num_running, batch.num_waiting) == (1, 0)
    batch.cancel(number)


def test_a_cancelled_sequence_gives_its_room_back(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=1024)
    running = batch.add(prompts(700)[0], SamplingParams(max_tokens=50))
    waiting = batch.add(prompts(400)[0], SamplingParams(max_tokens=2))
    gone = batch.add(prompts(401)[0], SamplingParams(max_tokens=2))
    batch.step()
    for number in (running, gone, gone, 999):
        batch.cancel(number)
    assert (batch.num_running, batch.cache_tokens_used) == (0, 0)
    assert list(drain(batch)) == [waiting]


def test_a_request_waits_no_longer_for_a_prompt_whose_reader_is_gone(model: LanguageModel) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=8192)
    (start,) = prompts(1900)
    first, second = (batch.add(start, SamplingParams(max_tokens=2)) for _ in range(2))
    batch.step()
    assert batch.num_waiting == 1
    batch.cancel(first)
    assert len(drain(batch)[second]) == 2


def test_a_step_that_ran_out_of_memory_may_be_repeated(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    params = SamplingParams(max_tokens=6)
    number = batch.add(prompts(200)[0], params)
    want = tokens(drain(batch)[number])
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    number, run, calls = batch.add(prompts(200)[0], params), batch._decoder.run, []

    def sometimes(work: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 2:
            run(work)
            raise MemoryError
        return run(work)

    monkeypatch.setattr(batch._decoder, "run", sometimes)
    got: list[int] = []
    while batch.num_running or batch.num_waiting:
        try:
            got += tokens(batch.step())
        except MemoryError:
            continue
    assert got == want


def test_memory_that_runs_out_over_one_answer_costs_the_others_no_token(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose token was there already had moved on, and nobody was ever told which it was."""
    import model_foundry.engine.continuous as room

    params = SamplingParams(max_tokens=5, temperature=1.0)

    def started() -> tuple[ContinuousBatch, list[int]]:
        batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
        return batch, [batch.add(prompt, params) for prompt in prompts(9, 30, 70)]

    batch, numbers = started()
    events = drain(batch)
    want, real, calls = [tokens(events[number]) for number in numbers], room.choose, []

    def sometimes(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) % 4 == 2:
            raise MemoryError
        return real(*given)

    monkeypatch.setattr(room, "choose", sometimes)
    batch, numbers = started()
    got: dict[int, list[int]] = {number: [] for number in numbers}
    while batch.num_running or batch.num_waiting:
        try:
            for event in batch.step():
                got[event.number].append(event.token)
        except MemoryError:
            continue
    assert [got[number] for number in numbers] == want


WRONG: list[tuple[list[int], dict[str, Any], dict[str, Any], str]] = [
    ([], {}, {}, "no tokens"),
    ([VOCAB_SIZE], {}, {}, "vocabulary"),
    ([3], {"max_tokens": 0}, {}, "max_tokens"),
    ([3], {"max_tokens": 2048}, {}, "context of 2048"),
    ([3], {"temperature": -1.0}, {}, "temperature"),
    ([3], {}, {"adapter": "lua"}, "no adapter 'lua'"),
    ([3], {}, {"top_logprobs": -1}, "top_logprobs"),
    ([3], {}, {"top_logprobs": 500}, "top_logprobs"),
]


@pytest.mark.parametrize("start, params, options, words", WRONG)
def test_requests_that_mean_nothing_are_refused(
    start: list[int], params: dict[str, Any], options: dict[str, Any], words: str, model: LanguageModel
) -> None:
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    with pytest.raises(EngineError, match=words):
        batch.add(np.array(start, dtype=np.int32), SamplingParams(**params), **options)
    assert batch.num_waiting == 0


def test_sizes_that_mean_nothing_are_refused(model: LanguageModel) -> None:
    for num_sequences, num_tokens in ((0, 4096), (1, 255)):
        with pytest.raises(EngineError, match="sequences with"):
            ContinuousBatch(model, device=CPU, max_sequences=num_sequences, max_cache_tokens=num_tokens)


@pytest.mark.slow
def test_a_model_that_transformers_runs_is_refused(tiny_folder: TinyFolder) -> None:
    foreign = load_language_model(tiny_folder("gpt2"), dtype=torch.float32)
    with pytest.raises(EngineError, match="native decoder"):
        ContinuousBatch(foreign, device=CPU)


def test_adapters_come_and_go_while_the_batch_runs(
    model: LanguageModel, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    base, (start,) = tiny_folder("qwen3-sliding"), prompts(70)
    lua = write_tiny_adapter(tmp_path / "lua", base, LoraConfig(r=3, lora_alpha=6), seed=1)
    other = write_tiny_adapter(tmp_path / "other", base, LoraConfig(r=5, target_modules=("q_proj", "up_proj")), seed=2)
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=8192)
    batch.add_adapter("lua", lua)
    with pytest.raises(EngineError, match="already"):
        batch.add_adapter("lua", other)
    params = SamplingParams(max_tokens=8)
    plain, tuned = batch.add(start, params), batch.add(start, params, adapter="lua")
    before = batch.step()
    batch.remove_adapter("lua")
    assert batch.adapters == ()
    with pytest.raises(EngineError, match="no adapter 'lua'; there is: none"):
        batch.add(start, params, adapter="lua")
    with pytest.raises(EngineError, match="no adapter 'lua'"):
        batch.remove_adapter("lua")
    batch.add_adapter("lua", other)
    renamed = batch.add(start, params, adapter="lua")
    events = drain(batch, before)
    assert [len(events[number]) for number in (plain, tuned, renamed)] == [8, 8, 8]
    assert len({tuple(e.logprob for e in events[number]) for number in (plain, tuned, renamed)}) == 3
    # The name's new owner must not find the prompts of the old one.
    assert events[renamed][0].cached_tokens == 0


def test_what_a_broken_adapter_left_in_the_cache_reaches_nobody(
    model: LanguageModel, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Keys beyond an answer's end are masked, but nothing times NaN is NaN."""
    folder = write_tiny_adapter(tmp_path / "nan", tiny_folder("qwen3-sliding"), LoraConfig(r=2))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.full_like(value, float("nan")) for name, value in weights.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    long, short = prompts(240, 9)
    params = SamplingParams(max_tokens=8)
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=256)
    number = batch.add(short, params)
    want = drain(batch)[number]
    batch.add_adapter("nan", folder)
    batch.add(long, params, adapter="nan")
    drain(batch)
    batch.add(prompts(9, 8)[1], params)  # its segment is the same one, there is no other
    drain(batch)
    again = batch.add(short, params)
    found = drain(batch)[again]
    assert [(event.token, event.logprob) for event in found] == [(event.token, event.logprob) for event in want]


def test_an_adapter_for_another_base_is_refused(model: LanguageModel, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    stray = write_tiny_adapter(tmp_path / "stray", tiny_folder("llama"), LoraConfig(r=2))
    batch = ContinuousBatch(model, device=CPU, max_cache_tokens=4096)
    with pytest.raises(ArchitectureMismatchError):
        batch.add_adapter("stray", stray)
    with pytest.raises(ModelError):
        batch.add_adapter("absent", tmp_path / "absent")
    assert batch.adapters == ()


def test_a_model_with_an_adapter_of_its_own_is_refused(tiny_folder: TinyFolder) -> None:
    from model_foundry.models.randomness import DropoutCounter
    from model_foundry.models.targets import adapt

    tuned = load_language_model(tiny_folder("llama"), dtype=torch.float32)
    adapt(tuned.linears(), LoraConfig(r=2), seed=0, counter=DropoutCounter())
    with pytest.raises(EngineError, match="carries an adapter"):
        ContinuousBatch(tuned, device=CPU)
