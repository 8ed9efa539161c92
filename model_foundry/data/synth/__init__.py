"""Synthetic rows for tests and demonstrations: the same bytes for the same seed, on every machine and Python."""
