"""Token buckets and keys: rates hold over time, and a record never holds its key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_foundry.errors import ConfigError
from model_foundry.server.security import Buckets, Keys, add_key, load_keys, read_keys
from model_foundry.server.stats import Stats


def test_a_burst_is_let_through_and_then_the_rate() -> None:
    now = [0.0]
    buckets = Buckets(clock=lambda: now[0])

    def take() -> float:
        return buckets.take("a", per_minute=60, burst=3)

    assert [take() for _ in range(3)] == [0, 0, 0]
    assert take() == pytest.approx(1.0)
    now[0] = 0.4
    assert take() == pytest.approx(0.6), "asking again does not set the wait back"
    now[0] = 1.0
    assert take() == 0
    now[0] = 100.0
    assert [take() for _ in range(4)] == [0, 0, 0, pytest.approx(1.0)], "rest does not save up more than the burst"
    assert buckets.take("b", per_minute=60, burst=1) == 0


def test_clients_without_number_do_not_fill_the_memory() -> None:
    buckets = Buckets(clock=lambda: 0.0, most=100)
    for number in range(10_000):
        buckets.take(str(number), per_minute=1, burst=1)
    assert len(buckets._levels) == 100


def test_a_key_is_found_and_another_is_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "me", rate=5, burst=None, admin=True)
    found = load_keys(path, {}).find(key)
    assert found is not None
    assert (found.name, found.admin, found.requests_per_minute) == ("me", True, 5)
    keys = Keys(read_keys(path))
    for wrong in ("", key[:-1], key + "x", key.upper(), found.sha256, "\ud800"):
        assert keys.find(wrong) is None
    assert key not in json.dumps(json.loads(path.read_text()))


def test_a_missing_file_is_told_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="foundry serve keys add"):
        load_keys(tmp_path / "none.json", {})


def test_stats_of_the_last_minute_forget() -> None:
    now = [0.0]
    stats = Stats(clock=lambda: now[0])
    for second in range(90):
        now[0] = float(second)
        stats.answered(route="/generate", method="POST", status=200, seconds=2.0, counts=True)
    shown = stats.as_dict()
    assert shown["total_requests"] == 90
    assert shown["requests_per_minute"] == 61
    assert shown["average_latency"] == 2.0
    assert shown["uptime"] == 89.0
