"""The losses of pairs and their gradients are those of TRL's trainers on the same batch, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_foundry.engine.preference_losses import PREFERENCE_TERMS
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.types import Datum, Pair
from tests.tiny_models import random_pairs, write_tiny_model

pytestmark = pytest.mark.slow  # importing trl takes seconds

TinyFolder = Callable[[str], Path]
BETA = 0.3
SHAPES = ((9, 6, 11), (1, 3, 2), (30, 12, 5))
SMOOTHING = {"robust": 0.15}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What is trained, and the reference: two models, so that no loss is at its start."""
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_model(folder / "policy", "llama-tied", seed=1), write_tiny_model(
        folder / "reference", "llama-tied"
    )


def engine() -> TorchEngine:
    return TorchEngine(device="cpu", dtype="float32", num_threads=1)


def our_data(own: TorchEngine, reference: Path, made: list[Pair]) -> list[Datum]:
    """Each pair with the reference's log-probabilities, weighted so that the sum is TRL's mean."""
    model_id = own.create_model(reference, lora=None, trainable=False)
    data = [pair.joined() for pair in made]
    measured = own.forward(model_id, data).logprobs
    own.delete_model(model_id)
    share = np.float32(1 / len(made))
    return [
        Datum(
            datum.tokens,
            {**datum.loss_inputs, "weights": datum.loss_inputs["weights"] * share, "logprobs": np.nan_to_num(logprobs)},
            datum.branches,
        )
        for datum, logprobs in zip(data, measured, strict=True)
    ]


def ours(folders: tuple[Path, Path], made: list[Pair], loss: str, settings: Mapping[str, float]) -> tuple[float, Any]:
    own = engine()
    data = our_data(own, folders[1], made)
    model_id = own.create_model(folders[0], lora=None)
    output = own.forward_backward(model_id, data, loss_fn=f"dpo_{loss}", loss_config=settings)
    assert own.forward(model_id, data, loss_fn=f"dpo_{loss}", loss_config=settings).loss_sum == output.loss_sum
    optimizer = own._get(model_id).optimizer
    assert optimizer is not None
    return output.loss_sum, {name: p.grad for name, p in optimizer.parameters.items()}


def their_batch(made: list[Pair]) -> dict[str, torch.Tensor]:
    rows = [[pair.chosen for pair in made], [pair.rejected for pair in made]]
    longest = max(row.num_tokens for side in rows for row in side) + 1
    batch: dict[str, list[np.ndarray]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for row in (row for side in rows for row in side):
        ids = np.concatenate([row.tokens[:1], row.loss_inputs["target_tokens"]])
        trained = np.concatenate([[0], row.loss_inputs["weights"] != 0])
        for name, values in zip(batch, (ids, np.ones_like(ids), trained), strict=True):
            batch[name].append(np.pad(values, (0, longest - values.size)))
    return {name: torch.from_numpy(np.stack(values)).long() for name, values in batch.items()}


def theirs(
    folders: tuple[Path, Path], made: list[Pair], losses: list[str], smoothing: float, out: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    args = DPOConfig(
        output_dir=str(out), loss_type=losses, beta=BETA, label_smoothing=smoothing, use_cpu=True, report_to=[],
        gradient_checkpointing=False, bf16=False, disable_dropout=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=models[0], ref_model=models[1], args=args, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )  # fmt: skip
    model: Any = trainer.model
    loss: Any = trainer.compute_loss(model, their_batch(made))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}


def their_orpo(
    folder: Path, made: list[Pair], beta: float, out: Path
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and metrics of TRL's ORPOTrainer."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = ORPOConfig(output_dir=str(out), beta=beta, use_cpu=True, report_to=[], bf16=False, disable_dropout=True)
    trainer = ORPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    both = {name: values.chunk(2) for name, values in their_batch(made).items()}
    batch: dict[str, Any] = {}
    for place, side in enumerate(("chosen", "rejected")):
        ids, mask, answer = (both[name][place] for name in ("input_ids", "attention_mask", "completion_mask"))
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
        batch[f"{side}_labels"] = torch.where(answer == 1, ids, -100)
    loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    loss.backward()
    said = {name: float(value) for name, value in metrics.items()}
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, said


def assert_gradients(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    names = {name: name.removeprefix("decoder.") for name in got}
    names = {name: f"{short}.weight" if short == "embed_tokens" else short for name, short in names.items()}
    assert {f"model.{name}" for name in names.values()} == want.keys()
    largest = max(float(grad.abs().max()) for grad in want.values())
    assert largest > 0
    for name, grad in got.items():
        assert float((grad - want[f"model.{names[name]}"]).abs().max()) < 1e-5 * largest, name


@pytest.mark.parametrize("loss", PREFERENCE_TERMS)
def test_every_loss_and_its_gradients_are_trls(loss: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Prevents a sign, a mean or a mask of our own in a loss that bears a published name."""
    made, smoothing = random_pairs(SHAPES), SMOOTHING.get(loss, 0.0)
    settings = {"beta": BETA} | ({"label_smoothing": smoothing} if smoothing else {})
    got, gradients = ours(folders, made, loss, settings)
    want, peers = theirs(folders, made, [loss], smoothing, tmp_path)
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert_gradients(gradients, peers)


def test_a_smoothed_sigmoid_is_trls_loss_of_aligned_pairs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """TRL's sigmoid takes no smoothing; its `aot` of one pair is the same loss with it."""
    made = random_pairs(SHAPES[:1])
    got, gradients = ours(folders, made, "sigmoid", {"beta": BETA, "label_smoothing": 0.2})
    want, peers = theirs(folders, made, ["aot"], 0.2, tmp_path)
    assert got == pytest.approx(want, rel=1e-5)
    assert_gradients(gradients, peers)


def test_a_batch_where_no_answer_has_gained_costs_log_2(folders: tuple[Path, Path]) -> None:
    """Prevents a reference that is not the model itself at its first step."""
    own, made = engine(), random_pairs(SHAPES)
    data = our_data(own, folders[1], made)
    model_id = own.create_model(folders[1], lora=None)
    assert own.forward_backward(model_id, data, loss_fn="dpo_sigmoid").loss_sum == pytest.approx(np.log(2), abs=1e-6)


def test_orpo_and_its_gradients_are_trls(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """TRL also imitates the prompt, and means over all tokens of a batch: with prompts of one token and better answers
    of one length that is the same."""
    made = random_pairs(((0, 6, 11), (0, 6, 2), (0, 6, 1)))
    got, gradients = ours(folders, made, "orpo", {"beta": BETA})
    want, peers, _ = their_orpo(folders[0], made, BETA, tmp_path)
    assert got == pytest.approx(want, rel=1e-5)
    assert_gradients(gradients, peers)


def test_orpo_s_odds_are_trls_behind_any_prompt(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """What beta weighs, by itself: the difference of two betas."""
    made = random_pairs(SHAPES)
    (high, ours_high), (low, ours_low) = (ours(folders, made, "orpo", {"beta": beta}) for beta in (1.0, 0.25))
    (want_high, theirs_high, _), (want_low, theirs_low, _) = (
        their_orpo(folders[0], made, beta, tmp_path) for beta in (1.0, 0.25)
    )
    assert high - low == pytest.approx(want_high - want_low, rel=1e-5)
    differences = (
        {name: grad - low[name] for name, grad in high.items()}
        for high, low in ((ours_high, ours_low), (theirs_high, theirs_low))
    )
    assert_gradients(*differences)
