"""The random model that the recipes' tests train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for an adapter on frozen weights to learn eight answers by heart."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    return write_tiny_model(folder, hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
