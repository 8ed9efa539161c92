"""A service that is not there."""

from __future__ import annotations

import time

import pytest

from model_foundry.client.service_client import ServiceClient
from model_foundry.errors import ServiceUnreachableError


@pytest.mark.slow
def test_a_wrong_address_is_known_sooner_than_a_restart_is_waited_for() -> None:
    """Prevents five minutes of silence after a mistyped port."""
    began = time.monotonic()
    with pytest.raises(ServiceUnreachableError, match="Start it"):
        ServiceClient(base_url="http://127.0.0.1:9", api_key="tml-x", patience_seconds=300)
    assert time.monotonic() - began < 20
