"""`python -m tests.tiers TIER… [--short] [--report FILE]`: run tiers one after the other, write what came of them.

Exit code 0: every tier passed. 1: one did not, or trained nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.tiers import full, real_model, workflow
from tests.tiers.record import Tier

TIERS: dict[str, tuple[Callable[..., None], int]] = {
    "workflow": (workflow.run, workflow.LIMIT_SECONDS),
    "real-model": (real_model.run, real_model.LIMIT_SECONDS),
    "mlx": (full.run_mlx, full.LIMIT_SECONDS),
    "ollama": (full.run_ollama, full.LIMIT_SECONDS),
}
SHORTENED = {"mlx", "ollama"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description=__doc__)
    parser.add_argument("tiers", nargs="+", choices=TIERS)
    parser.add_argument("--short", action="store_true", help="fewer steps and questions in the full tiers")
    parser.add_argument("--out", type=Path, default=Path("runs/e2e"), help="folder for runs and report.json")
    options = parser.parse_args(arguments)
    done = [run_tier(name, options.out.resolve(), short=options.short) for name in options.tiers]
    path = write_report(options.out.resolve(), done, short=options.short)
    for tier in done:
        over = f", over the {tier.limit_seconds} s it should take" if tier.seconds > tier.limit_seconds else ""
        print(f"{tier.name}: {'failed' if tier.failures else 'passed'} in {tier.seconds:.0f} s{over}")
        for why in tier.failures:
            print(f"  {why}")
        for what in tier.missing:
            print(f"  missing, left out: {what}")
    print(f"report: {path}")
    return int(any(tier.failures for tier in done))


def run_tier(name: str, out: Path, *, short: bool = False) -> Tier:
    """One tier, in an empty folder of its own."""
    action, limit_seconds = TIERS[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}:", flush=True)
    tier = Tier(name, folder, limit_seconds)
    started = time.monotonic()
    action = partial(action, short=short) if name in SHORTENED else action
    action(tier)
    tier.seconds = time.monotonic() - started
    return tier


def write_report(out: Path, done: Sequence[Tier], *, short: bool) -> Path:
    report: dict[str, Any] = {
        "passed": not any(tier.failures for tier in done),
        "short": short,
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "tiers": [tier.as_dict() for tier in done],
    }
    path = out / "report.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
