"""What is needed to run it again: code, configuration, data, model, packages, machine, command line.

Looks at files and the operating system. Imports nothing heavy: what only torch knows is handed in. Writes no secret:
the command line is scrubbed, and of the environment only a few harmless variables are taken.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import model_foundry
from model_foundry.checkpoint.manifest import hash_file
from model_foundry.errors import RunError
from model_foundry.run.directory import utc_now

SCRUBBED = "***"
_PACKAGE_ROOT = Path(model_foundry.__file__).parent
# Thread counts and devices change results or speed; nothing here can hold a secret.
_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONHASHSEED",
    "LD_PRELOAD",
)
_SECRET_WORD = r"(?:api[-_.]?key|access[-_.]?key|token(?!i[sz]|s|_ids?\b)|secret|passw(?:or)?d|credential|bearer)"
_SECRET_NAME = re.compile(rf"(-{{0,2}}[\w.-]*{_SECRET_WORD}[\w.-]*)(\s*[=:].*)?", re.IGNORECASE | re.DOTALL)
_SECRET_INSIDE = re.compile(rf"([\w.-]*{_SECRET_WORD}[\w.-]*[\"']?\s*[=:]\s*[\"']?)[^\s\"',&}}]+", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:sk-|hf_|ghp_|gho_|github_pat_|xox[abp]-|tml-|AKIA|eyJ)[A-Za-z0-9._-]{8,}")
_URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


def receipt(
    *,
    argv: Sequence[str],
    config_digest: str,
    data_files: Mapping[str, Path] | None = None,
    model_fingerprint: str | None = None,
    torch_facts: Mapping[str, Any] | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> dict[str, Any]:
    """Everything run.json says about how the run was started, as JSON values.

    Args:
        data_files: role (`train_file`) -> file; each is hashed.
        torch_facts: version, threads, device, determinism: what the caller, who has torch loaded, knows of it.

    Raises:
        RunError: a data file cannot be read.
    """
    return {
        "version": model_foundry.__version__,
        "code": {"sha256": code_digest(_PACKAGE_ROOT), "git": git_state(_PACKAGE_ROOT)},
        "config_digest": config_digest,
        "data": {role: _data_facts(path) for role, path in (data_files or {}).items()},
        "model_fingerprint": model_fingerprint,
        "packages": installed_packages(),
        "machine": machine_facts(),
        "torch": dict(torch_facts) if torch_facts is not None else None,
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "argv": scrub(argv),
        "working_directory": str(Path.cwd()),
        "clock": {"started": clock().isoformat(timespec="seconds")},
    }


def code_digest(package_root: Path) -> str:
    """SHA-256 over the names and contents of everything in the package but caches."""
    digest = hashlib.sha256()
    for path in sorted(package_root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            name = path.relative_to(package_root).as_posix()
            digest.update(f"{len(name)}:{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def git_state(package_root: Path) -> dict[str, Any] | None:
    """Revision of the checkout that holds the package, and whether it has changes; None outside one or without git."""
    git = shutil.which("git")
    if git is None:
        return None
    # --git-dir of a parent that merely contains a virtual environment would name somebody else's revision.
    if not _run_git(git, package_root, "ls-files", "--", "__init__.py"):
        return None
    revision = _run_git(git, package_root, "rev-parse", "HEAD")
    changes = _run_git(git, package_root, "status", "--porcelain", "--untracked-files=normal", "--", ".")
    return {"revision": revision.strip(), "dirty": bool(changes.strip())} if revision else None


def installed_packages() -> dict[str, str]:
    """Name -> version of every distribution this interpreter sees; what pip freeze would print."""
    packages: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.name
        if name and name not in packages:  # the first on the path is the one that is imported
            packages[name] = distribution.version
    return dict(sorted(packages.items(), key=lambda item: item[0].lower()))


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system and Python; no host or user name."""
    info = _key_values(Path("/proc/cpuinfo"))
    cores = {(info.get("physical id", ["0"])[0], core) for core in info.get("core id", [])}
    return {
        "cpu": next(iter(info.get("model name", [])), None) or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "physical_cores": len(cores) or None,
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def scrub(argv: Iterable[str]) -> list[str]:
    """A command line without what looks like a secret: values named token, secret, key or password, known key shapes,
    passwords in addresses."""
    scrubbed: list[str] = []
    is_next_secret = False
    for argument in argv:
        named = _SECRET_NAME.fullmatch(argument)
        if is_next_secret and not argument.startswith("-"):
            scrubbed.append(SCRUBBED)
        elif named is not None and named[2] is not None:
            scrubbed.append(f"{named[1]}={SCRUBBED}")
        else:
            text = _SECRET_VALUE.sub(SCRUBBED, _SECRET_INSIDE.sub(rf"\1{SCRUBBED}", argument))
            scrubbed.append(_URL_PASSWORD.sub(rf"\1{SCRUBBED}@", text))
        is_next_secret = named is not None and named[2] is None and argument.startswith("-")
    return scrubbed


def _data_facts(path: Path) -> dict[str, Any]:
    try:
        record = hash_file(path)
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    return {"path": str(path), "size_bytes": record.size_bytes, "sha256": record.sha256}


def _run_git(git: str, folder: Path, *arguments: str) -> str:
    # optional-locks off: a receipt must not write to somebody's index, nor wait for one who does.
    command = [git, "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _key_values(path: Path) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            values.setdefault(key.strip(), []).append(value.strip())
    return values
