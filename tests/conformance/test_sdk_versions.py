"""Every version of the official SDK from 0.6 on runs the same flow and measures the same numbers, to the last bit.

The real wheels are fetched from the package index and put beside each other; each runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_foundry.checkpoint import atomic
from tests.service_rig import Service

FLOW = Path(__file__).with_name("sdk_flow.py")
IN_CI = ("0.6.0", "0.18.0", "0.25.0")
OTHERS = ("0.12.0", "0.15.0", "0.24.0", "0.26.0", "0.30.0", "0.36.0")
# What a version does not have a call for.
LACKS = {"0.6.0": {"resumed.optimizer", "listing.ttl"}, "0.12.0": {"listing.ttl"}}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def wheel(version: str) -> Path:
    """The folder of an unpacked wheel; its dependencies are those of the installed SDK."""
    home = Path(os.environ.get("FOUNDRY_HOME", "~/.cache/model-foundry")).expanduser() / "test-sdks"
    folder = home / f"tinker-{version}"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with atomic.atomic_directory(folder) as target:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
            subprocess.run([*command, f"tinker=={version}"], check=True, timeout=300)
    return folder


def measure(service: Service, out: Path, *, version: str | None) -> dict[str, Any]:
    path = {} if version is None else {"PYTHONPATH": str(wheel(version))}
    done = subprocess.run(
        [sys.executable, str(FLOW), service.url, str(service.base), str(out)],
        env={**os.environ, **path, "TINKER_API_KEY": f"tml-{version}"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


@pytest.fixture(scope="module")
def newest(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return flat(measure(service, tmp_path_factory.mktemp("newest") / "out.json", version=None))


def test_the_newest_measures_what_is_true(newest: dict[str, Any]) -> None:
    assert newest["first"][0] > newest["first"][2] > newest["forward"]
    assert newest["straight"] == newest["resumed.optimizer"]
    assert newest["resumed.weights"][0] == newest["straight"][0]
    assert newest["resumed.weights"][1] != newest["straight"][1]
    assert newest["listing.checkpoints"] == ["sampler_weights/served", "weights/kept"]
    assert newest["listing.deleted"] == ["sampler_weights/served"]
    assert newest["refusal"] == "user"


def check(version: str, service: Service, out: Path, newest: dict[str, Any]) -> None:
    got = flat(measure(service, out, version=version))
    assert newest.keys() - got.keys() == LACKS.get(version, set())
    assert got == {key: newest[key] for key in got}


@pytest.mark.parametrize("version", IN_CI)
def test_a_version_measures_the_same(version: str, service: Service, tmp_path: Path, newest: dict[str, Any]) -> None:
    """JSON or protobuf by content type and accept, never by version."""
    check(version, service, tmp_path / "out.json", newest)


@pytest.mark.prove
@pytest.mark.parametrize("version", OTHERS)
def test_every_version_measures_the_same(
    version: str, service: Service, tmp_path: Path, newest: dict[str, Any]
) -> None:
    check(version, service, tmp_path / "out.json", newest)
