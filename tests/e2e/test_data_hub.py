"""A data set of the hub, fetched over real HTTP from a hub on the loopback interface, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_runs import COLOURS, chat_row, environment, foundry, losses, write_project

COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "v1": "89abcdef0123456789abcdef0123456789abcdef"}
ROWS = [{"prompt": f"question {number}", "completion": "answer"} for number in range(3)]


@contextmanager
def hub(files: dict[str, bytes], *, lie: str = "", card: dict[str, Any] | None = None) -> Iterator[str]:
    """A hub with one data set, `acme/rows`, in two revisions; the file `lie` arrives with one byte changed."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            for revision, commit in COMMITS.items():
                if path in (f"/api/datasets/acme/rows/revision/{revision}", "/api/datasets/acme/rows"):
                    self.answer(200, json.dumps(describe(files, commit, card)).encode())
                    return
                prefix = f"/datasets/acme/rows/resolve/{commit}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    name = path.removeprefix(prefix)
                    body = bytearray(files[name])
                    if name == lie:
                        body[-2] ^= 1
                    etag = hashlib.sha256(files[name]).hexdigest()
                    self.answer(200, bytes(body), {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
                    return
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


def describe(files: dict[str, bytes], commit: str, card: dict[str, Any] | None) -> dict[str, Any]:
    siblings = [
        {
            "rfilename": name, "size": len(data), "blobId": "0" * 40,
            "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
        }
        for name, data in files.items()
    ]  # fmt: skip
    return {"id": "acme/rows", "sha": commit, "siblings": siblings, "cardData": card}


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)


@pytest.fixture
def files() -> dict[str, bytes]:
    return {
        "README.md": b"about", "data/train-1.jsonl": jsonl(ROWS[:2]), "data/train-2.jsonl": jsonl(ROWS[2:]),
        "data/test.jsonl": jsonl(ROWS),
    }  # fmt: skip


def convert(address: str, out: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FOUNDRY_"))}
    home = out.parent
    environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "FOUNDRY_HOME": str(home / "foundry"), **more}
    command = [sys.executable, "-m", "model_foundry", "data", "convert", address, str(out), "--json"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_data_set_is_fetched_once_and_then_read_without_the_hub(files: dict[str, bytes], tmp_path: Path) -> None:
    """Prevents training on the test split, and a machine that can only train while the hub answers."""
    out = tmp_path / "rows.jsonl"
    with hub(files) as endpoint:
        first = convert("hf://datasets/acme/rows", out, endpoint)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["rows_written"] == 3
    assert out.read_bytes() == jsonl(ROWS)
    (note,) = (tmp_path / "foundry" / "data" / "acme--rows").glob("*.json")
    assert json.loads(note.read_bytes())["commit"] == COMMITS["main"]
    assert COMMITS["main"] in json.loads(first.stdout)["source"]
    out.unlink()
    started = time.monotonic()
    again = convert("hf://datasets/acme/rows", out, "http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 20
    assert out.read_bytes() == jsonl(ROWS)
    told = convert("hf://datasets/acme/rows", out, endpoint, HF_HUB_OFFLINE="1")
    assert told.returncode == 0, told.stderr


def test_a_revision_a_split_and_a_configuration_can_be_asked_for(files: dict[str, bytes], tmp_path: Path) -> None:
    card = {"configs": [{"config_name": "small", "data_files": [{"split": "train", "path": "data/train-1*"}]}]}
    with hub(files, card=card) as endpoint:
        done = convert("hf://datasets/acme/rows@v1/small", tmp_path / "small.jsonl", endpoint)
        assert done.returncode == 0, done.stderr
        assert COMMITS["v1"] in json.loads(done.stdout)["source"]
        assert (tmp_path / "small.jsonl").read_bytes() == jsonl(ROWS[:2])
        one = convert("hf://datasets/acme/rows/data/test.jsonl", tmp_path / "one.jsonl", endpoint)
        assert (one.returncode, (tmp_path / "one.jsonl").read_bytes()) == (0, jsonl(ROWS))


def test_a_model_is_trained_on_rows_of_the_hub_and_on_a_folder(model: Path, tmp_path: Path) -> None:
    """Prevents a run whose receipt does not say which commit, or which files of a folder, it was trained on."""
    rows = [chat_row(f"Colour of {name}?", colour) for name, colour in COLOURS.items()]
    address = "hf://datasets/acme/rows:train"
    config = write_project(tmp_path, model=model, data__train_file=address, training__max_steps=2)
    homes = {"HF_HOME": str(tmp_path / "hf"), "FOUNDRY_HOME": str(tmp_path / "foundry")}
    with hub(
        {"train-1.jsonl": jsonl(rows[:4]), "train-2.jsonl": jsonl(rows[4:]), "test.jsonl": jsonl(rows)}
    ) as endpoint:
        done = foundry("train", config, env=environment(HF_ENDPOINT=endpoint, **homes))
    assert done.returncode == 0, done.stderr
    assert f"{address} is commit {COMMITS['main']}" in done.stderr
    run = tmp_path / "run"
    train = json.loads((run / "report.json").read_bytes())["data"]["train"]
    assert (train["file"], train["kept"]) == (address, 8)
    receipt = json.loads((run / "run.json").read_bytes())
    files = {role: Path(facts["path"]) for role, facts in receipt["receipt"]["data"].items()}
    assert sorted(files) == ["train_file train-1.jsonl", "train_file train-2.jsonl"]
    assert all(COMMITS["main"] in str(path) for path in files.values())
    folder = files["train_file train-1.jsonl"].parent
    again = foundry("train", config, f"data.train_file={folder}", f"run_dir={tmp_path / 'other'}")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "other") == losses(run)


def test_a_file_with_a_flipped_byte_is_not_kept(files: dict[str, bytes], tmp_path: Path) -> None:
    with hub(files, lie="data/train-2.jsonl") as endpoint:
        done = convert("hf://datasets/acme/rows", tmp_path / "rows.jsonl", endpoint)
    assert done.returncode == 2
    assert "data/train-2.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    shelf = tmp_path / "foundry" / "data" / "acme--rows"
    assert [path.name for path in shelf.iterdir()] == [".lock"]
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_the_hub_does_not_have_and_no_hub_at_all_are_told_apart(files: dict[str, bytes], tmp_path: Path) -> None:
    with hub(files) as endpoint:
        unknown = convert("hf://datasets/acme/other", tmp_path / "rows.jsonl", endpoint)
        split = convert("hf://datasets/acme/rows:dev", tmp_path / "rows.jsonl", endpoint)
    assert (unknown.returncode, split.returncode) == (2, 2)
    assert "the hub knows no such data set" in unknown.stderr
    assert "it has no split 'dev'" in split.stderr
    started = time.monotonic()
    offline = convert("hf://datasets/acme/rows", tmp_path / "rows.jsonl", "http://127.0.0.1:9")
    assert offline.returncode == 2
    assert "the hub does not answer" in offline.stderr
    assert time.monotonic() - started < 20
