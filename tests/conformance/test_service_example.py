"""examples/service: through the service in process, through one behind a URL, and `foundry train` itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_foundry import ServiceClient
from model_foundry.recipes.training_run import run_training
from model_foundry.run.metrics import read_metrics
from model_foundry.service.importing import service_shape
from model_foundry.types import LoraConfig
from tests.service_rig import KEY, Service, files_of
from tests.tiny_runs import foundry, tiny_config, tiny_pairs_config, write_project

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OPTIONS = {"num_threads": 1, "dtype": "float32"}
SHAPE: dict[str, Any] = {"lora__r": 4, "lora__lora_alpha": 32}


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_example", ROOT / "examples" / "service" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(state: Path, path: str) -> dict[str, bytes]:
    return files_of(state / "runs" / path.removeprefix("tinker://").replace(":", "-"))


def test_the_recipe_and_the_service_give_the_same_bits(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """What the client sends, or the service makes of it, that is not what the recipe's own engine gets."""
    base = tiny_folder("llama-tied")
    config = tiny_config(tmp_path, model=base, **SHAPE)
    with ServiceClient(base_model=str(base), state_dir=tmp_path / "here", options=OPTIONS) as client:
        here, path = example("sft").train(client, config)
    service = Service(base, tmp_path / "there", "dtype=float32")
    with service, ServiceClient(base_url=service.url, api_key=KEY) as client:
        there, other_path = example("sft").train(client, config)
    assert here == there
    assert stored(tmp_path / "here", path) == stored(tmp_path / "there", other_path)
    # Passes that may be shared are other products than the recipe's, which differ in the last bits; without, none.
    alone = OPTIONS | {"co_batching": "off"}
    with ServiceClient(base_model=str(base), state_dir=tmp_path / "alone", options=alone) as client:
        unshared, _ = example("sft").train(client, config)
    done = foundry("train", write_project(tmp_path, model=base, **SHAPE))
    assert done.returncode == 0, done.stderr
    recipe = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert unshared == recipe
    assert here == pytest.approx(recipe, rel=1e-5)


def test_the_example_of_preferences_runs_as_it_comes() -> None:
    """A default configuration that names a run's adapter, or adapters of a shape that the service refuses."""
    config = example("dpo").chosen_config(None, ())
    assert config.model.name == "smollm2-135m-instruct"
    service_shape(LoraConfig(r=config.lora.r, lora_alpha=config.lora.lora_alpha), where="lora")


def test_preferences_through_the_service_are_the_recipes(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A pair's answers that change places, a weight lost on the way, or a reference that moves."""
    base = tiny_folder("llama-tied")
    config = tiny_pairs_config(
        tmp_path,
        model=base,
        dpo={"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.1},
        training__max_steps=4,
        **SHAPE,
    )
    with ServiceClient(base_model=str(base), state_dir=tmp_path / "here", options=OPTIONS) as client:
        here, path = example("dpo").train(client, config)
    service = Service(base, tmp_path / "there", "dtype=float32")
    with service, ServiceClient(base_url=service.url, api_key=KEY) as client:
        there, other_path = example("dpo").train(client, config)
    assert here == there
    assert stored(tmp_path / "here", path) == stored(tmp_path / "there", other_path)
    run_training(config)
    recipe = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert len(here) == 4
    assert here == pytest.approx(recipe, rel=1e-4)
