"""Several processes are one: the same curve, the same files, whoever wrote them. Real torchrun, real FSDP, on CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.several_ranks import CASES, STATES
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def torchrun(size: int, *arguments: object) -> list[str]:
    """The command that starts a module on so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*launcher, "-m", *map(str, arguments)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "llama-tied", "qwen2"):
        write_tiny_model(folder / kind, kind)
    write_tiny_model(folder / "qwen3-dropout", "qwen3", dropout=0.1, attention_dropout=0.1)
    write_tiny_model(folder / "moe-balanced", "qwen3-moe", output_router_logits=True, router_aux_loss_coef=0.05)
    (folder / "gpt2").mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.prove)])
def measured(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("results") / "results.json"
    command = torchrun(request.param, "tests.several_ranks", models, results)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {"size": request.param, **json.loads(results.read_text())}


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_one_process(measured: dict[str, Any], case: str) -> None:
    """Prevents gradients averaged instead of summed, a norm of one rank's rows, masks that depend on the rank, experts
    balanced rank by rank, rows counted twice, and validation on weights that are a step old."""
    found, is_half = measured["compared"][case], "float16" in case
    tight = 3e-2 if is_half else 3e-3 if "muon" in case else 1e-5  # Muon's iterations are in bfloat16
    for alone, together in zip(found["alone"], found["together"], strict=True):
        assert together == pytest.approx(alone, rel=tight, abs=tight)
    assert found["same start"]
    assert found["names"][0] == found["names"][1]
    assert found["apart"] < (0.02 if is_half else 1e-2 if "muon" in case else 2e-5)
    if not is_half:
        assert found["answers"][0] == found["answers"][1]


def test_the_experts_were_balanced(measured: dict[str, Any]) -> None:
    """The comparison above would hold as well if the loss were left out on both sides."""
    assert measured["compared"]["experts"]["together"][0]["router_loss"] > 0.01


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share(measured: dict[str, Any], case: str) -> None:
    """Prevents a model that is divided in name, with every weight on every rank, or embedding and head on each."""
    for part, share in measured["compared"][case]["held"].items():
        assert 0 < share < 1 / measured["size"] + 0.08, part  # tiny tensors are not cut evenly


def test_a_state_is_read_by_any_number_of_processes(measured: dict[str, Any]) -> None:
    """Prevents a checkpoint that only as many processes as wrote it can read, or only by this engine."""
    assert len(measured["states"]) == 3 * len(STATES)
    for name, found in measured["states"].items():
        tight = 3e-3 if "muon" in name else 1e-5  # its iterations are in bfloat16
        assert found["same bits"], name
        for went_on, resumed in zip(found["went on"], found["resumed"], strict=True):
            assert resumed == pytest.approx(went_on, rel=tight, abs=tight), name
        changed = [warning for warning in found["warnings"] if warning.startswith("world_size")]
        assert len(changed) == (0 if name.endswith("n to n") else 1), name
        weights = "adapter/adapter_model.safetensors" if "lora" in name else "model/model.safetensors"
        assert {weights, "state/engine.json", "state/optimizer.safetensors"} <= set(found["files"])


def test_what_several_processes_cannot_do_is_refused_and_the_rest_goes_on(measured: dict[str, Any]) -> None:
    """Prevents an option that is silently ignored, and ranks that wait for ever after one of them refused."""
    said = measured["refusals"]
    for name, words in {
        "gpt2": "native decoder alone",
        "nf4": "model.quantization: nf4",
        "transformers": "model.implementation",
        "muon": "muon makes the updates of whole matrices orthogonal",
        "no such adapter": "adapter_config.json",
        "no such checkpoint": "holds no optimizer state",
        "a token outside": "token 9999",
        "a ruinous step": "learning_rate is nan",
    }.items():
        assert words in said[name], name
    assert said["still there"] > 0


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(measured: dict[str, Any]) -> None:
    """Prevents ranks that step apart, each by its own judgement."""
    assert measured["skips"] == {"skipped": True, "step": 0, "unchanged": True, "next step": 2}
