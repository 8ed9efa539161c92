"""`foundry data pack`: what a person and a program read, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from model_foundry.cli.data import command
from model_foundry.data.shards.reader import PackedShards
from model_foundry.errors import ConfigError, DataError, UsageError
from tests.shard_sets import chat, chats, texts, write_rows


def pack(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["pack", *map(str, arguments)])


def test_a_person_reads_what_was_packed_lost_and_how_full_it_is(chatml_folder: Path, tmp_path: Path) -> None:
    rows = [*chats([3] * 200), chat("long", "word " * 99), chat("q<|im_end|>", "a")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    done = pack(path, "--out", tmp_path / "out", f"model={chatml_folder}", "max_length=64")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "lost 1 of 202 records: longer than 64 tokens"
    assert lines[1].startswith(f"  {path}:201: longer than 64 tokens (")
    assert lines[2] == "rows with control tokens in their text, encoded as plain text: 1"
    shards = PackedShards.open(tmp_path / "out")
    assert (
        lines[3]
        == f"{shards.index.num_tokens:,} tokens of 201 rows, {shards.index.num_trained_tokens:,} of them trained"
    )
    assert lines[5].startswith(f"{shards.num_bins:,} bins of 64 tokens, ")
    assert "tokens/s" in lines[-2]
    assert lines[-1] == f"{tmp_path / 'out'}: 1 shard"
    again = pack(path, "--out", tmp_path / "out", f"model={chatml_folder}", "max_length=64")
    assert again.stdout.splitlines()[-2] == "was packed already, from the same input in the same way"


def test_a_program_reads_the_same(chatml_folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", texts([5, 9, 70, 0]))
    arguments = (path, "--out", tmp_path / "out", f"model={chatml_folder}", "kind=text", "max_length=32", "--json")
    values = json.loads(pack(*arguments).stdout)
    shards = PackedShards.open(tmp_path / "out")
    assert values["tokens"] == values["new_tokens"] == shards.index.num_tokens
    assert (values["records"], values["rows"], values["lost"]) == (4, 3, {"empty": 1})
    assert (values["kind"], values["max_length"], values["bins"]) == ("text", 32, shards.num_bins)
    assert values["went_on"] is False
    assert json.loads(pack(*arguments).stdout)["went_on"] is True


def test_a_configuration_may_say_it_all(chatml_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", chats([3, 4]))
    config = tmp_path / "pack.yaml"
    config.write_text(f"source: rows.jsonl\nmodel: {chatml_folder}\nmax_length: 128\noverlength: split\n")
    done = pack(config, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    index = PackedShards.open(tmp_path / "out").index
    assert (index.max_length, index.parameters["overlength"]) == (128, "split")


def test_rows_that_do_not_fit_beside_each_other_are_said(chatml_folder: Path, tmp_path: Path) -> None:
    """A fill far below what was promised must not look like the best there is."""
    path = write_rows(tmp_path / "rows.jsonl", chats([30] * 50))
    done = pack(path, "--out", tmp_path / "out", f"model={chatml_folder}", "max_length=150")
    assert "  few rows fit beside each other; a larger max_length fills better" in done.stdout.splitlines()


def test_what_cannot_be_meant_is_refused(chatml_folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", chats([3]))
    out, model = ("--out", tmp_path / "out"), f"model={chatml_folder}"
    for arguments, kind, what in (
        ((*out, model), UsageError, "no FILE is named"),
        ((path, path, *out), UsageError, "one at a time"),
        ((path, *out, "maxlength=4"), ConfigError, "Did you mean max_length"),
        ((path, *out, "kind=poems"), ConfigError, "kind"),
        ((tmp_path / "nothing.jsonl", *out, model), ConfigError, "nothing.jsonl"),
        ((path, *out, model, "overlength=error", "max_length=8"), DataError, "over max_length 8"),
    ):
        result = pack(*arguments)
        assert isinstance(result.exception, (kind, DataError)), (arguments, result.output)
        assert what.partition(".")[0] in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from model_foundry.cli.data_pack import command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"numpy", "tokenizers", "torch", "jinja2"}.isdisjoint(done.stdout.split())
