"""Fetching from a model hub, over real HTTP to a hub on the loopback interface, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_foundry.checkpoint.tensors import write_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 8, "rope_parameters": {"rope_theta": 5000.0},
}  # fmt: skip


@contextmanager
def hub(folder: Path, *, lie: str = "") -> Iterator[str]:
    """A hub with one repository, `acme/rocket`; the file `lie` arrives with one byte changed."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            prefix = f"/acme/rocket/resolve/{COMMIT}/"
            if path == "/api/models/acme/rocket":
                self.answer(200, json.dumps(describe(files)).encode())
            elif path.startswith(prefix) and path.removeprefix(prefix) in files:
                name = path.removeprefix(prefix)
                body = bytearray(files[name])
                if name == lie:
                    body[-1] ^= 1
                etag = hashlib.sha256(files[name]).hexdigest()
                self.answer(200, bytes(body), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def describe(files: dict[str, bytes]) -> dict[str, Any]:
    def sibling(name: str, data: bytes) -> dict[str, Any]:
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"rfilename": name, "size": len(data), "blobId": "0" * 40} | ({"lfs": lfs} if "tensors" in name else {})

    return {"id": "acme/rocket", "sha": COMMIT, "siblings": [sibling(name, data) for name, data in files.items()]}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    write_tensors(folder / "model.safetensors", {"model.embed_tokens.weight": np.ones((8, 4), np.float32)})
    return folder


def pull(name: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FOUNDRY_"))}
    environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "FOUNDRY_HOME": str(home / "foundry")}
    command = [sys.executable, "-m", "model_foundry", "models", "pull", name, "--json"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_hub_model_is_fetched_once_checked_and_then_used_without_the_hub(repository: Path, tmp_path: Path) -> None:
    with hub(repository) as endpoint:
        first = pull("acme/rocket", endpoint, tmp_path)
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer["provenance"] == {"source": "hub", "repository": "acme/rocket", "revision": COMMIT}
    folder = Path(answer["folder"])
    names = ["config.json", "foundry-model.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 5000.0
    again = pull("acme/rocket", "http://127.0.0.1:9", tmp_path)
    assert again.returncode == 0, again.stderr


def test_a_download_with_a_flipped_byte_is_not_kept(repository: Path, tmp_path: Path) -> None:
    with hub(repository, lie="model.safetensors") as endpoint:
        done = pull("acme/rocket", endpoint, tmp_path)
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "foundry" / "models").iterdir()) == []


def test_a_name_the_hub_does_not_know_is_not_taken_for_a_missing_network(repository: Path, tmp_path: Path) -> None:
    with hub(repository) as endpoint:
        done = pull("acme/rockets", endpoint, tmp_path)
    assert done.returncode == 2
    assert "the hub knows no such model" in done.stderr
