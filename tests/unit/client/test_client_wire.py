"""Rows and results as the client packs and reads them, where no service is needed to see a mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tinker import types

from model_foundry.client.results import PassOutput
from model_foundry.client.wire import adam_body, row_of, sampling_body, split, together, tokens_of
from model_foundry.errors import DataError
from model_foundry.types import AdamParams, Datum, MuonParams, SamplingParams


def datum(length: int) -> Datum:
    ids = np.arange(length, dtype=np.int32)
    return Datum(ids, {"target_tokens": ids, "weights": np.ones(length, np.float32)})


def test_a_batch_is_split_by_rows_and_by_bytes_and_stays_in_order() -> None:
    assert [len(part) for part in split([datum(2)] * 2050)] == [1024, 1024, 2]
    long = [row_of(datum(100_000)) for _ in range(7)]
    parts = split(long)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [id(row) for part in parts for row in part] == [id(row) for row in long]
    assert [len(part) for part in split([row_of(datum(2_000_000)), row_of(datum(1))])] == [1, 1]


def test_metrics_are_put_together_by_the_end_of_their_names() -> None:
    def part(value: float) -> PassOutput:
        return PassOutput(({"logprobs": np.array([value])},), {"loss:sum": value, "high:max": value, "m:mean": value})

    both = together([part(1.0), part(3.0)])
    assert both.metrics == {"loss:sum": 4.0, "high:max": 3.0, "m:mean": 2.0}
    assert [float(row[0]) for row in both.logprobs] == [1.0, 3.0]
    bare = PassOutput((), {"loss": 1.0})
    with pytest.raises(DataError, match="loss does not say"):
        together([bare, bare])


def test_rows_of_the_sdk_and_ours_are_the_same() -> None:
    given: Any = {"target_tokens": [6, 7], "weights": [1.0, 0.5]}
    theirs = row_of(types.Datum(model_input=types.ModelInput.from_ints([5, 6]), loss_fn_inputs=given))
    ours = row_of(Datum(np.array([5, 6]), {"target_tokens": np.array([6, 7]), "weights": np.array([1.0, 0.5])}))
    for name, array in theirs.loss_inputs.items():
        assert array.dtype == ours.loss_inputs[name].dtype
        np.testing.assert_array_equal(array, ours.loss_inputs[name])
    np.testing.assert_array_equal(theirs.tokens, ours.tokens)


def test_another_optimizers_numbers_are_not_taken_for_adams() -> None:
    """Muon's have every name that AdamW's have, and would train something else."""
    assert adam_body(types.AdamParams(learning_rate=0.5)) == adam_body(AdamParams(0.5, 0.9, 0.95, 1e-12))
    for params in (MuonParams(), types.DimuonParams(learning_rate=0.1)):
        with pytest.raises(DataError, match="trained by AdamW"):
            adam_body(params)


@pytest.mark.parametrize("tokens", [[1.5], [[1, 2]], [2**31], ["a"]])
def test_what_is_no_row_of_tokens(tokens: Any) -> None:
    with pytest.raises(DataError):
        tokens_of(tokens)


def test_our_sampling_parameters_stop_where_they_say_and_nowhere_else() -> None:
    """No stop tokens means no end, not the model's own; top_k 0 means all, which the protocol calls -1."""
    ours = sampling_body(SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(7,)))
    assert (ours["stop"], ours["top_k"], ours["temperature"]) == ([7], -1, 0.5)
    assert sampling_body(SamplingParams())["stop"] == []
    assert sampling_body(types.SamplingParams(max_tokens=3))["stop"] is None
    assert sampling_body(types.SamplingParams(stop=["a"]))["stop"] == ["a"]
