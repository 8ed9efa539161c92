"""`foundry tokenizer`: from files to a folder, and what it says when files, sizes or templates cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from model_foundry.cli.main import main
from model_foundry.tokenizer import Tokenizer
from tests.conftest import CORPUS


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["tokenizer", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of everything: text, compressed rows, chats."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS), encoding="utf-8")
    rows = "".join(json.dumps({"text": text[::-1]}) + "\n" for text in CORPUS)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "ignored.bin").write_bytes(b"\0")
    return folder


def test_from_files_to_a_folder_and_a_report(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "zebra zebra"}, {"role": "assistant", "content": "zebra"}]}
    chats.write_text(json.dumps(chat) + "\n")
    out = tmp_path / "deep" / "tokenizer"
    code, said, err = run(
        capsys, "train", corpus, chats, "--vocab-size", 500, "--round-to", 64, "--out", out,
        "--template", "chatml", "--special", "<|tool|>", "--max-length", 2048, "--json",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(said)
    assert facts["vocab_size"] == 512
    assert facts["num_texts"] == 2 * len(CORPUS) + 2
    assert facts["special_tokens"] == {
        "<|endoftext|>": 0, "<|pad|>": 1, "<|im_start|>": 2, "<|im_end|>": 3, "<|tool|>": 4
    }  # fmt: skip
    assert facts["ggml_pre"] == "qwen2"
    assert sum(facts["skipped_files"].values()) == 1
    tokenizer = Tokenizer.load(out)
    assert (tokenizer.fingerprint, tokenizer.max_length) == (facts["fingerprint"], 2048)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["model_foundry"] == {"ggml_pre": "qwen2"}
    assert len(tokenizer.encode("zebra")) < 5

    code, said, _ = run(capsys, "report", out, corpus, "--json")
    assert code == 0
    report = json.loads(said)
    assert report["num_changed"] == 0
    assert report["bytes_per_token"] > 1.5
    assert report["tokenizer"] == str(out)


def test_two_tokenizers_side_by_side(
    chatml_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own"
    assert run(capsys, "train", corpus, "--vocab-size", 300, "--out", out)[0] == 0
    code, said, _ = run(capsys, "report", out, corpus, "--compare", chatml_folder)
    assert code == 0
    lines = {line[:18].strip(): line[18:].split() for line in said.splitlines()[1:]}
    assert lines[""] == [str(out), str(chatml_folder)]
    assert lines["vocabulary"][0] == "300"
    assert len(lines["bytes per token"]) == 2
    code, said, _ = run(capsys, "report", out, corpus, "--compare", chatml_folder, "--json")
    assert [each["vocab_size"] for each in json.loads(said)] == [300, Tokenizer.load(chatml_folder).vocab_size]


def test_a_folder_that_holds_something_is_left_alone(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own"
    assert run(capsys, "train", corpus, "--vocab-size", 300, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = run(capsys, "train", corpus, "--vocab-size", 310, "--out", out)
    assert code == 2
    assert "--overwrite" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(capsys, "train", corpus, "--vocab-size", 310, "--out", out, "--overwrite")[0] == 0
    assert Tokenizer.load(out).vocab_size == 310
    (out / "model.safetensors").write_bytes(b"weights")
    code, _, err = run(capsys, "train", corpus, "--vocab-size", 310, "--out", out, "--overwrite")
    assert code == 2
    assert (out / "model.safetensors").read_bytes() == b"weights"


def test_a_template_that_puts_tokens_together_is_tried_out(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "roles.jinja"
    template.write_text("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}")
    out = tmp_path / "own"
    code, said, err = run(capsys, "train", corpus, "--vocab-size", 400, "--out", out, "--template", template, "--json")
    assert code == 0, err
    assert {"<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"} < set(json.loads(said)["special_tokens"])


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("empty corpus", {"file": ("empty.jsonl", b"")}, "empty.jsonl: there is no text"),
    ("binary text file", {"file": ("a.txt", b"text\n\0\1\2")}, "binary"),
    ("not UTF-8", {"file": ("a.txt", b"caf\xe9")}, "UTF-8"),
    ("broken row", {"file": ("a.jsonl", b'{"text": "a"}\n{"text": \n')}, "a.jsonl:2"),
    ("a row of something else", {"file": ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n')}, "a.jsonl:2"),
    ("no such file", {"path": "nowhere.txt"}, "nowhere.txt"),
    ("vocabulary too small", {"--vocab-size": 100}, "256 bytes and 2 special tokens"),
    ("an unknown template", {"--template": "nobody"}, "nobody"),
    ("tags nobody explains", {"template": "{{ '[INST]' + messages[0]['content'] }}"}, "--special"),
    ("a role nobody fills", {"template": "{{ cls_token }}"}, "cls_token"),
    ("a template that always fails", {"template": "{{ raise_exception('never') }}"}, "never"),
    ("a template that is no Jinja", {"template": "{% for %}"}, "not valid"),
    ("a token that is a letter", {"--special": "e"}, "too short"),
]


@pytest.mark.parametrize(("what", "given", "words"), BAD, ids=[each[0] for each in BAD])
def test_bad_input_is_one_paragraph_and_writes_nothing(
    what: str, given: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content = given.get("file", ("good.txt", "\n".join(CORPUS).encode()))
    (tmp_path / name).write_bytes(content)
    options = {"--vocab-size": 300, "--out": tmp_path / "out", **{k: v for k, v in given.items() if k[0] == "-"}}
    if "template" in given:
        (tmp_path / "t.jinja").write_text(given["template"])
        options["--template"] = tmp_path / "t.jinja"
    flat = [each for pair in options.items() for each in pair]
    code, out, err = run(capsys, "train", tmp_path / given.get("path", name), *flat)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_text_without_a_character_is_counted_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty file among thousands stopped the training of a vocabulary, as a row that cannot be trained on does."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a.txt": "", "b.txt": "\n".join(CORPUS), "c.txt": ""}.items():
        (folder / name).write_text(text)
    code, said, _ = run(capsys, "train", folder, "--vocab-size", 300, "--out", tmp_path / "o")
    assert code == 0
    assert "2 of 3 texts are empty" in said
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": "a b c"}\n')
    code, said, _ = run(capsys, "report", tmp_path / "o", tmp_path / "rows.jsonl")
    assert code == 0
    assert "2 of 2 texts" in said
    code, _, err = run(capsys, "train", folder / "a.txt", "--vocab-size", 300, "--out", tmp_path / "p")
    assert code == 2
    assert "a.txt: there is no text" in err


def test_unreadable_rows_are_counted_where_they_may_be_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a b c"}\n{"text": \n{"text": 3}\n' * 2)
    code, said, _ = run(
        capsys,
        "train",
        tmp_path / "a.jsonl",
        "--vocab-size",
        300,
        "--out",
        tmp_path / "o",
        "--skip-unreadable",
        "--json",
    )
    assert code == 0
    assert sum(json.loads(said)["unreadable_rows"].values()) == 4


@pytest.mark.parametrize("name", ["missing", "empty", "damaged.model"])
def test_a_report_on_what_is_no_tokenizer(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.model").write_bytes(b"\x0a\xff\xff")
    (tmp_path / "a.txt").write_text("text")
    code, _, err = run(capsys, "report", tmp_path / name, tmp_path / "a.txt")
    assert code == 2
    assert name in err
