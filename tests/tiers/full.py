"""Tier 3: from nothing to a model that other programs run: facts, an adapter on MLX or torch, GGUF, Ollama, answers."""

from __future__ import annotations

import json
import platform
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.tiers.real_model import cache, model_name, train, write_config, write_facts
from tests.tiers.record import Tier, ToolMissing, foundry, require, said

LIMIT_SECONDS = 900
BLAS = "/usr/lib/*/openblas-pthread/libblas.so.3"
CRITERIA = {"loss_fall": 0.05, "answers_improved": None, "memory_saving": None, "parameters_changed": 0.80}


def run_mlx(tier: Tier, *, short: bool) -> None:
    """An adapter trained and asked on MLX, then asked by torch."""
    if not _begin(tier, num_questions=6 if short else 16):
        return
    if tier.step("MLX", _find_mlx) is None:
        return
    env = tier.step("a fast BLAS for MLX", _find_blas) or {}
    # In one type, for both engines are asked: in bfloat16 a near tie may go either way.
    config = _config(tier, max_steps=6 if short else 16, batch_size=4, dtype="float32")
    if tier.step("train on MLX", partial(train, config, "engine=mlx", env=env)) is None:
        return
    run = _finish(tier, "mlx")
    _answers(tier, run, "mlx", env=env)
    _answers(tier, run, "torch", env={})


def run_ollama(tier: Tier, *, short: bool) -> None:
    """An adapter trained on torch, as GGUF through llama.cpp, and as a model of Ollama's."""
    if not _begin(tier, num_questions=6 if short else 16):
        return
    config = _config(tier, max_steps=8 if short else 24, batch_size=8)
    if tier.step("train on torch", partial(train, config, "engine=torch")) is None:
        return
    run = _finish(tier, "torch")
    tier.step("llama.cpp", _find_llama_cpp)
    quants = "f16" if short else "f16,q8_0"
    gguf = tier.step(f"GGUF: {quants}", partial(_export, run, "gguf", "--quant", quants))
    _take_certificate(tier, "gguf", gguf)
    ollama = tier.step("a folder for Ollama", partial(_export, run, "ollama"))
    _take_certificate(tier, "ollama", ollama)
    tier.step("register in Ollama and ask", partial(_register, run))
    _answers(tier, run, "torch", env={})


def _begin(tier: Tier, *, num_questions: int) -> bool:
    model = tier.model = model_name("FT_E2E_MODEL_ID", "FT_TEST_MODEL")
    facts = partial(write_facts, tier.folder, num_questions=num_questions)
    return bool(tier.step(f"cache {model}", partial(cache, model)) and tier.step("facts", facts))


def _config(tier: Tier, *, max_steps: int, batch_size: int, dtype: str = "auto") -> Path:
    model = model_name("FT_E2E_MODEL_ID", "FT_TEST_MODEL")
    return write_config(tier.folder, model, criteria=CRITERIA, max_steps=max_steps, batch_size=batch_size, dtype=dtype)


def _finish(tier: Tier, engine: str) -> Path:
    """The run, which counts if this engine trained it."""
    run = tier.folder / "run"
    trained_by = json.loads((run / "run.json").read_text())["engine"]
    tier.check("engine", trained_by == engine, value=trained_by, bound=engine)
    tier.num_runs += 1
    tier.take_checks(run, required=("loss_fall", "parameters_changed", "artefacts_load"))
    return run


def _answers(tier: Tier, run: Path, engine: str, *, env: dict[str, str]) -> None:
    """The answers of a model that another process loads; the run itself has heard most of them before."""
    asked = tier.step(
        f"ask it again by {engine}", partial(said, "evaluate", run, f"engine={engine}", "against=none", env=env)
    )
    if asked is None:
        return
    told = {case["prompt"]: case["after"] for case in _report(run)["evaluation"]["cases"]}
    rows = asked["suites"]["questions"]["after"]["rows"]
    same = sum(told[row["prompt"]] == row["answers"][0]["text"] for row in rows) / len(rows)
    tier.check(f"answers_as_in_the_report_{engine}", same >= 0.8, value=round(same, 3), bound=">= 0.8")


def _report(run: Path) -> Any:
    return json.loads((run / "report.json").read_text())


def _export(run: Path, kind: str, *arguments: str) -> Any:
    return said("export", run, "--to", kind, "--out", run.parent / kind, *arguments)


def _take_certificate(tier: Tier, kind: str, certificate: Any) -> None:
    for check in [] if certificate is None else certificate["checks"]:
        tier.check(f"{kind}: {check['name']}", check["passed"], value=check["value"], bound=check["bound"])


def _register(run: Path) -> None:
    if shutil.which("ollama") is None:
        raise ToolMissing("no `ollama` on the PATH; see https://ollama.com/download")
    name = "model-foundry-e2e"
    foundry("export", run, "--to", "ollama", "--out", run.parent / "ollama-registered", "--register", name)


def _find_mlx() -> bool:
    if find_spec("mlx") is None or find_spec("mlx_lm") is None:
        raise ToolMissing("not installed; pip install 'model-foundry[mlx]'")
    return True


def _find_blas() -> dict[str, str]:
    """What MLX's Linux build is told to compute products with."""
    if platform.system() != "Linux":
        return {}
    found = sorted(Path("/").glob(BLAS.removeprefix("/")))
    if not found:
        raise ToolMissing("MLX's own on Linux is slow; apt-get install libopenblas0-pthread")
    return {"LD_PRELOAD": str(found[0])}


def _find_llama_cpp() -> None:
    if find_spec("xllamacpp") is None:
        raise ToolMissing("not installed; pip install 'model-foundry[gguf]'. GGUF files are written and not run")
    require(find_spec("gguf") is not None, "gguf is not installed, and no GGUF is written without it")
