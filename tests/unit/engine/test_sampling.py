"""Continuing prompts: greedy is the argmax of the whole row, draws depend on seed and prompt alone, stops stop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_foundry.engine.next_tokens import drawn
from model_foundry.engine.sampling import filtered
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError
from model_foundry.types import Datum, SamplingParams
from tests.tiny_models import VOCAB_SIZE, random_rows

TinyFolder = Callable[[str], Path]
Loaded = tuple[TorchEngine, str]


@pytest.fixture(scope="module")
def loaded(tiny_folder: TinyFolder) -> Loaded:
    own = TorchEngine(device="cpu", dtype="float32", num_threads=1)
    return own, own.create_model(tiny_folder("qwen3-sliding"), lora=None, trainable=False)


def prompts(*lengths: int) -> list[np.ndarray]:
    return [row.numpy().astype(np.int32) for row in random_rows(lengths)]


def logprobs_of_next(loaded: Loaded, tokens: np.ndarray) -> np.ndarray:
    """float32 [V], from the whole row: another path than the one that decodes."""
    model: Any = loaded[0]._get(loaded[1]).language_model
    with torch.no_grad():
        hidden = model.hidden([torch.from_numpy(tokens).long()])
        return torch.log_softmax(hidden[-1] @ model.head.t(), dim=0).numpy()


@pytest.mark.slow
def test_greedy_takes_the_largest_logit_of_the_whole_row(loaded: Loaded) -> None:
    own, model_id = loaded
    starts = prompts(9, 1, 30)
    results = own.sample(model_id, starts, SamplingParams(max_tokens=20))
    for start, result in zip(starts, results, strict=True):
        assert (len(result.tokens), result.stop_reason) == (20, "length")
        text = start
        for token, logprob in zip(result.tokens, result.logprobs, strict=True):
            want = logprobs_of_next(loaded, text)
            assert token == want.argmax()
            assert logprob == pytest.approx(want.max(), abs=1e-4)
            text = np.append(text, token)


def test_logprobs_are_those_of_the_loss(loaded: Loaded) -> None:
    """Those drawn at another temperature or from a nucleus too: a policy's own probabilities are asked for."""
    own, model_id = loaded
    (start,) = prompts(9)
    params = SamplingParams(max_tokens=12, temperature=1.4, top_p=0.9, seed=3)
    (result,) = own.sample(model_id, [start], params)
    row = np.concatenate([start, result.tokens])
    datum = Datum.from_row(row, np.ones(len(row), dtype=np.float32))
    want = own.forward(model_id, [datum], logprobs="all").logprobs[0][len(start) - 1 :]
    assert np.abs(result.logprobs - want).max() < 1e-4


SETTINGS = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_do_not_depend_on_what_else_is_in_the_batch(settings: dict[str, Any], loaded: Loaded) -> None:
    """An evaluation must not change its answers with its batch size."""
    own, model_id = loaded
    params = SamplingParams(max_tokens=15, seed=11, **settings)
    starts = prompts(9, 4, 30, 17)
    together = own.sample(model_id, starts, params)
    assert [r.tokens.tolist() for r in own.sample(model_id, starts, params)] == [r.tokens.tolist() for r in together]
    for start, want in zip(starts, together, strict=True):
        assert own.sample(model_id, [start], params)[0].tokens.tolist() == want.tokens.tolist()
    turned = own.sample(model_id, starts[::-1], params)[::-1]
    assert [r.tokens.tolist() for r in turned] == [r.tokens.tolist() for r in together]
    other = own.sample(model_id, starts, SamplingParams(max_tokens=15, seed=12, **settings))
    assert [r.tokens.tolist() for r in other] != [r.tokens.tolist() for r in together]


def test_copies_of_a_prompt_are_drawn_apart_and_by_their_probabilities(loaded: Loaded) -> None:
    own, model_id = loaded
    (start,) = prompts(9)
    params = SamplingParams(max_tokens=1, temperature=2.0, top_k=3)
    drawn = Counter(int(r.tokens[0]) for r in own.sample(model_id, [start] * 600, params))
    logits = logprobs_of_next(loaded, start)
    best = logits.argsort()[-3:]
    share = np.exp(logits[best] / 2) / np.exp(logits[best] / 2).sum()
    assert set(drawn) <= set(best.tolist())
    for token, expected in zip(best.tolist(), share, strict=True):
        # Five standard deviations of a count of 600.
        assert abs(drawn[token] / 600 - expected) < 5 * math.sqrt(expected * (1 - expected) / 600)


def test_a_stop_token_ends_its_row_and_no_other(loaded: Loaded) -> None:
    own, model_id = loaded
    starts = prompts(9, 4, 30)
    free = own.sample(model_id, starts, SamplingParams(max_tokens=12))
    stop = int(free[1].tokens[3])
    stopped = own.sample(model_id, starts, SamplingParams(max_tokens=12, stop_token_ids=(stop,)))
    for want, got in zip(free, stopped, strict=True):
        ends = np.flatnonzero(want.tokens == stop)
        num_tokens = int(ends[0]) + 1 if len(ends) else 12
        assert got.tokens.tolist() == want.tokens[:num_tokens].tolist()
        assert got.stop_reason == ("stop" if len(ends) else "length")
    assert stopped[1].stop_reason == "stop"


def test_a_tiny_temperature_is_greedy_and_not_nan(loaded: Loaded) -> None:
    own, model_id = loaded
    starts = prompts(9, 4)
    greedy, *cold = (
        [row.tokens.tolist() for row in own.sample(model_id, starts, SamplingParams(max_tokens=8, temperature=value))]
        for value in (0.0, 1e-30, 1e-46, 5e-324)
    )
    assert cold == [greedy] * 3
    model, device = own.language_model(model_id), torch.device("cpu")
    likeliest, *draws = (
        drawn(model, starts[0], k=2, temperature=value, seed=1, device=device)[0].tolist()
        for value in (0.0, 1e-30, 1e-46)
    )
    assert draws == [likeliest] * 2


def test_nothing_asked_for_is_nothing_given(loaded: Loaded) -> None:
    own, model_id = loaded
    assert own.sample(model_id, [], SamplingParams()) == ()
    (empty,) = own.sample(model_id, prompts(3), SamplingParams(max_tokens=0))
    assert (len(empty.tokens), empty.stop_reason) == (0, "length")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2048}, "context of 2048"),
]


@pytest.mark.parametrize("settings, words", WRONG)
def test_parameters_that_mean_nothing_are_refused(settings: dict[str, Any], words: str, loaded: Loaded) -> None:
    own, model_id = loaded
    with pytest.raises(EngineError, match=words):
        own.sample(model_id, prompts(3), SamplingParams(**settings))


@pytest.mark.parametrize("tokens, words", [([], "no tokens"), ([3, VOCAB_SIZE], "vocabulary"), ([-1], "vocabulary")])
def test_prompts_that_cannot_be_read_are_refused_by_number(tokens: list[int], words: str, loaded: Loaded) -> None:
    own, model_id = loaded
    with pytest.raises(EngineError, match=words) as error:
        own.sample(model_id, [*prompts(3), np.array(tokens, dtype=np.int32)], SamplingParams())
    assert error.value.where == "prompt 1"


def test_top_k_and_top_p_keep_the_smallest_nucleus() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    kept = torch.isfinite(filtered(logits, SamplingParams(top_p=0.65)))
    assert kept[0].tolist() == [True, False, True, False]
    assert int(kept[1].sum()) == 3
    assert torch.isfinite(filtered(logits, SamplingParams(top_p=1e-9))).sum(1).tolist() == [1, 1]
    assert torch.isfinite(filtered(logits, SamplingParams(top_k=2)))[0].tolist() == [True, False, True, False]
    assert torch.isfinite(filtered(logits, SamplingParams(top_k=9))).all()
    both = torch.isfinite(filtered(logits, SamplingParams(top_k=3, top_p=0.4)))
    assert both[0].tolist() == [True, False, False, False]


@pytest.mark.slow
def test_filters_are_transformers_own() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 3
    ids: Any = None
    want = TemperatureLogitsWarper(0.6)(ids, logits)
    want = TopPLogitsWarper(0.9)(ids, TopKLogitsWarper(40)(ids, want))
    got = filtered(logits / 0.6, SamplingParams(top_k=40, top_p=0.9))
    assert torch.equal(torch.isfinite(got), torch.isfinite(want))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_greedy_through_transformers_is_the_argmax_too(kind: str, tiny_folder: TinyFolder) -> None:
    own = TorchEngine(device="cpu", dtype="float32", num_threads=1)
    model_id = own.create_model(tiny_folder(kind), lora=None, trainable=False)
    starts = prompts(9, 2, 14)
    model = own._get(model_id).language_model
    for start, result in zip(starts, own.sample(model_id, starts, SamplingParams(max_tokens=9)), strict=True):
        text = start
        for token in result.tokens:
            with torch.no_grad():
                assert token == int(model.hidden([torch.from_numpy(text).long()])[-1].argmax())
            text = np.append(text, token)
