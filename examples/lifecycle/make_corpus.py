"""Write a corpus of real English: what the documentation strings of installed packages say, one document each.

    python examples/lifecycle/make_corpus.py --out corpus.jsonl [numpy scipy ...]

Nothing is downloaded: the packages are there because the pinned environment has them, so everybody gets the same text.
They are read as text and never imported. Paragraphs of code are left out. Needs Python's standard library alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("numpy", "scipy", "pandas", "networkx", "sympy")
MIN_CHARS = 160
NOT_PROSE = (">>>", "...  ", "===", "***")
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(package: Path) -> Iterator[str]:
    """The docstrings of a package's files that are long enough, in the order of their paths."""
    for path in sorted(package.rglob("*.py")):
        if "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files for another version of Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, HAS_DOCSTRING) and (text := prose(ast.get_docstring(node) or "")):
                yield text


def prose(docstring: str) -> str:
    """The paragraphs that hold no code; nothing where too little is left."""
    paragraphs = [each.rstrip() for each in docstring.split("\n\n")]
    kept = "\n\n".join(each for each in paragraphs if each and not any(mark in each for mark in NOT_PROSE))
    return kept if len(kept) >= MIN_CHARS else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("packages", nargs="*", default=PACKAGES)
    options = parser.parse_args()
    site = Path(sysconfig.get_paths()["purelib"])
    missing = [name for name in options.packages if not (site / name).is_dir()]
    if missing:
        raise SystemExit(f"{site} has no {', '.join(missing)}; run: make setup")
    warnings.simplefilter("ignore", SyntaxWarning)
    seen: set[str] = set()
    num_chars = 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    part = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    with open(part, "w", encoding="utf-8") as file:
        for name in options.packages:
            for text in documents(site / name):
                if text not in seen:
                    seen.add(text)
                    num_chars += len(text)
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    part.replace(options.out)
    print(f"{options.out}: {len(seen):,} documents, {num_chars / 1e6:.1f} MB, from {', '.join(options.packages)}")


if __name__ == "__main__":
    main()
