"""Handing a folder to Ollama: what its own client sends, to a server that keeps to Ollama's API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from model_foundry.errors import FoundryError, UsageError
from model_foundry.export.modelfile import NAME, Modelfile
from model_foundry.export.ollama import check_model_name, register


class Server(ThreadingHTTPServer):
    """Blobs under their hash, models out of blobs, and an answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.answer = "Grey."


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/api/blobs/"):
            digest = self.path.removeprefix("/api/blobs/")
            if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
                return self._say(400, {"error": "digest mismatch"})
            self.server.blobs[digest] = body
            return self._say(201, {})
        asked = json.loads(body)
        if self.path == "/api/create":
            files = asked["files"] | asked.get("adapters", {})
            lost = [name for name, digest in files.items() if digest not in self.server.blobs]
            if lost:
                return self._say(400, {"error": f"blob of {lost[0]} is not here"})
            self.server.models[asked["model"]] = asked
            return self._say(200, {"status": "success"})
        if self.path == "/api/chat" and asked["model"] in self.server.models:
            message = {"role": "assistant", "content": self.server.answer}
            return self._say(200, {"model": asked["model"], "message": message, "done": True})
        return self._say(404, {"error": f"no {self.path}"})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fox-q8_0.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 400)
    modelfile = Modelfile("./fox-q8_0.gguf", "{{ .Messages }}\n", "Be brief.", ("<|im_end|>", "</s>"), 2048)
    (tmp_path / NAME).write_text(modelfile.text, encoding="utf-8")
    return tmp_path


def host_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.slow
def test_the_model_is_made_of_what_the_modelfile_says_and_asked(server: Server, folder: Path) -> None:
    answer = register(folder, "fox", question="What colour is the cat?", host=host_of(server))
    assert answer == "Grey."
    data = (folder / "fox-q8_0.gguf").read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert server.blobs == {digest: data}
    made = server.models["fox"]
    assert made["files"] == {"fox-q8_0.gguf": digest}
    assert (made["template"], made["system"]) == ("{{ .Messages }}\n", "Be brief.")
    assert made["parameters"] == {"stop": ["<|im_end|>", "</s>"], "num_ctx": 2048}


@pytest.mark.slow
def test_an_adapter_goes_on_top_of_a_base_that_is_sent_by_itself(server: Server, folder: Path) -> None:
    """The base's name is its hash: a second adapter over it sends no second base."""
    (folder / "fox-adapter-f16.gguf").write_bytes(b"GGUF adapter")
    modelfile = Modelfile("./fox-q8_0.gguf", "{{ .Messages }}", None, ("</s>",), 2048, "./fox-adapter-f16.gguf")
    (folder / NAME).write_text(modelfile.text, encoding="utf-8")
    register(folder, "fox", question="What colour is the cat?", host=host_of(server))
    made = server.models["fox"]
    assert list(made["files"]) == ["fox-q8_0.gguf"]
    assert made["adapters"] == {"fox-adapter-f16.gguf": f"sha256:{hashlib.sha256(b'GGUF adapter').hexdigest()}"}
    assert server.blobs[made["adapters"]["fox-adapter-f16.gguf"]] == b"GGUF adapter"


def test_nobody_there_is_said_with_the_next_command(server: Server, folder: Path) -> None:
    host = host_of(server)
    server.server_close()
    with pytest.raises(FoundryError, match="no Ollama answers") as caught:
        register(folder, "fox", question="?", host=host)
    assert "ollama create fox -f Modelfile" in str(caught.value.hint)


@pytest.mark.slow
def test_a_refusal_and_a_silent_model_are_said(server: Server, folder: Path) -> None:
    server.answer = " "
    with pytest.raises(FoundryError, match="answers nothing"):
        register(folder, "fox", question="?", host=host_of(server))
    server.blobs = _Forgetful()
    with pytest.raises(FoundryError, match="is not here"):
        register(folder, "fox", question="?", host=host_of(server))


class _Forgetful(dict[str, bytes]):
    def __setitem__(self, key: str, value: bytes) -> None:
        pass


@pytest.mark.parametrize("name", ["", "-fox", "fo x", "fox\n"])
def test_what_is_no_name_is_refused_before_anything_is_written(name: str) -> None:
    with pytest.raises(UsageError, match="no name"):
        check_model_name(name)
    assert check_model_name("me/fox:1b") == "me/fox:1b"
