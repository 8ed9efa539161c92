"""float16 with a loss scale: what overflows is skipped and mended, and the rest is what float32 learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model_foundry.engine.loss_scale import GROWTH_STEPS, LARGEST_SCALE, LEAST_SCALE, LossScale
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import CheckpointError
from model_foundry.types import AdamParams, LoraConfig, OptimStepOutput
from tests.tiny_models import random_data, write_tiny_model

STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)
LORA = LoraConfig(r=4, lora_alpha=8.0)
FITTING = 2.0**8
"""The weights of these rows are not divided by their number, so gradients overflow sooner than in a run."""


def engine_of(dtype: str) -> TorchEngine:
    return TorchEngine(device="cpu", dtype=dtype, num_threads=1)


def scale_of(engine: TorchEngine, model_id: str) -> LossScale:
    scale = engine._get(model_id).passes.loss_scale
    assert scale is not None
    return scale


def step(engine: TorchEngine, model_id: str, seed: int) -> tuple[float, OptimStepOutput]:
    losses = [engine.forward_backward(model_id, random_data((12, 30), seed=seed + n)).loss_sum for n in (0, 100)]
    return sum(losses), engine.optim_step(model_id, STEP)


def everything(engine: TorchEngine, model_id: str) -> dict[str, np.ndarray]:
    tensors = {**engine.trained_tensors(model_id), **engine.state_tensors(model_id)}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def test_it_backs_off_at_once_and_grows_after_many_good_steps() -> None:
    scale = LossScale()
    start = scale.value
    for _ in range(GROWTH_STEPS - 1):
        scale.after(skipped=False)
    assert scale.value == start
    scale.after(skipped=False)
    assert (scale.value, scale.good_steps) == (2 * start, 0)
    scale.after(skipped=False)
    scale.after(skipped=True)
    assert (scale.value, scale.good_steps) == (start, 0)


def test_it_stays_within_its_bounds() -> None:
    """Halved for ever it would become zero, and doubled for ever infinite."""
    scale = LossScale(LEAST_SCALE)
    scale.after(skipped=True)
    assert scale.value == LEAST_SCALE
    scale = LossScale(LARGEST_SCALE, GROWTH_STEPS - 1)
    scale.after(skipped=False)
    assert scale.value == LARGEST_SCALE


@pytest.mark.slow
@pytest.mark.parametrize("kind, lora", [("llama", None), ("llama", LORA), ("qwen3-moe", None)])
def test_an_overflow_skips_the_step_halves_the_scale_and_changes_nothing(
    kind: str, lora: LoraConfig | None, tmp_path: Path
) -> None:
    """Prevents weights ruined by infinite gradients, and a scale that never comes down to where training goes on."""
    engine = engine_of("float16")
    model_id = engine.create_model(write_tiny_model(tmp_path / "model", kind), lora=lora)
    scale_of(engine, model_id).value = FITTING
    assert not step(engine, model_id, 0)[1].skipped
    before, scale = everything(engine, model_id), scale_of(engine, model_id)
    scale.value = 2.0**30
    _, output = step(engine, model_id, 1)
    assert (output.skipped, output.step) == (True, 1)
    assert (output.loss_scale, output.next_loss_scale, scale.value) == (2.0**30, 2.0**29, 2.0**29)
    after = everything(engine, model_id)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    for number in range(2, 30):
        _, output = step(engine, model_id, number)
        if not output.skipped:
            break
    assert not output.skipped
    assert output.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-tied", "moe-balanced"])
def test_it_learns_what_float32_learns(kind: str, tmp_path: Path) -> None:
    """Prevents a scale that is not divided out, of the head, of the layers or of the routers' balance."""
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if kind == "moe-balanced" else {}
    folder = write_tiny_model(tmp_path / "model", "qwen3-moe" if changes else kind, **changes)
    records = {}
    for dtype in ("float32", "float16"):
        engine = engine_of(dtype)
        model_id = engine.create_model(folder, lora=None)
        if dtype == "float16":
            scale_of(engine, model_id).value = FITTING
        # Few steps: sooner or later an expert is chosen by the last bit.
        records[dtype] = [step(engine, model_id, 0) for _ in range(4)]
    wide, half = records["float32"], records["float16"]
    assert not any(output.skipped for _, output in half)
    assert [loss for loss, _ in half] == pytest.approx([loss for loss, _ in wide], rel=1e-2)
    assert [each.grad_norm for _, each in half] == pytest.approx([each.grad_norm for _, each in wide], rel=5e-2)
    assert half[-1][0] < 0.9 * half[0][0]


def test_small_gradients_survive_by_the_scale(tmp_path: Path) -> None:
    """Without a scale a batch of many tokens, each with a small weight, would train nothing in float16."""
    folder = write_tiny_model(tmp_path / "model", "llama")
    data = random_data((30, 30), seed=3)
    for datum in data:
        datum.loss_inputs["weights"][:] = 1e-8
    norms = {}
    for name, dtype, scale in (("wide", "float32", None), ("lifted", "float16", 2.0**16), ("bare", "float16", 1.0)):
        engine = engine_of(dtype)
        model_id = engine.create_model(folder, lora=None)
        if scale is not None:
            scale_of(engine, model_id).value = scale
        engine.forward_backward(model_id, data)
        norms[name] = engine.optim_step(model_id, STEP).grad_norm
    assert norms["lifted"] == pytest.approx(norms["wide"], rel=0.02)
    assert abs(norms["bare"] / norms["wide"] - 1) > 0.2


def test_a_saved_state_goes_on_with_its_scale_bit_by_bit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A scale that starts afresh on resume rounds otherwise, and grows at other steps."""
    engine = engine_of("float16")
    model_id = engine.create_model(tiny_folder("llama"), lora=None)
    scale_of(engine, model_id).value = 4 * FITTING
    scale_of(engine, model_id).good_steps = GROWTH_STEPS - 3
    for number in range(5):
        step(engine, model_id, number)
    place = tmp_path / "saved"
    place.mkdir()
    engine.save_state(model_id, place)
    other = engine_of("float16")
    again = other.create_model(tiny_folder("llama"), lora=None, seed=7)
    assert other.load_state(again, place, optimizer=True) == ()
    assert scale_of(other, again) == scale_of(engine, model_id) != LossScale()
    for number in range(5, 8):
        assert repr(step(engine, model_id, number)) == repr(step(other, again, number))  # a NaN equals itself
    mine, theirs = everything(engine, model_id), everything(other, again)
    for name, tensor in mine.items():
        np.testing.assert_array_equal(theirs[name], tensor, err_msg=name)
    other.load_state(again, place, optimizer=False)
    assert scale_of(other, again) == LossScale()


@pytest.mark.parametrize("facts", [{}, {"value": 0.0, "good_steps": 1}, {"value": "much", "good_steps": 1}])
def test_a_damaged_scale_is_refused(facts: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="the loss scale is"):
        LossScale.of_facts(facts, "there")


def test_other_types_have_no_scale(tiny_folder: Callable[[str], Path]) -> None:
    engine = engine_of("bfloat16")
    model_id = engine.create_model(tiny_folder("llama"), lora=LORA)
    assert step(engine, model_id, 0)[1].loss_scale is None
    assert engine.dtype == torch.bfloat16
