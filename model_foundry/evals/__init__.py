"""Questions, answers, scores, before and after, and the checks that a run must pass."""
