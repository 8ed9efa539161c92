"""What locust's clients do: ask a question that nobody has asked, read the answer, ask the next.

A file for locust: it is loaded by `locust -f`, in a process that must not import torch.
"""

from __future__ import annotations

import os
import random

from locust import FastHttpUser, task  # pyright: ignore[reportMissingTypeStubs]

from benchmarks.questions import question


class Reader(FastHttpUser):
    """Never pauses: so many clients, so many requests under way. Whole answers: reading 16 streams token by token
    took a core of two from the server.
    """

    max_tokens = int(os.environ["FOUNDRY_LOAD_MAX_TOKENS"])
    network_timeout = connection_timeout = 300.0

    @task
    def ask(self) -> None:
        prompt = f"{random.getrandbits(48)}. {question(random.Random())}"
        body = {"prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0.0}
        with self.client.post("/generate", json=body, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
