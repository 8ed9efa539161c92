"""Which engine is taken: what is there decides, unless it is said; what cannot be had is refused, not replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_foundry.engine.choose import Machine, choose_engine, mlx_obstacle
from model_foundry.errors import MissingExtraError, UsageError

TinyFolder = Callable[[str], Path]
MAC, MAC_BARE = Machine(is_apple_silicon=True, has_mlx=True), Machine(is_apple_silicon=True, has_mlx=False)
LINUX, LINUX_BARE = Machine(is_apple_silicon=False, has_mlx=True), Machine(is_apple_silicon=False, has_mlx=False)
CHOSEN = {
    "mac": (MAC, "mlx", "mlx"),
    "mac without mlx": (MAC_BARE, "torch", None),
    "linux": (LINUX, "torch", "mlx"),
    "linux without mlx": (LINUX_BARE, "torch", None),
}


@pytest.mark.parametrize(("machine", "by_itself", "asked"), CHOSEN.values(), ids=CHOSEN.keys())
def test_what_is_there_decides(machine: Machine, by_itself: str, asked: str | None, tiny_folder: TinyFolder) -> None:
    """On Linux MLX is many times slower than torch: an installed package alone must not slow every run down."""
    folder = tiny_folder("llama")
    choice = choose_engine("auto", folder=folder, options={}, machine=machine)
    assert choice.name == by_itself
    assert choice.why
    assert choose_engine("torch", folder=folder, options={}, machine=machine).name == "torch"
    if asked is not None:
        assert choose_engine("mlx", folder=folder, options={}, machine=machine).name == asked
        return
    with pytest.raises(MissingExtraError, match=r"pip install 'model-foundry\[mlx\]'"):
        choose_engine("mlx", folder=folder, options={}, machine=machine)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "model.quantization=nf4": ("llama", {"quantization": "nf4"}, {}),
    "model.attention=sdpa": ("llama", {"attention": "sdpa"}, {}),
    "model.dtype=float16": ("llama", {"dtype": "float16"}, {}),
    "model.implementation=transformers": ("llama", {"implementation": "transformers"}, {}),
    "model.device=cuda": ("llama", {"device": "cuda"}, {}),
    "training.num_threads": ("llama", {"num_threads": 2}, {}),
    "training.optimizer=muon": ("llama", {}, {"optimizer": "muon"}),
    "several processes": ("llama", {}, {"num_processes": 2}),
    "mixtures of experts": ("qwen3-moe", {}, {}),
    "decoder for this model": ("gpt2", {}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_mlx_lacks_is_refused_where_it_was_asked_for_and_said_where_not(
    what: str, tiny_folder: TinyFolder
) -> None:
    """An option that one engine ignores makes two runs of one configuration different things."""
    kind, options, rest = REFUSED[what]
    folder = tiny_folder(kind)
    with pytest.raises(UsageError, match=what):
        choose_engine("mlx", folder=folder, options=options, machine=MAC, **rest)
    choice = choose_engine("auto", folder=folder, options=options, machine=MAC, **rest)
    assert choice.name == "torch"
    assert what in choice.why


def test_options_of_every_engine_are_no_obstacle(tiny_folder: TinyFolder) -> None:
    options = {"device": "cpu", "dtype": "float32", "attention": "auto", "quantization": "none", "num_threads": None,
               "implementation": "native", "micro_batch_tokens": 64, "gradient_checkpointing": True}  # fmt: skip
    assert mlx_obstacle(tiny_folder("llama"), options) is None
