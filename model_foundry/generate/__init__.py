"""Questions for code we already have, asked of a paid API so that no request is paid for twice.

`prompts` words a request, `pricing` and `estimate` say what it may cost, `ledger` writes down every step before it is
taken, `client` speaks to the API, `batches` and `messages` send and collect, `replies` reads what came back, `dataset`
makes rows of it, and `run` is the order of it all.
"""
