"""Addresses that are none."""

from __future__ import annotations

import pytest

from model_foundry.errors import UsageError
from model_foundry.evals.served_target import ServedTarget


@pytest.mark.parametrize("url", [
    "http://host:abc", "http://[::1", "http://host:99999", "http://", "ftp://host", "http://a\x00b",
])  # fmt: skip
def test_an_address_that_is_none_is_said(url: str) -> None:
    """Odd ports and brackets ended as errors that nobody foresaw, with a traceback in a file."""
    with pytest.raises(UsageError, match="not an address of a server"):
        ServedTarget(url, key=None)
