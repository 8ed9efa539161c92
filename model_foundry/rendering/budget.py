"""What one rendering of a chat template may still use: time, output, and the size of any one value."""

from __future__ import annotations

import time
from typing import Any

from jinja2.sandbox import SecurityError

MAX_CPU_SECONDS = 3.0


class Budget:
    """What one rendering may still use. Sizes are characters plus one for every value inside a container."""

    def __init__(self, num_input_chars: int) -> None:
        self.max_size = 1_000_000 + 8 * num_input_chars
        self.num_emitted_chars = 0
        self._num_steps = 0
        self._deadline = time.thread_time() + MAX_CPU_SECONDS + num_input_chars / 1e6

    def step(self) -> None:
        """Count one iteration or call. The time is that of this thread alone: a busy machine refuses nothing."""
        self._num_steps += 1
        if self._num_steps % 32 == 0:
            self._check_time()

    def emit(self, num_chars: int) -> None:
        self.num_emitted_chars += num_chars
        if self.num_emitted_chars > self.max_size:
            raise SecurityError(f"the chat template writes more than {self.max_size:,} characters")

    def allow(self, size: int) -> None:
        """Refuse a value of `size` before it is made."""
        if size > 100_000:
            self._check_time()
            if size > self.max_size:
                raise SecurityError(f"the chat template makes a value of more than {self.max_size:,} characters")

    def _check_time(self) -> None:
        if time.thread_time() > self._deadline:
            raise SecurityError("the chat template does not come to an end")

    def weigh(self, value: Any) -> int:
        """Size of a value with everything in it, shared parts counted each time; refuses what is too big."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                total += 1 + len(item)
            elif isinstance(item, (list, tuple)):
                total += 1 + len(item)
                stack.extend(item)
            elif isinstance(item, dict):
                total += 1 + 2 * len(item)
                stack.extend(item.keys())
                stack.extend(item.values())
            else:
                total += 1
            if total > self.max_size:
                break
        self.allow(total)
        return total
