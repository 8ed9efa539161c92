"""Clients of a training engine, by the method names of the tinker SDK, so that a recipe runs in-process or remote."""
