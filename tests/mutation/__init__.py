"""Mutation testing: small faults put into the modules that must not be wrong, and tests that have to notice them."""
