"""A receipt names all that is needed to repeat a run, and nothing that must stay secret."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from model_foundry.errors import RunError
from model_foundry.run.receipts import code_digest, git_state, installed_packages, machine_facts, receipt, scrub


def test_a_receipt_is_json_and_names_code_data_packages_and_machine(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    facts = receipt(
        argv=["foundry", "train", "a.yaml"],
        config_digest="abc",
        data_files={"train_file": data},
        model_fingerprint="f",
        torch_facts={"version": "2", "threads": 2},
        clock=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    assert json.loads(json.dumps(facts)) == facts
    assert facts["data"]["train_file"]["sha256"] == hashlib.sha256(b"{}\n").hexdigest()
    assert facts["data"]["train_file"]["size_bytes"] == 3
    assert facts["machine"]["python"] == platform.python_version()
    assert facts["machine"]["memory_bytes"] > 1 << 28
    assert facts["packages"]["numpy"]
    assert len(facts["code"]["sha256"]) == 64
    assert facts["clock"] == {"started": "2026-01-02T03:04:05+00:00"}


def test_a_data_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone\.jsonl"):
        receipt(argv=[], config_digest="", data_files={"train_file": tmp_path / "gone.jsonl"})


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key=SESAME"],
        ["--api_key", "SESAME"],
        ["hub.token=SESAME"],
        ["HF_TOKEN=SESAME"],
        ["--secret=SESAME and more SESAME"],
        ["data.client_secret: SESAME"],
        ["--password", "SESAME"],
        ["WANDB_API_KEY=SESAME"],
        ["aws_access_key_id=SESAME"],
        ['{"token": "SESAME", "a": 1}'],
        ["https://hub/x?a=1&access_token=SESAME&b=2"],
        ["postgres://user:SESAME@host/db"],
        ["sk-SESAME0123456789"],
        ["model.name=hf_SESAME0123456789"],
        ["--header", "Authorization: Bearer=SESAME"],
    ],
)
def test_secrets_on_the_command_line_are_never_written(argv: list[str]) -> None:
    """Prevents a run folder that cannot be shared."""
    scrubbed = scrub(["foundry", *argv, "seed=1"])
    assert "SESAME" not in " ".join(scrubbed)
    assert scrubbed[0] == "foundry"
    assert scrubbed[-1] == "seed=1"


@pytest.mark.parametrize(
    "argument",
    [
        "evaluation.max_new_tokens=64",
        "training.micro_batch_tokens=4096",
        "stop_token_ids=[1,2]",
        "model.tokenizer=folder",
        "runs/token",
        "examples/secret-garden.yaml",
        "--json",
        "training.learning_rate=5e-5",
        "data.train_file=a:b.jsonl",
    ],
)
def test_what_is_no_secret_stays_readable(argument: str) -> None:
    """Prevents scrubbing so eager that the command line can't be repeated."""
    assert scrub([argument, "next"]) == [argument, "next"]


def test_the_code_digest_changes_with_any_file_and_not_with_caches(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sub" / "a.yaml").write_text("a: 1")
    first = code_digest(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("x")
    assert code_digest(package) == first
    (package / "sub" / "a.yaml").write_text("a: 2")
    second = code_digest(package)
    (package / "sub" / "a.yaml").rename(package / "sub" / "b.yaml")
    assert len({first, second, code_digest(package)}) == 3


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_revision_is_that_of_our_checkout_and_no_other(tmp_path: Path) -> None:
    """Prevents the revision of a repository that merely has our virtual environment inside it."""

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path), *arguments],
            check=True,
            capture_output=True,
        )

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert git_state(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's own")
    assert git_state(package) is None
    git("add", "package")
    git("commit", "-m", "ours")
    clean = git_state(package)
    assert clean is not None
    assert not clean["dirty"]
    assert len(clean["revision"]) == 40
    (tmp_path / "outside").touch()
    assert git_state(package) == clean
    (package / "new.py").touch()
    assert git_state(package) == {**clean, "dirty": True}


def test_facts_name_neither_host_nor_user() -> None:
    facts = machine_facts()
    assert facts["logical_cores"] >= 1
    assert platform.node() not in json.dumps({**facts, "platform": ""}) or len(platform.node()) < 4
    assert installed_packages() == dict(sorted(installed_packages().items(), key=lambda item: item[0].lower()))
