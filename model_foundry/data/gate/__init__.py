"""The gate: what is wrong with data is said before it is trained on, with the rows named.

It looks at the rows as read, and at the datums that the engine would get of them: the real renderer's tokens and
weights, not a second opinion on what they ought to be. `judge.examine` does it all; `verdict` is what comes out.
"""
