"""Signals mean what the innermost block says, and afterwards what they meant before."""

from __future__ import annotations

import os
import signal

import pytest

from model_foundry.recipes.interruption import leave_on_signals, stop_on_signals


def test_signals_mean_afterwards_what_they_meant_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with leave_on_signals(), stop_on_signals() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_asked()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), leave_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_meanwhile_stays_ignored() -> None:
    """A rank whose neighbour was killed ignores its launcher's SIGTERM until it has said so: on a slow machine the
    signal came while the run was being left, and ended it without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with leave_on_signals(), stop_on_signals():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
