"""B5: 16 tenants with short requests, through the official SDK, beside a loop over PEFT adapters.

`service` does short passes of several tenants as one, each with the bits that it would have alone; `service-alone` does
not. `engine` is our engine in process without the service, one model after another. The last two compare the service
with the engine on requests of a normal size: one tenant, 8 rows of 256 tokens.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from benchmarks.harness import Peer, Result, model_folder, parse, report, run_rounds, table

TENANTS = 16
SHORT = {"tenants": TENANTS, "rows": 1, "row_tokens": 32, "steps": 6, "rank": 8}
NORMAL = {"tenants": 1, "rows": 8, "row_tokens": 256, "steps": 4, "rank": 16}


def tokens_per_second(result: Result) -> float:
    """Real tokens of all tenants over the time from the first step after the warm-up to the last one's end."""
    return result["tokens"] / result["seconds"]


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__)
    common = {"model": str(model_folder(options)), "dtype": "bfloat16", "allocator": "tuned"}
    peers = [
        Peer("service", "tenants", {**common, **SHORT, "peer": "service"}),
        Peer("service-alone", "tenants", {**common, **SHORT, "peer": "service", "options": ["co_batching=off"]}),
        Peer("engine", "tenants", {**common, **SHORT, "peer": "engine"}),
        Peer("peft", "tenants", {**common, **SHORT, "peer": "peft"}),
        Peer("service-normal", "tenants", {**common, **NORMAL, "peer": "service"}),
        Peer("engine-normal", "tenants", {**common, **NORMAL, "peer": "engine"}),
    ]
    rounds = run_rounds(options.choose(peers), options=options)
    rates = {name: rounds.median(name, tokens_per_second) for name in rounds.results}
    ratios = {
        f"{above}/{below}": rounds.ratio(above, below, tokens_per_second)
        for above, below in (
            ("service", "peft"), ("service", "service-alone"), ("service", "engine"),
            ("service-normal", "engine-normal"),
        )
        if above in rates and below in rates
    }  # fmt: skip
    losses = {name: statistics.fmean(found[-1]["last_losses"]) for name, found in rounds.results.items()}
    table(
        ("peer", "tokens/s", "mean of the last losses a token"),
        [(name, f"{rate:.0f}", f"{losses[name]:.4f}") for name, rate in rates.items()],
    )
    print(json.dumps(ratios))
    report("b5", figures={"tokens_per_second": rates, "ratios": ratios}, rounds=rounds, options=options)
    return 0
