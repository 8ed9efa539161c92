"""A row that ends in branches gives each branch the losses and gradients that it has as a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_foundry.engine.branches import BRANCH_COST, laid_lengths, lay_out, stays_whole
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError
from model_foundry.types import Datum, LoraConfig, Pair
from tests.tiny_models import random_data, random_pairs

TinyFolder = Callable[[str], Path]
LORA = LoraConfig(r=4, lora_alpha=8.0)
SHAPES = ((40, 9, 14), (1, 3, 2), (12, 5, 5), (300, 40, 70), (0, 20, 11), (12, 5, 5), (500, 30, 2))
"""(shared, better, worse): short enough to be stacked, longer than a block of queries, with nothing in common."""


def engine(**options: Any) -> TorchEngine:
    return TorchEngine(**{"device": "cpu", "dtype": "float32", "num_threads": 1} | options)


def passed(
    own: TorchEngine, folder: Path, data: Sequence[Datum], **options: Any
) -> tuple[float, list[np.ndarray], torch.Tensor]:
    """Loss, log-probabilities and gradient of a model whose adapter changes something."""
    model_id = own.create_model(folder, lora=LORA)
    generator = torch.Generator().manual_seed(1)
    for tensor in own.trained_tensors(model_id).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    output = own.forward_backward(model_id, data, **options)
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    gradient = optimizer.grad.clone()
    own.delete_model(model_id)
    return output.loss_sum, list(output.logprobs), gradient


def apart(made: Sequence[Pair]) -> list[Datum]:
    return [row for pair in made for row in (pair.chosen, pair.rejected)]


def assert_same(got: Any, want: Any, made: Sequence[Pair]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    for number, pair in enumerate(made):
        shared, (better, _) = pair.num_shared, pair.joined().branches
        joined, rows = got[1][number], want[1][2 * number : 2 * number + 2]
        np.testing.assert_allclose(joined[shared : shared + better], rows[0][shared:], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(joined[shared + better :], rows[1][shared:], rtol=1e-4, atol=1e-5)
    assert float((got[2] - want[2]).abs().max()) < 1e-5 * float(want[2].abs().max())


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-sliding"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_branches_side_by_side_are_the_rows_apart(kind: str, attention: str, tiny_folder: TinyFolder) -> None:
    """Prevents an answer that sees the other one, positions that run on, and a prompt whose gradient counts once."""
    made, own = random_pairs(SHAPES), engine(attention=attention)
    want = passed(own, tiny_folder(kind), apart(made))
    joined = [pair.joined() for pair in made]
    assert sum(stays_whole(datum, reads_branches=True) for datum in joined) == len(made) - 1
    assert_same(passed(own, tiny_folder(kind), joined), want, made)
    # Among plain rows, in one stack with them.
    assert_same(passed(own, tiny_folder(kind), [*joined, *random_data([21, 22, 340], seed=7)]),
                passed(own, tiny_folder(kind), [*apart(made), *random_data([21, 22, 340], seed=7)]), made)  # fmt: skip


def test_a_model_without_branches_gets_rows_of_their_own(tiny_folder: TinyFolder) -> None:
    """Prevents transformers from reading the second answer as what follows the first."""
    made, own = random_pairs(SHAPES[:3]), engine(implementation="transformers")
    want = passed(own, tiny_folder("llama-tied"), apart(made))
    assert_same(passed(own, tiny_folder("llama-tied"), [pair.joined() for pair in made]), want, made)


def test_pieces_and_recomputed_layers_change_nothing(tiny_folder: TinyFolder) -> None:
    """Prevents a pair that is cut in two, and a mask that is lost when a layer is computed again."""
    made, folder = random_pairs(SHAPES), tiny_folder("llama-tied")
    data = [pair.joined() for pair in made]
    data = [Datum(d.tokens, {**d.loss_inputs, "logprobs": d.loss_inputs["weights"] * -3}, d.branches) for d in data]
    want = passed(engine(), folder, data, loss_fn="dpo_sigmoid", loss_config={"beta": 0.3})
    for options in ({"micro_batch_tokens": 60}, {"gradient_checkpointing": True}, {"implementation": "transformers"}):
        got = passed(engine(**options), folder, data, loss_fn="dpo_sigmoid", loss_config={"beta": 0.3})
        assert got[0] == pytest.approx(want[0], rel=1e-5)
        assert float((got[2] - want[2]).abs().max()) < 1e-4 * float(want[2].abs().max())


def test_what_is_shared_ends_before_the_first_answer() -> None:
    """Prevents answers that begin alike from losing their first tokens to the prompt, where nothing is counted."""
    (pair,) = random_pairs([(7, 4, 4)])
    same = Pair(pair.chosen, pair.chosen)
    assert pair.num_shared == same.num_shared == 7
    joined = same.joined()
    assert (joined.branches, joined.num_tokens, joined.num_positions) == ((4, 4), 15, 11)
    assert joined.loss_inputs["weights"].sum() == 8


def test_long_answers_to_a_short_prompt_stand_apart() -> None:
    """Prevents a mask over two long answers, which costs more than reading the prompt twice."""
    (pair,) = random_pairs([(1, 80, 80)])
    joined = pair.joined()
    assert BRANCH_COST < 80 * 80
    assert laid_lengths(joined, reads_branches=True) == [81, 81]
    laid = lay_out([joined], reads_branches=True)
    assert [row.tolist() for row in laid.rows] == [pair.chosen.tokens.tolist(), pair.rejected.tokens.tolist()]
    assert laid.places is not None
    assert laid.places.tolist() == [*range(81), *range(82, 162)]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"branches": ()}, "0 branches"),
        ({"branches": (3, 0)}, "branches of"),
        ({"branches": (30, 30)}, "branches of"),
        ({"weights": [0, 0, 0, 1, 1, 1, 0, 0]}, "every branch"),
        ({"weights": [0, 1, 0, 1, 1, 1, 1, 1]}, "every branch"),
        ({"weights": [0, 0, 0, 1, 1, 1, 2, 1]}, "different weights"),
    ],
)
def test_what_is_no_pair_is_refused(change: dict[str, Any], said: str, tiny_folder: TinyFolder) -> None:
    """Prevents a loss that divides by nothing, or takes some other tokens for an answer."""
    (plain,) = random_data([8])
    weights = np.array(change.get("weights", [0, 0, 0, 1, 1, 1, 1, 1]), dtype=np.float32)
    inputs = {**plain.loss_inputs, "weights": weights, "logprobs": np.zeros(8, np.float32)}
    own = engine()
    model_id = own.create_model(tiny_folder("llama-tied"), lora=LORA)
    with pytest.raises(EngineError, match=said):
        own.forward_backward(model_id, [Datum(plain.tokens, inputs, change.get("branches", (3, 2)))], loss_fn="dpo_ipo")
