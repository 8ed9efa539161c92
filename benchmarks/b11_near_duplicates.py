"""B11: which of 100,000 chat rows nearly repeat an earlier one (Jaccard 0.8 of word triples), on one core.

From texts in memory to which rows go: normalising, sets, signatures, candidates. Beside datasketch as documented and at
its quickest (in bulk, xxHash), and rensa's deduplicator, all with 128 permutations. The truth is that of comparing all
pairs of rows that were copied from each other; agreement is the share of rows on which a tool decides as it does.
Seconds are told by the clock on the wall and of the processor, for busy machines.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.copied_rows import make_rows, true_duplicates, write_texts
from benchmarks.harness import BenchmarkError, Peer, Result, Rounds, parse, report, run_rounds, say, table

NUM_ROWS = 100_000
THRESHOLD = 0.8
WAYS = ("ours", "datasketch", "datasketch-best", "rensa")
MIN_AGREEMENT = 0.98


def main(arguments: Sequence[str]) -> int:
    options = replace(parse(arguments, about=__doc__, num_rows=NUM_ROWS), num_threads=1)
    rows = make_rows(num_rows=options.num_rows, seed=options.seed)
    megabytes = sum(map(len, rows.texts)) / 1e6
    truth = set(true_duplicates(rows, threshold=THRESHOLD))
    say(f"{options.num_rows:,} rows, {megabytes:.1f} MB, {len(truth):,} duplicates")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        write_texts(path, rows.texts)
        spec = {"rows": str(path), "threshold": THRESHOLD}
        peers = [Peer(way, "near_duplicates", {**spec, "way": way}) for way in WAYS]
        rounds = run_rounds(options.choose(peers), options=options)
    found = {name: set(results[0]["duplicates"]) for name, results in rounds.results.items()}
    num_rows = options.num_rows
    figures: dict[str, Any] = {
        "megabytes": megabytes,
        "seconds": {name: rounds.median(name, seconds) for name in found},
        "cpu_seconds": {name: rounds.median(name, cpu_seconds) for name in found},
        "cpu_seconds_without_making_sets": {name: rounds.median(name, sketch_seconds) for name in found},
        "agreement_with_all_pairs": {name: 1 - len(rows_of ^ truth) / num_rows for name, rows_of in found.items()},
        "missed": {name: len(truth - rows_of) for name, rows_of in found.items()},
        "wrongly_dropped": {name: len(rows_of - truth) for name, rows_of in found.items()},
        "peak_megabytes": {name: results[0]["peak_bytes"] / 1e6 for name, results in rounds.results.items()},
    }
    if "ours" in found:
        others = [name for name in found if name != "ours"]
        figures["ratio"] = {name: rounds.ratio(name, "ours", seconds) for name in others}
        figures["cpu_ratio"] = {name: rounds.ratio(name, "ours", cpu_seconds) for name in others}
        figures["agreement_with_ours"] = {name: 1 - len(found[name] ^ found["ours"]) / num_rows for name in others}
        if figures["agreement_with_all_pairs"]["ours"] < MIN_AGREEMENT:
            raise BenchmarkError(f"ours decides otherwise than comparing all pairs: {figures}")
    report("b11", figures=figures, rounds=rounds, options=options)
    table(
        ["peer", "seconds", "processor s", "of which sets", "ours is faster by", "agreement", "missed", "wrong", "MB"],
        [line(name, figures, rounds) for name in found],
    )
    return 0


def line(name: str, figures: dict[str, Any], rounds: Rounds) -> list[str]:
    processor = figures["cpu_seconds"][name]
    ratio = figures.get("cpu_ratio", {}).get(name)
    return [
        name,
        f"{figures['seconds'][name]:.2f}",
        f"{processor:.2f}",
        f"{statistics.median(result['set_cpu_seconds'] for result in rounds.results[name]):.2f}",
        "" if ratio is None else f"{ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f})",
        f"{figures['agreement_with_all_pairs'][name]:.4f}",
        str(figures["missed"][name]),
        str(figures["wrongly_dropped"][name]),
        f"{figures['peak_megabytes'][name]:.0f}",
    ]


def seconds(result: Result) -> float:
    return result["seconds"]


def cpu_seconds(result: Result) -> float:
    return result["cpu_seconds"]


def sketch_seconds(result: Result) -> float:
    return result["cpu_seconds"] - result["set_cpu_seconds"]
