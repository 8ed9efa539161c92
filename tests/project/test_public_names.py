"""The public names are these. Adding one is a decision, removing one breaks people's code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import model_foundry

PUBLIC = [
    "__version__",
    "errors",
    "FoundryError",
    "AdamParams",
    "Datum",
    "LoraConfig",
    "Message",
    "SamplingParams",
    "load_config",
    "Resolved",
    "TrainConfig",
    "EvaluateConfig",
    "ChatConfig",
    "Tokenizer",
    "Renderer",
    "Engine",
    "TorchEngine",
    "TrainingClient",
    "ServiceClient",
]


def test_the_public_names_are_these() -> None:
    assert model_foundry.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(model_foundry))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(model_foundry, name)
    assert name == "__version__" or value.__doc__


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = model_foundry.Trainer


def test_type_checkers_see_the_same_names() -> None:
    """The names are imported lazily; the block for type checkers must not drift from the table."""
    tree = ast.parse(Path(str(model_foundry.__file__)).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(PUBLIC) - {"__version__"}


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys, model_foundry; print(*(n for n in sys.modules if n.startswith('model_foundry')))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["model_foundry"]
