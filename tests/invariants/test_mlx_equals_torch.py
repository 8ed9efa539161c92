"""The engine on MLX computes what torch's does: losses, gradients, curves; from the same files; the same bits again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mlx.core", reason="MLX has no build for this machine")

from model_foundry.engine.mlx_arrays import to_mlx, to_torch
from model_foundry.engine.mlx_engine import MlxEngine
from model_foundry.engine.mlx_losses import TERMS, target_logprobs
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import ArchitectureMismatchError, CheckpointError, EngineError
from model_foundry.models.finder import resolve_model
from model_foundry.types import AdamParams, Datum, LoraConfig, SamplingParams
from tests.tiny_models import random_data

TinyFolder = Callable[[str], Path]
KINDS = (
    "llama", "llama-tied", "llama-biases", "llama-rope-llama3", "llama-rope-yarn-mscale", "mistral", "qwen2", "qwen3",
    "qwen3-sliding",
)  # fmt: skip
LENGTHS = (30, 7, 61, 1)
LORA = LoraConfig(r=4, lora_alpha=12.0)
PARAMS = AdamParams(learning_rate=3e-3, weight_decay=0.1, grad_clip_norm=1.0)
BOUND = 2e-5
"""Largest difference of log-probabilities, in nats, float32: as between the native decoder and transformers."""
CURVE_BOUND = 1e-4
"""Largest relative difference of the loss over twenty steps."""


def engines(**options: Any) -> tuple[TorchEngine, MlxEngine]:
    same: dict[str, Any] = {"device": "cpu", "dtype": "float32"} | options
    return TorchEngine(num_threads=1, **same), MlxEngine(**same)


def disturb(own: MlxEngine, model_id: str, *, seed: int = 3) -> None:
    """Values that a trained adapter could have: a fresh one changes nothing, so anything would equal anything."""
    generator = torch.Generator().manual_seed(seed)
    weights = own._get(model_id).decoder.weights
    for name, tensor in own.trained_tensors(model_id).items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = to_mlx(tensor * (1 + 0.2 * noise) if "magnitude" in name else tensor + 0.1 * noise)


def both(folder: Path, tmp_path: Path, lora: LoraConfig, **options: Any) -> tuple[TorchEngine, str, MlxEngine, str]:
    """The same disturbed adapter in both, carried over by its files."""
    theirs, ours = engines(**options)
    mine = ours.create_model(folder, lora=lora, seed=1)
    disturb(ours, mine)
    ours.save_weights(mine, tmp_path)
    return theirs, theirs.create_model(folder, lora=lora, adapter=tmp_path / "adapter", seed=1), ours, mine


def gradients(own: TorchEngine | MlxEngine, model_id: str) -> dict[str, np.ndarray]:
    """By the part of the name that both have."""
    if isinstance(own, MlxEngine):
        optimizer = own._get(model_id).optimizer
        assert optimizer is not None
        return {key(name): np.array(grad) for name, grad in optimizer.grad.items()}
    named = own.language_model(model_id).named_parameters()
    return {key(name): p.grad.numpy().copy() for name, p in named if p.grad is not None}


def key(name: str) -> str:
    for prefix in ("base_model.model.", "decoder.", "model."):
        name = name.removeprefix(prefix)
    return name.removesuffix(".weight").removesuffix("_vector")


def largest(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Relative to the largest number there is."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a) / max(float(np.abs(x).max()) for x in a.values())


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_are_torchs(kind: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """A rotation by pairs, a window one token off, a bias left out: each moves these numbers far beyond rounding."""
    theirs, his, ours, mine = both(tiny_folder(kind), tmp_path, LORA)
    data = random_data(LENGTHS)
    expected = theirs.forward_backward(his, data, logprobs="all")
    found = ours.forward_backward(mine, data, logprobs="all")
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    for mine_row, his_row in zip(found.logprobs, expected.logprobs, strict=True):
        assert np.abs(mine_row - his_row).max() < BOUND
    assert largest(gradients(theirs, his), gradients(ours, mine)) < 1e-4


@pytest.mark.parametrize(
    "lora", [LoraConfig(r=4, use_rslora=True), LoraConfig(r=4, use_dora=True), LoraConfig(r=4, lora_dropout=0.3),
             LoraConfig(r=4, use_dora=True, lora_dropout=0.3, target_modules=("q_proj", "down_proj"))]
)  # fmt: skip
def test_every_kind_of_adapter_is_torchs(lora: LoraConfig, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Dropout too: masks are counted, not drawn, so both engines drop the same numbers."""
    theirs, his, ours, mine = both(tiny_folder("llama"), tmp_path, lora)
    data = random_data(LENGTHS)
    expected, found = theirs.forward_backward(his, data), ours.forward_backward(mine, data)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert largest(gradients(theirs, his), gradients(ours, mine)) < 1e-4


def curve(own: TorchEngine | MlxEngine, model_id: str, *, steps: range = range(20)) -> list[float]:
    losses = []
    for step in steps:
        data = random_data((24, 17, 9), seed=step % 4)
        losses.append(own.forward_backward(model_id, data).loss_sum)
        own.optim_step(model_id, PARAMS)
    return losses


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True, "micro_batch_tokens": 30}], ids=["", "pieces"]
)
def test_twenty_steps_are_torchs(lora: LoraConfig | None, options: dict[str, Any], tiny_folder: TinyFolder) -> None:
    """Same first adapter, same batches, same AdamW, decay and clipping: the same curve."""
    theirs, ours = engines(**options)
    folder = tiny_folder("llama-tied")
    expected = curve(theirs, theirs.create_model(folder, lora=lora, seed=5))
    found = curve(ours, mine := ours.create_model(folder, lora=lora, seed=5))
    assert expected[-1] < 0.9 * expected[0]
    assert np.allclose(found, expected, rtol=CURVE_BOUND), np.max(np.abs(np.array(found) / expected - 1))
    assert ours.optim_step(mine, PARAMS).step == 21


@pytest.mark.parametrize("name", list(TERMS))
def test_losses_are_torchs(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """A clip on the wrong side, or a gradient through what is held constant, is a loss that only looks the same."""
    theirs, his, ours, mine = both(tiny_folder("qwen2"), tmp_path, LORA)
    rng = np.random.default_rng(1)
    data = []
    for datum in random_data((20, 9)):
        extra = {name: rng.normal(size=datum.num_tokens).astype(np.float32) for name in ("logprobs", "advantages")}
        extra["logprobs"] -= 5
        data.append(Datum(datum.tokens, {**datum.loss_inputs, **extra}))
    expected = theirs.forward_backward(his, data, loss_fn=name)
    found = ours.forward_backward(mine, data, loss_fn=name)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-4)
    assert largest(gradients(theirs, his), gradients(ours, mine)) < 1e-4


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-sliding"])
def test_answers_are_torchs_alone_and_in_company(kind: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Padding on the left must be seen by nobody: a short prompt beside a long one is answered as alone."""
    theirs, his, ours, mine = both(tiny_folder(kind), tmp_path, LORA)
    prompts = [datum.tokens for datum in random_data((23, 5, 11))]
    params = SamplingParams(max_tokens=20, temperature=0.7, seed=3)
    expected, found = theirs.sample(his, prompts, params), ours.sample(mine, prompts, params)
    alone = [ours.sample(mine, [prompt], params)[0] for prompt in prompts]
    for one, other, by_itself in zip(expected, found, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() == by_itself.tokens.tolist()
        assert np.abs(one.logprobs - other.logprobs).max() < BOUND


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_stopped_and_gone_on_is_the_same_to_the_last_bit(
    lora: LoraConfig | None, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """A moment, a counter or a step that is not stored shows in the next one."""
    folder = tiny_folder("qwen2")
    _, straight = engines()
    whole = straight.create_model(folder, lora=lora)
    losses = curve(straight, whole, steps=range(8))
    _, first = engines()
    stopped = first.create_model(folder, lora=lora)
    curve(first, stopped, steps=range(5))
    first.save_state(stopped, tmp_path)
    _, second = engines()
    resumed = second.create_model(folder, lora=lora)
    assert second.load_state(resumed, tmp_path, optimizer=True) == ()
    assert curve(second, resumed, steps=range(5, 8)) == losses[5:]
    for name, tensor in straight.trained_tensors(whole).items():
        assert torch.equal(tensor, second.trained_tensors(resumed)[name]), name
    for name, tensor in straight.state_tensors(whole).items():
        assert torch.equal(tensor, second.state_tensors(resumed)[name]), name


def test_weights_go_over_and_optimizer_state_stays(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Weights are portable between engines; moments summed in another order are refused by name."""
    theirs, ours = engines()
    mine = ours.create_model(tiny_folder("llama"), lora=LORA)
    curve(ours, mine, steps=range(2))
    ours.save_state(mine, tmp_path)
    his = theirs.create_model(tiny_folder("llama"), lora=LORA)
    with pytest.raises(CheckpointError, match="'mlx'"):
        theirs.load_state(his, tmp_path, optimizer=True)
    theirs.load_state(his, tmp_path, optimizer=False)
    for name, tensor in ours.trained_tensors(mine).items():
        assert torch.equal(tensor, theirs.trained_tensors(his)[name])


def test_a_whole_model_trained_here_opens_in_torch(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    theirs, ours = engines()
    mine = ours.create_model(tiny_folder("llama-tied"), lora=None)
    curve(ours, mine, steps=range(3))
    ours.save_weights(mine, tmp_path)
    his = theirs.create_model(tmp_path / "model", lora=None, trainable=False)
    data = random_data(LENGTHS)
    for one, other in zip(ours.forward(mine, data).logprobs, theirs.forward(his, data).logprobs, strict=True):
        assert np.allclose(one, other, atol=BOUND, equal_nan=True)


def test_what_was_saved_does_not_change_with_the_next_step(tiny_folder: TinyFolder) -> None:
    """A checkpoint is written while training goes on: its tensors must be those of its step."""
    _, ours = engines()
    mine = ours.create_model(tiny_folder("llama"), lora=LORA)
    curve(ours, mine, steps=range(1))
    taken = ours.trained_tensors(mine)
    kept = {name: tensor.clone() for name, tensor in taken.items()}
    curve(ours, mine, steps=range(1, 4))
    assert all(torch.equal(taken[name], kept[name]) for name in kept)
    assert not torch.equal(ours.trained_tensors(mine)[name := next(iter(kept))], kept[name])


def test_gradients_that_are_not_finite_skip_the_step(tiny_folder: TinyFolder) -> None:
    _, ours = engines()
    mine = ours.create_model(tiny_folder("llama"), lora=LORA)
    before = {name: tensor.clone() for name, tensor in ours.trained_tensors(mine).items()}
    datum = random_data((5,))[0]
    broken = Datum(datum.tokens, {**datum.loss_inputs, "weights": np.full(5, np.inf, dtype=np.float32)})
    ours.forward_backward(mine, [broken])
    assert ours.optim_step(mine, PARAMS).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.trained_tensors(mine).items())
    ours.forward_backward(mine, [datum])
    assert not ours.optim_step(mine, PARAMS).skipped


def test_arrays_keep_every_bit_on_the_way() -> None:
    """bfloat16 has no numpy type: read as integers of the wrong width it would come out scaled."""
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(7, 5).to(dtype)
        assert torch.equal(to_torch(to_mlx(tensor)), tensor)


@pytest.mark.parametrize("chunk_logits", [1, 970, 10**7])
def test_several_targets_in_pieces_of_any_size(chunk_logits: int) -> None:
    """Distillation has K targets a token; a piece that ends one token early drops the last one's loss."""
    generator = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(53, 8, generator=generator), torch.randn(97, 8, generator=generator)
    targets = torch.randint(0, 97, (53, 3), generator=generator)
    expected = torch.log_softmax(hidden @ head.T, dim=1).gather(1, targets)
    found = target_logprobs(to_mlx(hidden), to_mlx(head), to_mlx(targets.int()), chunk_logits=chunk_logits)
    assert found.shape == (53, 3)
    assert torch.allclose(to_torch(found), expected, atol=BOUND)


def test_what_is_not_computed_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    _, ours = engines()
    with pytest.raises(EngineError, match="mixtures of experts"):
        ours.create_model(tiny_folder("qwen3-moe"), lora=LORA)
    with pytest.raises(EngineError, match="muon"):
        ours.create_model(tiny_folder("llama"), lora=None, optimizer="muon")
    mine = ours.create_model(tiny_folder("llama"), lora=LORA)
    ours.save_weights(mine, tmp_path)
    with pytest.raises(ArchitectureMismatchError):
        ours.create_model(tiny_folder("qwen3"), lora=None, adapter=tmp_path / "adapter")


@pytest.mark.prove
def test_a_real_model_trains_as_in_torch() -> None:
    """What thirty layers and 49,152 words add up to; rounding alone, or the curves part."""
    folder = resolve_model("smollm2-135m-instruct").folder
    theirs, ours = engines()
    curves = []
    for own in (theirs, ours):
        model_id = own.create_model(folder, lora=LoraConfig(), seed=1)
        curves.append(curve(own, model_id, steps=range(4)))
    assert curves[0][-1] < curves[0][0]
    assert np.allclose(curves[1], curves[0], rtol=CURVE_BOUND), curves
