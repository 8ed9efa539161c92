"""A data set of the Hugging Face hub as a folder on this machine: hf://datasets/ORG/NAME[@REVISION][/PATH][:SPLIT].

Fetched once, whole or not at all, into the cache under the commit it came from; afterwards it is read without the hub.
Every wait is capped, so that a machine without a network gets an answer within seconds. No code of a data set is run:
only its files of rows are taken, chosen by the configurations in its card or else by their names.

    <home>/data/<org--name>/<commit>-<choice>/        the files
    <home>/data/<org--name>/<commit>-<choice>.json    what they are (written last: present = complete)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from model_foundry.checkpoint.atomic import atomic_directory, atomic_write
from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.checkpoint.manifest import hash_file
from model_foundry.data.files import ROW_SUFFIXES, TEXT_SUFFIXES, data_suffix
from model_foundry.errors import DataError, MissingExtraError

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 3.0
LOCK_TIMEOUT_S = 3600.0
SPELLING = "hf://datasets/ORG/NAME, then if needed @REVISION, /PATH or /CONFIGURATION, and :SPLIT"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/:]+))?(?:/([^:]*))?(?::([\w.-]+))?")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True, slots=True)
class HubAddress:
    """What an address names. `path` is a configuration, a folder or a file; empty names all of it."""

    repository: str
    revision: str | None = None
    path: str = ""
    split: str | None = None


def parse_address(address: str) -> HubAddress:
    """The parts of an address.

    Raises:
        DataError: it is not one.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise DataError("the address of a data set cannot be read", where=address, hint=f"Write {SPELLING}")
    repository, revision, path, split = match.groups()
    return HubAddress(repository, unquote(revision) if revision else None, (path or "").strip("/"), split)


def fetch_dataset(address: str, *, home: Path | None = None) -> Path:
    """The folder with the rows of an address, fetched unless it is there already. Logs the commit that is used.

    Args:
        home: the cache; else FOUNDRY_HOME, else ~/.cache/model-foundry.

    Raises:
        DataError: the hub has no such data set, or no rows in it, or neither answers nor was asked before; a file did
            not arrive as the hub describes it; the cache cannot be written.
        MissingExtraError: huggingface_hub is not installed.
    """
    wanted = parse_address(address)
    named = os.environ.get("FOUNDRY_HOME")
    root = home or (Path(named).expanduser() if named else Path.home() / ".cache" / "model-foundry")
    shelf = root / "data" / wanted.repository.replace("/", "--")
    info = _ask(wanted, address)
    if info is None:
        folder, commit = _newest_copy(shelf, address)
        logger.warning("%s: the hub does not answer; using the copy of commit %s", address, commit)
        return folder
    choice = hashlib.sha256(f"{wanted.path}:{wanted.split}".encode()).hexdigest()[:8]
    folder = shelf / f"{info.sha}-{choice}"
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with FileLock.acquire(shelf / ".lock", wait_seconds=LOCK_TIMEOUT_S):
            note = _whole_copy(folder) or _download(info, wanted, folder, address)
            if address not in note["addresses"]:
                note = {**note, "addresses": [*note["addresses"], address]}
                atomic_write(_note(folder), json.dumps(note, indent=2))
    except LockHeldError as error:
        raise DataError("another process has held the data set for an hour", where=str(shelf)) from error
    except OSError as error:
        hint = "Free some space there, or set FOUNDRY_HOME to a folder on another disk."
        raise DataError(f"it cannot be stored ({error.strerror or error})", where=str(shelf), hint=hint) from error
    logger.info("%s is commit %s, in %s", address, info.sha, folder)
    return folder


def choose_files(names: Iterable[str], configurations: Sequence[Mapping[str, Any]], wanted: HubAddress) -> list[str]:
    """Of a repository's files, those that hold the rows wanted.

    Args:
        configurations: the `configs` of the data set's card, which name the files of each split.

    Raises:
        DataError: no file fits; what there is to choose from is named.
    """
    files = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    rows = [name for name in files if data_suffix(Path(name)) in ROW_SUFFIXES]
    files = rows or [name for name in files if data_suffix(Path(name)) in TEXT_SUFFIXES and "README" not in name]
    where = f"hf://datasets/{wanted.repository}"
    if wanted.path in files:
        return [wanted.path]
    if (by_card := _card_splits(files, configurations, wanted, where=where)) is not None:
        splits = by_card
    else:
        below = [name for name in files if not wanted.path or name.startswith(f"{wanted.path}/")]
        splits = _splits_by_name(below)
    if not splits:
        place = f" under {wanted.path}" if wanted.path else ""
        what = f"the data set has no files of rows{place} ({', '.join(ROW_SUFFIXES)})"
        raise DataError(what, where=where, hint="A data set that only a script can build is not supported")
    split = wanted.split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if split not in splits:
        what = f"it has no split '{split}'" if split else "it has no split 'train'"
        raise DataError(what, where=where, hint=f"Add one of :{', :'.join(sorted(splits))}")
    return splits[split]


def _card_splits(
    files: Sequence[str], configurations: Sequence[Mapping[str, Any]], wanted: HubAddress, *, where: str
) -> dict[str, list[str]] | None:
    """Split -> files by the card; None where it names none, or a path in the repository is asked for."""
    by_name = {str(entry.get("config_name")): entry for entry in configurations if entry.get("data_files")}
    if wanted.path and wanted.path not in by_name:
        return None
    default = next((name for name, entry in by_name.items() if name == "default" or entry.get("default")), None)
    name = wanted.path or default or (next(iter(by_name)) if len(by_name) == 1 else None)
    if name is None:
        if not by_name:
            return None
        hint = f"Write one behind the name: {where}/{next(iter(by_name))}"
        raise DataError(f"it has the configurations {', '.join(by_name)}", where=where, hint=hint)
    splits: dict[str, list[str]] = {}
    entry = by_name[name]
    folder = str(entry.get("data_dir") or "").strip("/")
    for split, pattern in _patterns(entry["data_files"]):
        full = f"{folder}/{pattern}" if folder else pattern
        found = [file for file in files if _fits(file, full) and file not in splits.get(split, ())]
        splits.setdefault(split, []).extend(found)
    return {split: found for split, found in splits.items() if found}


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of every way in which cards write `data_files`."""
    if isinstance(data_files, str):
        return [("train", data_files)]
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    pairs: list[tuple[str, str]] = []
    for entry in data_files:
        split, paths = (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, Mapping) else (
            "train", entry)  # fmt: skip
        pairs += [(split, str(path)) for path in ([paths] if isinstance(paths, str) else paths or [])]
    return pairs


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or ("**/" in pattern and fnmatchcase(name, pattern.replace("**/", "")))


def _splits_by_name(files: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files by the words in their names, the nearest to the end first; all are `train` where none has any."""
    splits: dict[str, list[str]] = {}
    for name in files:
        if (split := _split_of(name)) is not None:
            splits.setdefault(split, []).append(name)
    return splits or ({"train": list(files)} if files else {})


def _split_of(name: str) -> str | None:
    for part in reversed(name.lower().split("/")):
        words = re.split(r"[^a-z]+", part)
        for split, names in _SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return None


def _ask(wanted: HubAddress, address: str) -> Any | None:
    """The hub's description of a data set with sizes and hashes, None where no hub answers in time."""
    if any(os.environ.get(key, "").lower() in ("1", "true", "yes", "on") for key in _OFFLINE_VARIABLES):
        return None
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    answer: list[Any] = []

    def ask() -> None:
        try:
            facts = HfApi().dataset_info(
                wanted.repository, revision=wanted.revision, files_metadata=True, timeout=ANSWER_TIMEOUT_S
            )
            answer.append(facts)
        except Exception as error:  # sorted by kind below, in the calling thread
            answer.append(error)

    # Name resolution has no timeout of its own: a thread that is left behind is the only cap on all of it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_S + 1)
    found = answer[0] if answer else None
    if isinstance(found, GatedRepoError):
        hint = "Accept its terms on the hub and set HF_TOKEN"
        raise DataError("the hub wants the terms of the data set accepted first", where=address, hint=hint)
    if isinstance(found, RepositoryNotFoundError):
        hint = "Check the spelling; a private one needs HF_TOKEN"
        raise DataError("the hub knows no such data set", where=address, hint=hint)
    if isinstance(found, HfHubHTTPError) and found.response.status_code in (400, 404):
        raise DataError(f"the hub refused it ({found.response.status_code})", where=address, hint=f"Write {SPELLING}")
    return None if isinstance(found, Exception) else found


_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def _download(info: Any, wanted: HubAddress, folder: Path, address: str) -> Mapping[str, Any]:
    """Fetch the files of one address and check them against the hub's hashes; the note to write beside them."""
    from huggingface_hub import hf_hub_download

    siblings = {item.rfilename: item for item in info.siblings or []}
    card = info.card_data.to_dict() if info.card_data is not None else {}
    configurations = [entry for entry in card.get("configs") or [] if isinstance(entry, Mapping)]
    names = choose_files(siblings, configurations, wanted)
    total = sum(siblings[name].size or 0 for name in names)
    logger.info("fetching %s: %d files, %.1f MB", address, len(names), total / 1e6)
    files: dict[str, dict[str, Any]] = {}
    with atomic_directory(folder) as target:
        for name in names:
            try:
                hf_hub_download(
                    info.id, name, repo_type="dataset", revision=info.sha, local_dir=target, etag_timeout=10
                )
            except Exception as error:
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                hint = "Check the network and run the command again"
                raise DataError(f"downloading {name} failed ({first})", where=address, hint=hint) from error
            record = hash_file(target / name)
            expected = getattr(siblings[name].lfs, "sha256", None)
            if expected is not None and record.sha256 != expected:
                raise DataError(f"{name} arrived with another sha256 than the hub states", where=address)
            files[name] = {"bytes": record.size_bytes, "sha256": record.sha256}
        shutil.rmtree(target / ".cache", ignore_errors=True)  # huggingface_hub's own notes
    return {"addresses": [], "commit": info.sha, "files": files}


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _whole_copy(folder: Path) -> Mapping[str, Any] | None:
    """What the note beside a folder says, if every file still has the size that it had."""
    try:
        note = json.loads(_note(folder).read_bytes())
        sizes = {name: facts["bytes"] for name, facts in note["files"].items()}
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if whole else None


def _newest_copy(shelf: Path, address: str) -> tuple[Path, str]:
    """The copy of this address that was fetched last, and its commit.

    Raises:
        DataError: there is none.
    """
    notes = sorted(shelf.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True) if shelf.is_dir() else []
    for path in notes:
        folder = path.with_suffix("")
        note = _whole_copy(folder)
        if note is not None and address in note["addresses"]:
            return folder, str(note["commit"])
    hint = "Check the network, or name files on this machine"
    raise DataError("the hub does not answer, and the data set was not fetched before", where=address, hint=hint)
