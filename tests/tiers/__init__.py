"""The three tiers of end-to-end runs, each through the real command line, with a JSON report: `make test-e2e-…`."""
