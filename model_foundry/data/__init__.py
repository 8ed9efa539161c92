"""Rows in files to batches of tokens: formats, rows, tokenise, batches. Never imports torch."""
