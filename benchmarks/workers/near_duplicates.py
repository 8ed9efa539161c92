"""Near-duplicates among texts in memory, by ours, datasketch or rensa: which rows go, and how long it took.

Every way uses one core and the same sets: word triples of the lower-cased text. The peers' sets are made with Python's
`re` and `zip`, as their users make them; that part is timed by itself as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.copied_rows import TOKEN, read_texts
from benchmarks.workers.process import resident_bytes, run_worker, settle_memory

NUM_PERM = 128


def use_one_core() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def shingled(texts: list[str]) -> list[list[str]]:
    sets = []
    for text in texts:
        words = TOKEN.findall(text.lower())
        triples = zip(words, words[1:], words[2:], strict=False)
        sets.append(list({f"{one} {two} {three}" for one, two, three in triples}))
    return sets


def ours(texts: list[str], threshold: float) -> tuple[list[int], float]:
    from model_foundry.data.dedup import find_duplicates

    found = find_duplicates(texts, threshold=threshold)
    kept = set(found.kept.tolist())
    return [index for index in range(len(texts)) if index not in kept], 0.0


def datasketch(texts: list[str], threshold: float) -> tuple[list[int], float]:
    """As its documentation shows it: `update` for each member, query, insert what is new."""
    from datasketch import MinHash

    def sketch(members: list[str]) -> MinHash:
        made = MinHash(num_perm=NUM_PERM)
        for member in members:
            made.update(member.encode())
        return made

    sets, seconds = _timed(shingled, texts)
    return _first_come((sketch(members) for members in sets), threshold), seconds


def datasketch_best(texts: list[str], threshold: float) -> tuple[list[int], float]:
    """Its quickest way: sets in bulk, and xxHash in place of SHA-1."""
    import xxhash
    from datasketch import MinHash

    sets, seconds = _timed(shingled, texts)
    encoded = ([member.encode() for member in members] for members in sets)
    sketches = MinHash.generator(encoded, num_perm=NUM_PERM, hashfunc=xxhash.xxh32_intdigest)
    return _first_come(sketches, threshold), seconds


def _first_come(sketches: Any, threshold: float) -> list[int]:
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=NUM_PERM)
    duplicates = []
    for number, sketch in enumerate(sketches):
        if index.query(sketch):
            duplicates.append(number)
        else:
            index.insert(number, sketch)
    return duplicates


def rensa(texts: list[str], threshold: float) -> tuple[list[int], float]:
    package: Any = importlib.import_module("rensa")  # it comes without types

    sets, seconds = _timed(shingled, texts)
    keeper = package.RMinHashDeduplicator(threshold=threshold, num_perm=NUM_PERM, use_lsh=True)
    kept = keeper.add_pairs((str(number), members) for number, members in enumerate(sets))
    return [number for number, keep in enumerate(kept) if not keep], seconds


def _timed(function: Callable[[list[str]], Any], texts: list[str]) -> tuple[Any, float]:
    started = time.process_time()
    return function(texts), time.process_time() - started


WAYS: dict[str, tuple[str, Callable[[list[str], float], tuple[list[int], float]]]] = {
    "ours": ("numpy", ours),
    "datasketch": ("datasketch", datasketch),
    "datasketch-best": ("datasketch", datasketch_best),
    "rensa": ("rensa", rensa),
}
"""Name -> (the package whose version is told, what finds the duplicates and the seconds that making sets took)."""


def find(spec: dict[str, Any]) -> dict[str, Any]:
    use_one_core()
    package, way = WAYS[spec["way"]]
    texts = read_texts(spec["rows"])
    way(texts[:200], spec["threshold"])  # imports, and tables that are made once
    before = settle_memory()
    wall, processor = time.perf_counter(), time.process_time()
    duplicates, set_seconds = way(texts, spec["threshold"])
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "set_cpu_seconds": set_seconds,
        "duplicates": duplicates,
        "peak_bytes": resident_bytes("VmHWM") - before,
        "versions": {package: importlib.metadata.version(package)},
    }


if __name__ == "__main__":
    run_worker(find)
