"""llama.cpp behind the same routes; vLLM and MLX started in their own words; models that only transformers runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_foundry.config.serve import ServeConfig
from model_foundry.errors import FoundryError, ModelError, UsageError
from model_foundry.export.hand_over import export
from model_foundry.models import llama_cpp
from model_foundry.server.delegated import command_for
from model_foundry.server.kept_options import KEPT
from model_foundry.server.opening import choose_backend, open_model
from model_foundry.server.security import add_key
from tests.serving import Served, serving
from tests.tiny_exports import make_subject
from tests.tiny_runs import assert_one_paragraph, foundry_here

ASK = {"prompt": "Name a colour.", "max_tokens": 10}
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="xllamacpp is not installed")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A float32 GGUF and the adapter that it was merged from. The cache of converted tokenizers is the test's own."""
    folder = tmp_path_factory.mktemp("gguf")
    subject = make_subject(folder)
    export(subject, folder / "out", kind="gguf", quants=["f32"])
    before = os.environ.get("FOUNDRY_HOME")
    os.environ["FOUNDRY_HOME"] = str(folder / "home")
    yield next((folder / "out").glob("*.gguf")), folder / "final" / "adapter"
    if before is None:
        del os.environ["FOUNDRY_HOME"]
    else:
        os.environ["FOUNDRY_HOME"] = before


@pytest.fixture(scope="module")
def by_llama_cpp(gguf: tuple[Path, Path]) -> Iterator[Served]:
    with serving(gguf[0], batch__max_sequences=2, batch__max_cache_tokens=2048) as each:
        yield each


@needs_llama_cpp
@pytest.mark.slow
def test_a_gguf_answers_as_the_adapter_that_it_was_made_from(by_llama_cpp: Served, gguf: tuple[Path, Path]) -> None:
    assert by_llama_cpp.stats()["backend"] == "llama.cpp"
    prompts = ["Name a colour.", "naïve <|im_end|> café", "What is 3 + 4?"]
    theirs = [by_llama_cpp.post("/generate", ASK | {"prompt": prompt}).json() for prompt in prompts]
    with serving(gguf[1], served_name="tuned") as torch_served:
        ours = [torch_served.post("/generate", ASK | {"prompt": prompt}).json() for prompt in prompts]
    assert [each["text"] for each in theirs] == [each["text"] for each in ours]
    for one, other in zip(theirs, ours, strict=True):
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_keeps_no_prompts_where_several_ask(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    """Its slots are anybody's: what one key had asked was there for another, in a shorter time and a larger count."""
    names = ("ann", "ben")
    keys = [add_key(tmp_path / "keys.json", name, rate=None, burst=None, admin=False) for name in names]
    secret = {"prompt": "The merger will be announced on Monday. " * 6, "max_tokens": 1}
    with serving(gguf[0], access__keys_file=tmp_path / "keys.json", batch__max_sequences=1) as served:
        answers = [served.post("/generate", secret, key=key).json() for key in (*keys[:1], *keys[:1], *keys)]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[1] > 0, "one's own is found while nobody else asks"
    assert (cached[0], *cached[3:]) == (0, 0)


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_streams_stops_and_reports_probabilities(by_llama_cpp: Served) -> None:
    with openai.OpenAI(base_url=f"{by_llama_cpp.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        ask: dict[str, Any] = {
            "model": model, "messages": [{"role": "user", "content": "Go on"}], "max_tokens": 24, "temperature": 0,
        }  # fmt: skip
        whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        text = whole.choices[0].message.content or ""
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text
        assert whole.usage is not None
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 24
        assert whole.choices[0].logprobs is not None
        assert all(len(each.top_logprobs) == 2 for each in whole.choices[0].logprobs.content or [])
        stop = text[5:8]
        assert client.chat.completions.create(**ask, stop=stop).choices[0].message.content == text[: text.index(stop)]
        hot = ask | {"temperature": 1.5, "seed": 5}
        texts = [client.chat.completions.create(**hot).choices[0].message.content for _ in range(2)]
        assert texts[0] == texts[1]
    by_llama_cpp.wait_until_idle()


@needs_llama_cpp
@pytest.mark.slow
def test_a_gguf_cut_in_half_is_told(gguf: tuple[Path, Path], tmp_path: Path) -> None:
    whole = gguf[0].read_bytes()
    half = tmp_path / "half.gguf"
    half.write_bytes(whole[: len(whole) // 2])
    assert_one_paragraph(foundry_here("serve", half, "port=0"), code=2, words=("half.gguf",))
    (tmp_path / "none.gguf").write_bytes(b"")
    assert_one_paragraph(foundry_here("serve", tmp_path / "none.gguf", "port=0"), code=2, words=("none.gguf",))


def test_backends_that_do_not_go_with_the_model_are_refused(tiny: Path) -> None:
    done = foundry_here("serve", tiny / "base", "--backend", "llama.cpp")
    assert_one_paragraph(done, code=2, words=("GGUF", "foundry export"))
    done = foundry_here("serve", tiny / "no-such-folder")
    assert_one_paragraph(done, code=2, words=("no-such-folder",))


def test_a_model_that_transformers_runs_is_served_too(tiny_folder: Callable[[str], Path]) -> None:
    with serving(tiny_folder("gpt2")) as each:
        answers = [each.post("/generate", ASK | {"raw": True}) for _ in range(2)]
        assert answers[0].status_code == 200, answers[0].text
        assert answers[0].json()["text"] == answers[1].json()["text"]
        assert each.post("/generate", ASK).status_code == 200, "no template: the text is continued"
        chat = {"model": each.opened.catalog.default.name, "messages": [{"role": "user", "content": "x"}]}
        refused = each.post("/v1/chat/completions", chat)
        assert refused.status_code == 400
        assert "template" in refused.json()["error"]["message"]


def broken(folder: Path, into: Path) -> Path:
    """A copy of a model in which a norm's weights are NaN."""
    shutil.copytree(folder, into)
    (weights,) = into.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if "norm" in name or "ln_f" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, weights, {"format": "pt"})
    return into


def test_a_model_whose_weights_are_no_numbers_says_so(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """It answered with whatever token a comparison with NaN left, and nobody was told."""
    with serving(broken(tiny_folder("llama"), tmp_path / "ours")) as each:
        for body in (ASK | {"raw": True}, ASK | {"raw": True, "temperature": 1.0}):
            answer = each.post("/generate", body)
            assert answer.status_code == 500, answer.text
            assert "no numbers" in answer.text
        name = each.opened.catalog.default.name
        streamed = each.post("/v1/completions", {"model": name, "prompt": "x", "stream": True})
        assert "model_broken" in streamed.text
    # One that transformers runs is tried when it is opened.
    config = ServeConfig.model_validate({"model": {"name": str(broken(tiny_folder("gpt2"), tmp_path / "theirs"))}})
    with pytest.raises(ModelError, match="no numbers"):
        open_model(config)


def test_an_adapter_for_another_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = make_subject(tmp_path, "qwen3")
    assert other.adapter is not None
    config = ServeConfig.model_validate(
        {"model": {"name": str(tiny / "base")}, "adapters": {"other": str(other.adapter)}}
    )
    with pytest.raises(ModelError, match="another base"):
        open_model(config)


@pytest.fixture
def engine_python(tmp_path: Path) -> Path:
    """A Python in whose environment lie packages called vllm and mlx_lm, which write down how they were started."""
    for name in ("vllm.entrypoints.openai.api_server", "mlx_lm.__main__"):
        module = tmp_path / "site" / Path(*name.split("."))
        module.parent.mkdir(parents=True, exist_ok=True)
        for parent in [module.parent, *module.parent.parents]:
            if parent == tmp_path / "site":
                break
            (parent / "__init__.py").touch()
        module.with_suffix(".py").write_text(
            "import json, os, sys\n"
            "json.dump({'argv': sys.argv[1:], 'key': os.environ.get('VLLM_API_KEY')}, sys.stdout)\n"
        )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "site"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def started(python: Path, fields: dict[str, Any], environ: dict[str, str]) -> dict[str, Any]:
    command = command_for(ServeConfig.model_validate(fields | {"engine_python": str(python)}), environ)
    done = subprocess.run(command.arguments, env=dict(command.environ), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_vllm_is_started_in_its_own_words(tiny: Path, engine_python: Path) -> None:
    adapter = str(tiny / "final" / "adapter")
    environ = {"PATH": os.environ["PATH"], "FOUNDRY_API_KEY": "a-long-enough-key-of-my-own"}
    fields = {"model": {"name": adapter}, "served_name": "tuned", "backend": "vllm", "port": 8111, "host": "0.0.0.0"}
    seen = started(engine_python, fields, environ)
    pairs = dict(zip(seen["argv"], seen["argv"][1:], strict=False))
    assert pairs["--model"] == str(tiny / "base")
    assert pairs["--served-model-name"] == "base"
    assert pairs["--lora-modules"] == f"tuned={adapter}"
    assert pairs["--max-lora-rank"] == "8"
    assert (pairs["--host"], pairs["--port"]) == ("0.0.0.0", "8111")
    assert seen["key"] == environ["FOUNDRY_API_KEY"]


def test_mlx_is_started_in_its_own_words(tiny: Path, engine_python: Path) -> None:
    environ = {"PATH": os.environ["PATH"]}
    seen = started(engine_python, {"model": {"name": str(tiny / "base")}, "backend": "mlx", "port": 8112}, environ)
    assert seen["argv"] == ["server", "--model", str(tiny / "base"), "--host", "127.0.0.1", "--port", "8112"]


def test_mlx_gets_the_template_that_was_named(tiny: Path, engine_python: Path) -> None:
    """Its own default would ask the model in words that it was not trained on."""
    fields = {"model": {"name": str(tiny / "base"), "template": "alpaca"}, "backend": "mlx", "default_max_tokens": 33}
    seen = started(engine_python, fields, {"PATH": os.environ["PATH"]})
    pairs = dict(zip(seen["argv"], seen["argv"][1:], strict=False))
    assert "### Instruction" in pairs["--chat-template"]
    assert pairs["--max-tokens"] == "33"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"access": {"requests_per_minute": 5}}, "access.requests_per_minute"),
        ({"limits": {"max_tokens": 5}}, "limits.max_tokens"),
        ({"follow": True}, "follow"),
        ({"model": {"quantization": "nf4"}}, "model.quantization"),
        ({"model": {"device": "cuda"}}, "model.device"),
        ({"batch": {"invariant": True}}, "batch.invariant"),
        ({"host": "0.0.0.0"}, "without a key"),
    ],
)
def test_what_a_delegated_engine_would_not_keep_to_is_refused(
    tiny: Path, engine_python: Path, fields: dict[str, Any], word: str
) -> None:
    for backend in ("vllm", "mlx"):
        named = {**fields, "model": {"name": str(tiny / "base"), **fields.get("model", {})}, "backend": backend}
        with pytest.raises(FoundryError, match=word):
            command_for(ServeConfig.model_validate(named | {"engine_python": str(engine_python)}), {})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": {"dtype": "float32"}}, "model.dtype"),
        ({"batch": {"invariant": True}}, "batch.invariant"),
        ({"access": {"adapter_folder": "adapters"}}, "access.adapter_folder"),
        ({"adapters": {"lua": "runs/lua"}}, "adapters"),
    ],
)
def test_what_llama_cpp_would_not_keep_to_is_refused(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    named = {**fields, "model": {"name": str(tmp_path / "x.gguf"), **fields.get("model", {})}, "backend": "llama.cpp"}
    with pytest.raises(UsageError, match=f"{word}: llama.cpp does not keep to this option"):
        open_model(ServeConfig.model_validate(named))


def test_every_option_that_a_back_end_keeps_to_is_one() -> None:
    """A field that is renamed must not drop out of the lists in silence."""
    names = set(ServeConfig.model_fields)
    for section in ("model", "access", "limits", "batch"):
        names |= {f"{section}.{name}" for name in type(getattr(ServeConfig(), section)).model_fields}
    assert frozenset[str]().union(*KEPT.values()) <= names


def test_an_engine_that_is_not_installed_is_told_with_the_command(tiny: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # nothing beside the standard library
    python.chmod(0o755)
    for backend, command in (("vllm", "pip install vllm"), ("mlx", "pip install mlx-lm")):
        done = foundry_here("serve", tiny / "base", "--backend", backend, f"engine_python={python}")
        assert_one_paragraph(done, code=2, words=(command,))


def test_auto_takes_llama_cpp_for_a_gguf_where_it_is_installed() -> None:
    config = ServeConfig.model_validate({"model": {"name": "some.gguf"}})
    assert choose_backend(config) == ("llama.cpp" if llama_cpp.is_installed() else "torch")
    assert choose_backend(ServeConfig()) == "torch"
    with pytest.raises(UsageError):
        choose_backend(ServeConfig.model_validate({"backend": "llama.cpp"}))
