"""The decoder's layers compiled one by one by torch.compile, for training passes alone.

Shapes are static: a kernel for each number of tokens, so that what computes a step does not depend on the steps before
it, and a resumed run has the same bits. What cannot be compiled so is refused, not left out. Attention is gone around:
it works on blocks that rows decide. It decides nothing about when compiling pays.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Any, cast

import torch

from model_foundry.errors import ModelError
from model_foundry.models.attention import attend_packed
from model_foundry.models.decoder import Decoder

MAX_GRAPHS = 1024
"""Kernels for as many (layer, number of tokens) pairs; one more is an error, where torch would quietly not compile."""


def compile_obstacle(decoder: Decoder, device: torch.device) -> tuple[str, str] | None:
    """Why its layers cannot be compiled on this device, and what to do about it; None where they can."""
    off = "Set training.compile=off."
    if decoder.config.experts is not None:
        return "every number of tokens that an expert is given would be compiled anew", off
    if decoder.drops:
        return "dropout draws by step and row, and every step would be compiled anew", off
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton, which is not installed", f"Install triton, or: {off}"
    elif device.type != "cpu":
        return f"torch.compile is not tried on {device.type} here", off
    elif shutil.which(compiler := _cpp_compiler()) is None:
        hint = f"Install one (apt install g++), name another in CXX, or: {off}"
        return f"torch.compile needs a C++ compiler, and {compiler} is not found", hint
    return None


def _cpp_compiler() -> str:
    """As torch chooses it."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compile_layers(decoder: Decoder, *, on: bool) -> None:
    """Training passes through compiled layers, or through the layers as they are. Compiles when they are first met.

    Raises:
        ModelError: they cannot be compiled.
    """
    decoder.compiled_layers, decoder.attend = [], attend_packed
    if not on:
        return
    obstacle = compile_obstacle(decoder, decoder.embed_tokens.device)
    if obstacle is not None:
        raise ModelError(obstacle[0], where="training.compile", hint=obstacle[1])
    import torch._dynamo as dynamo  # a second, for those alone who want it

    settings = cast(Any, dynamo.config)
    settings.recompile_limit = settings.accumulated_recompile_limit = MAX_GRAPHS
    settings.fail_on_recompile_limit_hit = True
    decoder.attend = cast(Any, torch.compiler.disable(attend_packed))
    decoder.compiled_layers = [torch.compile(layer, dynamic=False) for layer in decoder.layers]
