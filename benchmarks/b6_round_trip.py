"""B6: the round trip of a future that does nothing, and how long the event loop stands still under load.

The operation is a step by an optimizer that is not offered: accepted, journaled and synced, done in its order, refused
through the future. `plain` is one HTTP connection, `sdk` the official client; on `disk` the journal is where the
temporary folder is, on `memory` it is on /dev/shm. Under load, eight clients train while a ninth asks for the health
page; what it waits for is what the loop stands still.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Peer, Result, model_folder, parse, report, run_rounds, table


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=200)
    common = {"model": str(model_folder(options)), "calls": options.num_rows}
    peers = [
        Peer(f"{client}-{place}", "round_trip", {**common, "client": client, "place": place})
        for client, place in (("plain", "disk"), ("plain", "memory"), ("sdk", "disk"))
    ] + [Peer("load", "round_trip", {**common, "client": "load", "place": "disk"})]
    rounds = run_rounds(options.choose(peers), options=options)

    def percentile(share: float) -> dict[str, float]:
        def value(result: Result) -> float:
            ordered = sorted(result["milliseconds"])
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

        return {name: rounds.median(name, value) for name in rounds.results}

    p50, p99 = percentile(0.5), percentile(0.99)
    table(
        ("peer", "p50 ms", "p99 ms", "one sync ms"),
        [
            (
                name,
                f"{p50[name]:.1f}",
                f"{p99[name]:.1f}",
                f"{rounds.median(name, lambda r: r['sync_milliseconds']):.1f}",
            )
            for name in rounds.results
        ],
    )
    report("b6", figures={"p50_ms": p50, "p99_ms": p99}, rounds=rounds, options=options)
    return 0
