"""Chats about the documentation of the packages installed here: real prose with code, tables and names in it.

Made anew from the docstrings of the environment that the benchmarks run in, the same for the same environment. A text
of a small made-up vocabulary would flatter whoever remembers words.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

MAX_ROW_BYTES = 1800
"""No token is shorter than a byte, so every row fits into 2,048 tokens."""
SHORTEST = 40
# Far apart in style, so that a run of a few megabytes is not all of one.
PACKAGES = (
    "numpy",
    "transformers",
    "torch",
    "pydantic",
    "rich",
    "jinja2",
    "datasets",
    "trl",
    "peft",
    "click",
    "tokenizers",
)


def write_chats(path: Path, *, num_bytes: int, seed: int = 0, without: Collection[str] = ()) -> int:
    """Write rows of the format messages, about `num_bytes` in all; the number of rows.

    Args:
        without: texts that no row may hold: control tokens, which some read as such and some as text.
    """
    chance = random.Random(seed)
    items = [(asked, answer) for asked, answer in _items() if not any(text in answer for text in without)]
    chance.shuffle(items)
    num_rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes and items:
            messages, room = [], MAX_ROW_BYTES
            for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 4))):
                if not items or sum(map(_num_bytes, items[-1])) > room:
                    break
                question, answer = items.pop()
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                room -= _num_bytes(question) + _num_bytes(answer) + 20
            if not messages:
                items.pop()  # longer than a row may be
                continue
            line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            num_rows += file.write(line) > 0
    return num_rows


def _num_bytes(text: str) -> int:
    return len(text.encode())


def _items() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("purelib"))
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    text = ast.get_docstring(node)
                    if text and len(text) >= SHORTEST:
                        yield f"What does `{node.name}` in {path.relative_to(root).as_posix()} do?", text
