"""JSON exchanges, exact to the field, that clients in other languages can be held against.

`vectors/exchanges.json` is a list of requests in order with their replies, and with `result` for what comes through the
future. `SESSION` and `BASE` stand for the session's id and the base's name; `ANY` for what differs from run to run.
Numbers agree to a thousandth: machines round differently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.service_rig import Service, finish

pytestmark = pytest.mark.slow
VECTORS = json.loads(Path(__file__).with_name("vectors").joinpath("exchanges.json").read_text())


def filled(value: Any, names: dict[str, str]) -> Any:
    text = json.dumps(value)
    for name, meant in names.items():
        text = text.replace(name, meant)
    return json.loads(text)


def differences(got: Any, want: Any, where: str) -> list[str]:
    """Where two replies differ, by path."""
    if want == "ANY":
        return []
    if isinstance(want, dict) and isinstance(got, dict):
        missing = [f"{where}.{key} is only in one of them" for key in sorted(got.keys() ^ want.keys())]
        return missing + [
            d for key in got.keys() & want.keys() for d in differences(got[key], want[key], f"{where}.{key}")
        ]
    if isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        return [
            d for place, pair in enumerate(zip(got, want, strict=True)) for d in differences(*pair, f"{where}[{place}]")
        ]
    if isinstance(want, float) and isinstance(got, float):
        return [] if got == pytest.approx(want, rel=1e-3, abs=1e-4) else [f"{where} is {got}, not {want}"]
    return [] if type(got) is type(want) and got == want else [f"{where} is {got!r}, not {want!r}"]


def test_replies_are_those_of_the_vectors(service: Service) -> None:
    """A field renamed, left out or of another type breaks clients that nobody here runs."""
    names = {"BASE": str(service.base)}
    found = []
    with service.api("tml-vectors") as api:
        for number, exchange in enumerate(VECTORS):
            answer = api.request(
                exchange["method"], filled(exchange["path"], names), json=filled(exchange["body"], names)
            )
            reply: Any = answer.json() if answer.content else None
            if exchange["path"] == "create_session":
                names["SESSION"] = reply["session_id"]
            where = f"{number} {exchange['path']}"
            found += differences(answer.status_code, exchange["status"], f"{where}: status")
            found += differences(reply, filled(exchange["reply"], names), where)
            if "result" in exchange:
                found += differences(finish(api, answer), filled(exchange["result"], names), f"{where}: result")
    assert not found, "\n".join(found)
