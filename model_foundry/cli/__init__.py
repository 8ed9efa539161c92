"""The command line: a lazy table of verbs in `main`, one small file per verb, no work of its own."""
