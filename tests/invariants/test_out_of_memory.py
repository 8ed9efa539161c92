"""Memory that really runs out: a process with a limit on its address space trains as one without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses memory beyond RLIMIT_AS"),
]

WIDE = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 6,
        "max_position_embeddings": 8192}  # fmt: skip
WORKER = """
import json, re, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import OutOfMemoryError
from model_foundry.types import LoraConfig, SamplingParams
from tests.tiny_models import random_data

folder, out, spare, lengths, lora = json.loads(sys.argv[1])
own = TorchEngine(device="cpu", dtype="float32", num_threads=1)
model_id = own.create_model(Path(folder), lora=LoraConfig(r=4, lora_alpha=8.0) if lora else None)
optimizer = own._get(model_id).optimizer
optimizer.flat.add_(torch.randn(optimizer.flat.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
first = own.forward_backward(model_id, random_data((40, 60)))
before = optimizer.grad.clone()
if spare:
    used = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + spare * 2**20, resource.RLIM_INFINITY))
report = {"error": None, "pieces": 0, "loss": None}
try:
    output = own.forward_backward(model_id, random_data(lengths, seed=1))
    report |= {"pieces": output.num_micro_batches, "loss": output.loss_sum}
except OutOfMemoryError as error:
    report |= {"error": str(error), "as_before": torch.equal(optimizer.grad, before)}
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save_file({"gradient": optimizer.grad}, out)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of some 40 kB a token: a batch is large beside what the process holds anyway."""
    return write_tiny_model(tmp_path_factory.mktemp("wide") / "model", "llama", **WIDE)


@pytest.fixture
def run(wide: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], torch.Tensor]]:
    """Train on one batch in a process of its own with `spare` MiB beyond what it has; its report and gradient."""

    def call(spare: int, lengths: list[int], *, lora: bool = True) -> tuple[dict[str, Any], torch.Tensor]:
        out = tmp_path / "gradient.safetensors"
        argument = json.dumps([str(wide), str(out), spare, lengths, lora])
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", WORKER, argument], cwd=root, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1]), load_file(out)["gradient"]

    return call


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_batch_that_does_not_fit_is_computed_in_pieces(lora: bool, run: Callable[..., Any]) -> None:
    lengths = [500, 480, 510, 490, 505, 495, 470, 500]
    free, want = run(0, lengths, lora=lora)
    tight, got = run(60, lengths, lora=lora)
    assert (free["pieces"], free["error"]) == (1, None)
    assert tight["error"] is None
    assert tight["pieces"] > 1
    assert tight["loss"] == pytest.approx(free["loss"], rel=1e-5)
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_a_single_row_that_does_not_fit_is_an_error_with_the_gradients_as_they_were(run: Callable[..., Any]) -> None:
    report, _ = run(60, [6000])
    assert "single row of 6000 tokens" in report["error"]
    assert "data.max_length" in report["error"]
    assert report["as_before"]
