"""Loss a token by step, of every model: what the page draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_POINTS = 400


@dataclass(slots=True)
class Curve:
    """`points`: (step of this curve, loss a token). With too many, every second goes."""

    points: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    _loss: float = 0.0
    _num_tokens: int = 0
    _stride: int = 1

    def note_pass(self, loss: float, num_tokens: int) -> None:
        self._loss, self._num_tokens = self._loss + loss, self._num_tokens + num_tokens

    def note_step(self) -> None:
        """The passes since the last step make a point."""
        self.steps += 1
        if self._num_tokens and self.steps % self._stride == 0:
            self.points.append((self.steps, self._loss / self._num_tokens))
        self._loss, self._num_tokens = 0.0, 0
        if len(self.points) > MOST_POINTS:
            self.points, self._stride = self.points[1::2], self._stride * 2


class Curves:
    """By model; written by the worker's thread, read by the loop's.

    Args:
        so_far: (model, kind, loss, tokens) of passes and steps that were done before.
    """

    def __init__(self, so_far: Iterable[tuple[str, str, float | None, int | None]] = ()) -> None:
        self._curves: dict[str, Curve] = {}
        for model_id, kind, loss, num_tokens in so_far:
            if kind == "optim_step":
                self.of(model_id).note_step()
            elif loss is not None and num_tokens is not None:
                self.of(model_id).note_pass(loss, num_tokens)

    def of(self, model_id: str) -> Curve:
        return self._curves.setdefault(model_id, Curve())

    def forget(self, model_id: str) -> None:
        self._curves.pop(model_id, None)
