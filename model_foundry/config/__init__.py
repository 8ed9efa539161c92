"""Configuration: one frozen schema per command, filled from profiles, files, the environment and the command line.

Knows nothing of torch, of models or of what a field does; it knows names, types, bounds and where a value came from.
"""
