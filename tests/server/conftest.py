"""One small model with a chat template and an adapter, served once for most tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.serving import Served, serving
from tests.tiny_exports import make_subject


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `base` and `final/adapter` over it."""
    folder = tmp_path_factory.mktemp("served")
    make_subject(folder)
    return folder


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose greedy answers never end: the head's rows of the control tokens are zero, and others are larger."""
    folder = tmp_path_factory.mktemp("endless")
    make_subject(folder)
    weights = load_file(folder / "base" / "model.safetensors")
    weights["lm_head.weight"][:3] = 0
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    return folder / "base"


@pytest.fixture(scope="session")
def served(tiny: Path) -> Iterator[Served]:
    """`final` (tuned) and `base`, without keys."""
    with serving(tiny / "final" / "adapter", served_name="tuned") as each:
        yield each
