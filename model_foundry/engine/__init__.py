"""Tokens in, numbers out: the contract (`base`), the torch engine, losses and sampling."""
