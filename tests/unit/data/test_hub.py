"""Which files of a hub's repository hold the rows that an address asks for."""

from __future__ import annotations

from typing import Any

import pytest

from model_foundry.data.files import hub_address
from model_foundry.data.hub import HubAddress, choose_files, parse_address
from model_foundry.errors import DataError

ACME = "acme/rows"


@pytest.mark.parametrize(
    "address, expected",
    [
        ("hf://datasets/acme/rows", HubAddress(ACME)),
        ("hf://datasets/acme/rows:test", HubAddress(ACME, split="test")),
        ("hf://datasets/acme/rows@v1.0:train", HubAddress(ACME, "v1.0", split="train")),
        ("hf://datasets/acme/rows@refs%2Fconvert%2Fparquet/main", HubAddress(ACME, "refs/convert/parquet", "main")),
        ("hf://datasets/acme/ro-w_s.2/data/a.jsonl", HubAddress("acme/ro-w_s.2", path="data/a.jsonl")),
    ],
)
def test_the_parts_of_an_address(address: str, expected: HubAddress) -> None:
    assert parse_address(address) == expected
    assert hub_address(address) == address
    assert hub_address(address.replace("//", "/", 1)) == address, "a Path takes one slash away"


@pytest.mark.parametrize("address", ["hf://datasets/rows", "hf://acme/rows", "hf://datasets/acme/rows:", "hf://"])
def test_an_address_that_cannot_be_read_says_how_to_write_one(address: str) -> None:
    with pytest.raises(DataError, match="hf://datasets/ORG/NAME"):
        parse_address(address)


def card(**configurations: Any) -> list[dict[str, Any]]:
    return [{"config_name": name, "data_files": files} for name, files in configurations.items()]


PARTS = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
         "data/test-00000-of-00001.parquet", ".gitattributes", "picture.png"]  # fmt: skip
TRAIN = PARTS[1:3]


@pytest.mark.parametrize(
    "names, configurations, path, split, expected",
    [
        (PARTS, [], "", None, TRAIN),
        (PARTS, [], "", "test", PARTS[3:4]),
        (PARTS, [], "data/test-00000-of-00001.parquet", None, PARTS[3:4]),
        (PARTS, card(default=[{"split": "train", "path": "data/test-*"}]), "", None, PARTS[3:4]),
        (PARTS, card(default=[{"split": "train", "path": ["data/train-*"]}]), "", None, TRAIN),
        (PARTS, card(default="data/train-*"), "", None, TRAIN),
        (PARTS, card(default={"train": "**/train-*"}), "", None, TRAIN),
        (PARTS, card(main=[{"split": "test", "path": "data/test-*"}]), "", None, PARTS[3:4]),
        (PARTS, card(a=[{"split": "train", "path": "x"}], b="data/train-*"), "b", None, TRAIN),
        (["a/train.csv", "b/train.csv", "b/dev.csv"], [], "b", "validation", ["b/dev.csv"]),
        (["a/train.csv", "b/train.csv"], [], "", None, ["a/train.csv", "b/train.csv"]),
        (["rows.jsonl.gz", "more.jsonl"], [], "", None, ["more.jsonl", "rows.jsonl.gz"]),
        (["trainer.jsonl", "latest.jsonl"], [], "", None, ["latest.jsonl", "trainer.jsonl"]),
        (["train/test.jsonl", "train/x.jsonl"], [], "", None, ["train/x.jsonl"]),
        (["test/only.jsonl"], [], "", None, ["test/only.jsonl"]),
        (["book.txt", "README.md"], [], "", None, ["book.txt"]),
    ],
)
def test_the_files_of_a_split_are_chosen_by_the_card_or_by_their_names(
    names: list[str], configurations: list[dict[str, Any]], path: str, split: str | None, expected: list[str]
) -> None:
    """Prevents a model from being trained on the test split, which lies in the same repository."""
    assert choose_files(names, configurations, HubAddress(ACME, path=path, split=split)) == expected


@pytest.mark.parametrize(
    "names, configurations, wanted, problem",
    [
        (PARTS, [], HubAddress(ACME, split="dev"), "it has no split 'dev'.*:test, :train"),
        (PARTS, card(a="data/train-*", b="data/test-*"), HubAddress(ACME), "the configurations a, b.*acme/rows/a"),
        (PARTS, [], HubAddress(ACME, path="other"), "no files of rows under other"),
        (["../train.jsonl", "rows.py", "../../x.txt"], [], HubAddress(ACME), "no files of rows .*script"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    names: list[str], configurations: list[dict[str, Any]], wanted: HubAddress, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        choose_files(names, configurations, wanted)
