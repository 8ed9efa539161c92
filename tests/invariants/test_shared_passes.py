"""Several adapters in one pass: each the same bits as alone, and as over a base of its own but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_foundry.engine.shared_passes import PassRequest
from model_foundry.engine.steady_products import Sizes
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError
from model_foundry.types import AdamParams, Datum, LoraConfig

TinyFolder = Callable[[str], Path]
KINDS = {
    "float32": ("llama-tied", "float32", 1),
    "float32, two threads": ("qwen3-sliding", "float32", 2),
    "bfloat16": ("llama-biases", "bfloat16", 1),
    "bfloat16, two threads": ("llama-tied", "bfloat16", 2),
}
ADAPTERS = (
    LoraConfig(r=3, lora_alpha=32),
    LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")),
    LoraConfig(r=8, lora_alpha=32, target_modules=("gate_proj", "up_proj", "down_proj")),
    LoraConfig(r=1, lora_alpha=32, target_modules=("lm_head",)),
)
LOSSES: tuple[tuple[str, dict[str, float]], ...] = (
    ("cross_entropy", {}), ("ppo", {}), ("dro", {"beta": 0.1}), ("cross_entropy", {}),
)  # fmt: skip


def rows(seed: int, lengths: Sequence[int], loss: str) -> list[Datum]:
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = draw.integers(3, 250, length + 1)
        inputs: dict[str, np.ndarray] = {"target_tokens": ids[1:]}
        if loss == "cross_entropy":
            inputs["weights"] = draw.random(length, dtype=np.float32)
        else:
            inputs["logprobs"] = -draw.random(length, dtype=np.float32) * 6
            inputs["advantages"] = draw.standard_normal(length).astype(np.float32)
        made.append(Datum(ids[:-1].astype(np.int32), inputs))
    return made


@dataclass
class Tenants:
    """Adapters over one base, trained a little so that B is not zero."""

    engine: TorchEngine
    models: list[str]

    @classmethod
    def create(cls, folder: Path, dtype: str, *, shared: bool, threads: int = 1) -> Tenants:
        engine = TorchEngine(device="cpu", dtype=dtype, num_threads=threads)
        base = engine.create_model(folder, lora=None, trainable=False)
        if shared:
            engine.share_base(base)
        models = [engine.create_model(folder, lora=lora, seed=number) for number, lora in enumerate(ADAPTERS)]
        for model in models:
            shifted = torch.Generator().manual_seed(1)
            for name, tensor in sorted(engine.trained_tensors(model).items()):
                if "lora_B" in name:
                    tensor.copy_(torch.randn(tensor.shape, generator=shifted) * 0.05)
        return cls(engine, models)

    def requests(self, batches: Sequence[list[Datum]]) -> list[PassRequest]:
        return [
            PassRequest(model, batch, *LOSSES[number])
            for number, (model, batch) in enumerate(zip(self.models, batches, strict=True))
        ]

    def weights(self) -> list[dict[str, torch.Tensor]]:
        """After a step, which shows every bit of the gradients."""
        for model in self.models:
            self.engine.optim_step(model, AdamParams(learning_rate=1e-2))
        return [
            {name: tensor.clone() for name, tensor in self.engine.trained_tensors(model).items()}
            for model in self.models
        ]


def run_alone(tenants: Tenants, requests: Sequence[PassRequest]) -> list[Any]:
    return [
        tenants.engine.forward_backward(
            each.model_id, each.data, loss_fn=each.loss_fn, loss_config=each.loss_config, logprobs="all"
        )
        for each in requests
    ]


def same(one: Sequence[Any], other: Sequence[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.loss_sum == b.loss_sum
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert np.array_equal(x, y)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    yield KINDS[request.param]
    torch.set_num_threads(before)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_together_is_alone_to_the_last_bit(kind: Any, tiny_folder: TinyFolder, data: st.DataObject) -> None:
    """In any grouping and order, over two rounds: replay does alone what was done together."""
    folder, dtype, threads = kind
    lengths = data.draw(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=4, max_size=4))
    order = data.draw(st.permutations(range(4)))
    cut = data.draw(st.integers(1, 3))
    alone, together = (
        Tenants.create(tiny_folder(folder), dtype, shared=True, threads=threads) for _ in range(2)
    )  # fmt: skip
    for round_number in range(2):
        batches = [
            rows(10 * round_number + number, lengths[number], LOSSES[number][0]) for number in range(len(lengths))
        ]
        want = run_alone(alone, alone.requests(batches))
        requests = together.requests(batches)
        got: dict[int, Any] = {}
        for group in (order[:cut], order[cut:]):
            outs = together.engine.run_together([requests[number] for number in group], backward=True)
            got.update(zip(group, outs, strict=True))
        same(want, [got[number] for number in range(4)])
    for mine, theirs in zip(alone.weights(), together.weights(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_a_shared_base_computes_what_a_base_of_ones_own_does(tiny_folder: TinyFolder) -> None:
    """Passes and gradients within 1e-5: a factor that is missing in one of them would be seen."""
    folder = tiny_folder("llama-tied")
    plain, shared = (Tenants.create(folder, "float32", shared=way) for way in (False, True))
    batches = [rows(number, (9, 33, 20), LOSSES[number][0]) for number in range(4)]
    want = run_alone(plain, plain.requests(batches))
    got: Any = shared.engine.run_together(shared.requests(batches), backward=True)
    for a, b in zip(want, got, strict=True):
        assert a.loss_sum == pytest.approx(b.loss_sum, rel=1e-5)
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)
    for one, other in zip(plain.models, shared.models, strict=True):
        for name, parameter in gradients(plain.engine, one).items():
            torch.testing.assert_close(parameter, gradients(shared.engine, other)[name], atol=1e-5, rtol=1e-4)
    forward: Any = shared.engine.run_together(shared.requests(batches), backward=False)
    same(got, forward)


def gradients(engine: TorchEngine, model: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in engine.language_model(model).linears().items():
        for part, value in {"A": layer.lora_A, "B": layer.lora_B}.items():
            if value is not None:
                assert value.grad is not None
                found[f"{name}.{part}"] = value.grad
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(128, 128), (120, 120), (70, 58), (130, 140)])
def test_what_a_row_gets_does_not_depend_on_the_number_of_threads(
    lengths: tuple[int, ...], dtype: str, tiny_folder: TinyFolder
) -> None:
    """Batches that two threads share, and such that they do not."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            tenants = Tenants.create(tiny_folder("llama-tied"), dtype, shared=True, threads=threads)
            batches = [rows(number, lengths, loss) for number, (loss, _) in enumerate(LOSSES)]
            found.append(run_alone(tenants, tenants.requests(batches)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert all(map(np.array_equal, one.logprobs, other.logprobs))


@pytest.mark.slow
def test_nan_in_one_adapter_stays_there(tiny_folder: TinyFolder) -> None:
    sick, well = (Tenants.create(tiny_folder("llama-tied"), "float32", shared=True) for _ in range(2))
    for tensor in sick.engine.trained_tensors(sick.models[1]).values():
        tensor.fill_(float("nan"))
    batches = [rows(number, (9, 33), LOSSES[number][0]) for number in range(4)]
    got: Any = sick.engine.run_together(sick.requests(batches), backward=True)
    want = run_alone(well, well.requests(batches))
    others = (0, 2, 3)
    assert np.isnan(got[1].loss_sum)
    same([want[number] for number in others], [got[number] for number in others])
    mine, theirs = sick.weights(), well.weights()
    for number in others:
        assert all(torch.equal(mine[number][name], theirs[number][name]) for name in mine[number])


@pytest.mark.slow
@pytest.mark.parametrize("error", [MemoryError, TypeError])
def test_a_group_that_fails_is_tried_one_by_one(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Half-way through the backward pass some gradients are there twice; what was pending before must not be lost."""
    alone, together = (Tenants.create(tiny_folder("llama-tied"), "float32", shared=True) for _ in range(2))
    first = [rows(number, (9, 33), LOSSES[number][0]) for number in range(4)]
    second = [rows(9 + number, (5,), LOSSES[number][0]) for number in range(4)]
    want = [run_alone(alone, alone.requests(batches)) for batches in (first, second)]
    got = [together.engine.run_together(together.requests(first), backward=True)]
    assert together.engine._shared is not None
    base = together.engine._shared[1]
    real = base.run
    calls: list[int] = []

    def run(segments: Any, *, backward: bool) -> Any:
        calls.append(len(segments))
        out = real(segments, backward=backward)
        if len(segments) > 1:
            raise error
        return out

    monkeypatch.setattr(base, "run", run)
    got.append(together.engine.run_together(together.requests(second), backward=True))
    assert calls[0] == 4
    for mine, theirs in zip(want, got, strict=True):
        same(mine, theirs)
    for mine, theirs in zip(alone.weights(), together.weights(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_batch_that_is_refused_is_refused_alone(tiny_folder: TinyFolder) -> None:
    tenants = Tenants.create(tiny_folder("llama-tied"), "float32", shared=True)
    requests = tenants.requests([rows(number, (9,), LOSSES[number][0]) for number in range(4)])
    requests[2] = PassRequest(tenants.models[2], requests[2].data, "gspo", {})
    outs = tenants.engine.run_together(requests, backward=True)
    assert isinstance(outs[2], EngineError)
    assert [isinstance(out, EngineError) for out in outs] == [False, False, True, False]
    # Settings that nobody thought of, too.
    requests[2] = PassRequest(tenants.models[2], requests[2].data, "ppo", cast(Any, 5))
    outs = tenants.engine.run_together(requests, backward=True)
    assert [isinstance(out, Exception) for out in outs] == [False, False, True, False]


def test_rows_are_cut_where_a_number_of_them_cannot_be_relied_on() -> None:
    assert Sizes().parts(512, lambda size: True) == [512]
    assert Sizes().parts(512, lambda size: size <= 192) == [192, 192, 128]
    assert Sizes().parts(224, lambda size: size in (64, 96)) == [96, 96, 64]
    with pytest.raises(EngineError, match="depend on who else"):
        Sizes().parts(96, lambda size: False)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",), ("up_proj",)])
def test_an_adapter_on_a_part_of_what_reads_one_input_is_computed_alone(
    targets: tuple[str, ...], tiny_folder: TinyFolder
) -> None:
    """Prevents an adapter that is left out of the shared product because the first layer of the group has none."""
    found = []
    for shared in (True, False):
        engine = TorchEngine(device="cpu", dtype="float32", num_threads=1)
        base = engine.create_model(tiny_folder("llama-tied"), lora=None, trainable=False)
        if shared:
            engine.share_base(base)
        lora = LoraConfig(r=4, lora_alpha=32, target_modules=targets)
        model = engine.create_model(tiny_folder("llama-tied"), lora=lora, seed=1)
        data = rows(3, (20, 30), "cross_entropy")
        assert not engine.can_join(model, data)
        engine.forward_backward(model, data)
        norm = engine.optim_step(model, AdamParams(learning_rate=1e-2)).grad_norm
        found.append((norm, engine.forward(model, data).loss_sum))
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_packed_weights_are_not_unpacked_to_be_shared(tiny_folder: TinyFolder) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    engine = TorchEngine(device="cpu", dtype="float32", num_threads=1, quantization="nf4")
    with pytest.raises(EngineError, match="nf4 weights would be kept unpacked"):
        engine.share_base(engine.create_model(tiny_folder("llama-tied"), lora=None, trainable=False))
