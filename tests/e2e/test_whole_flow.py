"""Code in two languages becomes questions, a vocabulary, an adapter on experts, a merged model, a GGUF and a Modelfile.

Every step is the command line's, on what the step before it left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_foundry.checkpoint.manifest import verify_manifest
from model_foundry.export.go_template import conversations, find_go, run_go, wanted_prompt
from model_foundry.export.modelfile import NAME, read_modelfile
from model_foundry.models.folder import copy_tokenizer
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from tests.e2e.test_generate import WallClock
from tests.message_batches_server import KEY, MODEL, Server
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import NO_CRITERIA, environment, foundry, foundry_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CODE = Path(__file__).parents[2] / "examples" / "code"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(clock=WallClock(), batch_seconds=0.1) as running:
        yield running


def generated(folder: Path, language: str, server: Server) -> Path:
    """Rows of one language, through the batch API of the loopback server."""
    rows = folder / f"{language}.jsonl"
    config = {
        "corpus": {"language": language, "roots": [str(CODE / language)]},
        "prompt": {"voices": {"developer": "precisely"}},
        "generation": {
            "model": MODEL, "max_tokens": 400, "effort": "default", "batch_requests": 50, "poll_seconds": 0.05,
            "settle_seconds": 0.5, "timeout_seconds": 20, "max_wait_seconds": 0.2,
        },
        "output": {"file": str(rows)}, "max_cost": 10,
    }  # fmt: skip
    path = folder / f"{language}.yaml"
    path.write_text(yaml.safe_dump(config))
    env = environment(ANTHROPIC_API_KEY=KEY, ANTHROPIC_BASE_URL=server.url)
    done = foundry("generate", path, env=env)
    assert done.returncode == 0, done.stderr
    return rows


def said(*arguments: object) -> Any:
    done = foundry_here(*arguments, "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def test_code_becomes_a_model_that_llama_cpp_and_ollama_take(tmp_path: Path, server: Server) -> None:
    rows = [generated(tmp_path, language, server) for language in ("lua", "gdscript")]
    assert server.paid_twice() == []
    train = tmp_path / "train.jsonl"
    train.write_text("".join(path.read_text(encoding="utf-8") for path in rows), encoding="utf-8")
    assert len(train.read_text(encoding="utf-8").splitlines()) == len(server.bills) > 20

    vocabulary = tmp_path / "vocabulary"
    said("tokenizer", "train", train, "--vocab-size", 512, "--template", "chatml", "--out", vocabulary)
    tokenizer = Tokenizer.load(vocabulary)
    base = write_tiny_model(
        tmp_path / "base", "qwen3-moe", vocab_size=tokenizer.vocab_size, hidden_size=64, moe_intermediate_size=32,
        eos_token_id=tokenizer.eos_id, bos_token_id=None,
    )  # fmt: skip
    copy_tokenizer(vocabulary, base)

    config = {
        "run_dir": str(tmp_path / "run"), "model": {"name": str(base), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8}, "data": {"train_file": str(train), "max_length": 384},
        "training": {"max_steps": 6, "learning_rate": 0.02, "num_threads": 1, "batch_size": 4, "save_steps": 3},
        "criteria": dict(NO_CRITERIA),
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    done = foundry_here("train", tmp_path / "train.yaml")
    assert done.returncode == 0, done.stderr[-3000:]

    merged = said("export", tmp_path / "run", "--to", "merged")
    assert any(".experts." in name for name in read_shapes(Path(merged["folder"])))
    again = foundry_here("export", merged["folder"], "--to", "gguf", "--out", tmp_path / "from-merged")
    assert again.returncode == 0, again.stderr  # a merged folder is a model like any other
    ollama = said("export", tmp_path / "run" / "checkpoints" / "final", "--to", "ollama", "--quant", "f16")
    names = {check["name"] for check in ollama["checks"] if check["passed"]}
    assert {"llama.cpp: logits", "llama.cpp: adapter's effect", "llama.cpp: stops", "Modelfile: template"} <= names

    folder = Path(ollama["folder"])
    assert folder.parent == tmp_path / "run" / "exports"
    verify_manifest(folder)
    modelfile, renderer, go = read_modelfile(folder / NAME), Renderer(tokenizer), find_go()
    assert go is not None
    talks = conversations(renderer)
    assert run_go(modelfile.template, talks, go=go) == [
        wanted_prompt(renderer, talk, without_bos=False) for talk in talks
    ]
    assert modelfile.stops == ("<|im_end|>", "<|endoftext|>")
    assert (folder / modelfile.source).read_bytes()[:4] == b"GGUF"


def read_shapes(folder: Path) -> list[str]:
    from model_foundry.models.folder import stored_tensors

    return list(stored_tensors(folder))
