"""From a trained run to files that others load, each measured against the one before it."""
