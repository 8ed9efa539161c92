"""Architectures, weights and where they come from. Nothing here knows training, text or a configuration file."""
