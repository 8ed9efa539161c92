"""One service for all conformance tests that need none of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service_rig import Service

os.environ.setdefault("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="session")
def service(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    state = tmp_path_factory.mktemp("service") / "state"
    # Every test of the process makes models by one key; how many a key may have is another test's affair.
    with Service(tiny_folder("llama-tied"), state, "dtype=float32", "max_models_per_key=10000") as running:
        yield running
