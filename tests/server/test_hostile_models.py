"""Model files made to harm whoever opens them: damaged GGUF headers, templates and pickles that run code.

Ollama CVE-2024-39720, 2024-8063, 2025-0315 and llama.cpp CVE-2025-49847, 2025-53630 (headers that end or fill the
process), llama-cpp-python CVE-2024-34359 (a template in a GGUF), vLLM CVE-2025-24357 and LLaMA-Factory CVE-2025-53002
(pickled weights), vLLM CVE-2025-66448 (`auto_map`). Each is refused with one sentence, by a process that lives on.
"""

from __future__ import annotations

import json
import pickle
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest

from model_foundry.config.serve import ServeConfig
from model_foundry.errors import FoundryError, ModelError
from model_foundry.export.gguf import write_gguf
from model_foundry.export.merge import plan_merge
from model_foundry.models.llama_cpp import LlamaServer, is_installed
from model_foundry.server.opening import open_model
from tests.tiny_exports import make_subject

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    subject = make_subject(tmp_path_factory.mktemp("tiny"))
    renderer, path = subject.renderer, subject.base.parent / "tiny.gguf"
    write_gguf(
        path, plan_merge(subject.base, None), format="f16", tokenizer=renderer.tokenizer, name="tiny",
        chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids,
    )  # fmt: skip
    return path


NUMBERS: dict[str, tuple[str, int]] = {
    "2^60 tensors": ("@8", 1 << 60), "2^60 fields": ("@16", 1 << 60), "a name of 2^63 bytes": ("@24", 1 << 63),
    "no layers": ("llama.block_count", 0), "2^31 layers": ("llama.block_count", 2**31 - 1),
    "no heads": ("llama.attention.head_count", 0), "no heads for keys": ("llama.attention.head_count_kv", 0),
    "no width": ("llama.embedding_length", 0), "no context": ("llama.context_length", 0),
    "a context of -1": ("llama.context_length", 2**32 - 1),
    "an end that is no token": ("tokenizer.ggml.eos_token_id", 2**31),
}  # fmt: skip
"""What is wrong -> a field, or the header's byte, and the number that is put there."""
PLACES = {
    "2^62 columns": (0, 1 << 62),
    "no columns": (0, 0),
    "an offset outside": (20, 1 << 40),
    "an odd offset": (20, 3),
}
"""What is wrong with one matrix -> bytes after its number of dimensions, and what is put there."""


def damaged(data: bytes, how: str) -> bytes:
    if how in PLACES:
        after, value = PLACES[how]
        return put(data, data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + after, value, "<Q")
    where, value = NUMBERS[how]
    if where.startswith("@"):
        return put(data, int(where[1:]), value, "<Q")
    return put(data, data.index(where.encode()) + len(where) + 4, value, "<I")


def put(data: bytes, at: int, value: int, form: str) -> bytes:
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("how", [*NUMBERS, *PLACES])
def test_a_damaged_header_does_not_end_the_process(gguf: Path, tmp_path: Path, how: str) -> None:
    """llama.cpp aborts at some of them, and whoever had opened the file was gone without a word."""
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damaged(gguf.read_bytes(), how))
    started = time.monotonic()
    with suppress(ModelError):  # what it takes for harmless is asked, too
        assert LlamaServer(bad, context=64).complete({"prompt": [5, 6], "max_tokens": 2, "temperature": 0.0})
    assert time.monotonic() - started < 30


@pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("how", ["no layers", "no heads", "an odd offset"])
def test_serving_a_damaged_gguf_is_one_sentence(gguf: Path, tmp_path: Path, how: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damaged(gguf.read_bytes(), how))
    with pytest.raises(ModelError) as caught:
        open_model(ServeConfig.model_validate({"model": {"name": str(bad)}}))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("template", [
    "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}", "{% for a in range(10**9) %}x{% endfor %}",
])  # fmt: skip
def test_a_hostile_template_in_a_gguf_does_not_run(tmp_path: Path, template: str) -> None:
    """CVE-2024-34359 as it was found: the template of a GGUF file, rendered without a sandbox."""
    owned = tmp_path / "owned"
    subject = make_subject(tmp_path / "tiny")
    renderer, path = subject.renderer, tmp_path / "hostile.gguf"
    write_gguf(
        path, plan_merge(subject.base, None), format="f16", tokenizer=renderer.tokenizer, name="hostile",
        chat_template=template.replace("OWNED", str(owned)), stop_token_ids=renderer.stop_token_ids,
    )  # fmt: skip
    started = time.monotonic()
    with pytest.raises(FoundryError):
        open_model(ServeConfig.model_validate({"model": {"name": str(path)}}))
    assert time.monotonic() - started < 60
    assert not owned.exists()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_and_adapters_are_not_opened(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    subject = make_subject(tmp_path / "tiny")
    assert subject.adapter is not None
    pickle.loads(pickle.dumps(Touch(owned)))  # it works where somebody loads it
    owned.unlink()
    for folder, safe, names in (
        (subject.base, "model.safetensors", ("pytorch_model.bin", "consolidated.00.pth", "model.safetensors")),
        (subject.adapter, "adapter_model.safetensors", ("adapter_model.bin", "adapter_model.safetensors")),
    ):
        kept = (folder / safe).read_bytes()
        for name in names:
            (folder / safe).unlink(missing_ok=True)
            (folder / name).write_bytes(pickle.dumps(Touch(owned)))
            (folder / "manifest.json").unlink(missing_ok=True)
            with pytest.raises(FoundryError):
                open_model(ServeConfig.model_validate({"model": {"name": str(folder)}}))
            (folder / name).unlink()
        (folder / safe).write_bytes(kept)
    assert not owned.exists()


def test_code_that_came_with_a_model_is_not_run(tmp_path: Path) -> None:
    """`auto_map` names a file of the model's folder, which transformers imports where it is told to trust it."""
    owned = tmp_path / "owned"
    base = make_subject(tmp_path / "tiny").base
    code = f"open({str(owned)!r}, 'w')\nclass Model: ...\nclass Config: ...\nclass Tokenizer: ...\n"
    (base / "evil.py").write_text(code)
    named = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    for file, changes in (("config.json", {}), ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"}),
                          ("config.json", {"model_type": "evil", "architectures": ["Model"]})):  # fmt: skip
        content = json.loads((base / file).read_text()) | {"auto_map": named} | changes
        (base / file).write_text(json.dumps(content))
        try:
            opened = open_model(ServeConfig.model_validate({"model": {"name": str(base)}}))
        except FoundryError:
            continue
        opened.backend.close()
    assert not owned.exists()
