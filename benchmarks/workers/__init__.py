"""Programs that run one peer once, each in a process of its own: `python -m benchmarks.workers.NAME SPEC RESULT`."""
