"""Size caps: a file fits in one sitting, a function on one screen."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES_PER_FILE = 500
MAX_LINES_PER_FUNCTION = 80


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("model_foundry", "benchmarks", "tests")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_files_stay_under_the_cap() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = [f"{path.relative_to(ROOT)}: {num} lines" for path, num in lengths.items() if num > MAX_LINES_PER_FILE]
    assert not long, "\n".join(long)


def test_functions_stay_under_the_cap() -> None:
    long = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_LINES_PER_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {num_lines} lines")
    assert not long, "\n".join(long)


def test_nothing_large_is_committed() -> None:
    """Weights and corpora are fetched, never committed: a clone must stay small."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = [ROOT / name for name in listing.stdout.split("\0") if name]
    large = [str(path) for path in tracked if path.is_file() and path.stat().st_size > 1_000_000]
    assert not large, large
