"""llama.cpp opened in this process: what it refuses has a reason, and what was opened can be closed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from model_foundry.errors import ModelError
from model_foundry.export.gguf import write_gguf
from model_foundry.export.merge import plan_merge
from model_foundry.models.llama_cpp import LlamaServer, is_installed
from tests.tiny_exports import make_subject

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    subject = make_subject(tmp_path_factory.mktemp("tiny"))
    renderer, path = subject.renderer, subject.base.parent / "tiny.gguf"
    write_gguf(
        path, plan_merge(subject.base, None), format="f16", tokenizer=renderer.tokenizer, name="tiny",
        chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids,
    )  # fmt: skip
    return path


def test_a_refused_file_is_refused_with_llama_cpps_own_reason(gguf: Path, tmp_path: Path) -> None:
    """Its exception says "Failed to init server" for a cut file, an unknown architecture and a missing field alike."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-20_000])
    with pytest.raises(ModelError, match="not within the file bounds"):
        LlamaServer(cut, context=64)


def test_a_file_that_is_opened_and_never_asked_is_let_go(gguf: Path) -> None:
    """xllamacpp waits for ever for a server whose loop has not begun: every other process hung at its end."""
    code = "import sys; from pathlib import Path; from model_foundry.models.llama_cpp import LlamaServer; "
    code += "[LlamaServer(Path(sys.argv[1]), context=64) for _ in range(12)]"
    subprocess.run([sys.executable, "-c", code, str(gguf)], timeout=60, check=True)


def test_nobody_else_can_ask_what_was_opened(gguf: Path) -> None:
    """Its server listened on a port of its own: another way to the model, without key and limits."""
    before = set(Path(tempfile.gettempdir()).glob("foundry-llama-*"))
    mine = psutil.Process()
    ports = len(mine.net_connections("inet"))
    server = LlamaServer(gguf, context=64)
    assert server.complete({"prompt": "a", "max_tokens": 1})["usage"]["completion_tokens"] == 1
    assert len(mine.net_connections("inet")) == ports
    assert set(Path(tempfile.gettempdir()).glob("foundry-llama-*")) == before


def test_a_folder_for_temporary_files_with_a_long_name(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a Unix socket has 107 bytes at most; a longer one was a file that llama.cpp cannot load."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert LlamaServer(gguf, context=64).complete({"prompt": "a", "max_tokens": 1})["choices"]
