"""What fast means here, measured beside the tools people use today. One module a row; `make bench NAME=b1` runs one.

A benchmark is never a test: nothing in `make test` judges speed.
"""
