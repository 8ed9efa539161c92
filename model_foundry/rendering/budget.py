"""What one rendering of a chat template may still use: time, output, and the size of what it makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from jinja2.sandbox import SecurityError

_VIEWS = tuple(type(view) for view in ({}.keys(), {}.values(), {}.items()))


class Budget:
    """Refuses by raising jinja2's SecurityError. Sizes are characters, plus one for every value in a container.

    Args:
        num_input_chars: size of what the template is given; every bound grows with it.
        max_cpu_seconds: time for a small input; a million characters give a second more.
    """

    def __init__(self, num_input_chars: int, *, max_cpu_seconds: float) -> None:
        self.max_size = 300_000 + 8 * num_input_chars
        self._num_emitted = 0
        self._num_made = 0
        self._num_steps = 0
        self._deadline = time.thread_time() + max_cpu_seconds + num_input_chars / 1e6

    def step(self) -> None:
        """Count one iteration or call. The time is that of this thread alone: a busy machine refuses nothing."""
        self._num_steps += 1
        if self._num_steps % 32 == 0:
            self._check_time()

    def emit(self, num_chars: int) -> None:
        """Count what is printed, in blocks and macros too."""
        self._num_emitted += num_chars
        if self._num_emitted > self.max_size:
            raise SecurityError(f"the chat template writes more than {self.max_size:,} characters")

    def allow(self, size: int) -> None:
        """Refuse a value of `size` before it is made."""
        if size > 50_000:
            self._check_time()
            if size > self.max_size:
                raise SecurityError(f"the chat template makes a value of more than {self.max_size:,} characters")

    def made(self, value: Any) -> Any:
        """Count a new value, and give it back. All that one rendering makes is bounded too."""
        if isinstance(value, str):
            size = len(value)
            self.allow(size)
        elif isinstance(value, (list, tuple, dict)):
            size = len(value)
            self.weigh(value)
        else:
            return value
        self._count_made(size)
        return value

    def joined(self, left: str, right: str) -> str:
        """`left + right`, counted: what chat templates do most."""
        size = len(left) + len(right)
        self.allow(size)
        self._count_made(size)
        return left + right

    def weigh(self, value: Any) -> int:
        """Size of a value with everything in it, shared parts counted each time; refuses what is too big."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                total += 1 + len(item)
            elif isinstance(item, (list, tuple, *_VIEWS)):
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

    def collect(self, values: Iterator[Any]) -> list[Any]:
        """The values of a generator, weighed as they come."""
        found, total = [], 0
        for value in values:
            total += self.weigh(value)
            self.allow(total)
            found.append(value)
        return found

    def _count_made(self, size: int) -> None:
        self._num_made += size
        if self._num_made > 200 * self.max_size:
            raise SecurityError("the chat template does not come to an end")

    def _check_time(self) -> None:
        if time.thread_time() > self._deadline:
            raise SecurityError("the chat template does not come to an end")
