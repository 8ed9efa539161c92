"""Where the rows of a packed batch lie, which of them are computed together, and what each token must not see.

Rows stand end to end. Short ones of similar length are stacked (padded on the right, which causality hides) to make
fewer, larger products. A row may end in branches that go on from one beginning and do not see each other. It knows no
queries, keys or values.

Shapes: N packed tokens, S rows of a group, T their length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

QUERY_BLOCK_TOKENS = 256
"""Rows of queries a product; larger blocks compute more of the masked triangle, smaller ones make small products."""
STACK_TOKENS = 8192
"""A stack of short rows holds at most this many tokens with its padding."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows computed together.

    Attributes:
        index: int64 [S, T], which packed token stands where (padding repeats the last); None: rows of one length that
            lie one after the other from `start` on, so that nothing needs to be looked up.
        valid: bool [S, T], which places are no padding; None without any.
        branch: int64 [S, T], the branch that a place belongs to, 0 before them; None where no row has any.
        num_shared: tokens before the first branch of all the rows.
    """

    index: torch.Tensor | None
    valid: torch.Tensor | None
    start: int
    rows: tuple[int, ...]
    num_tokens: int
    branch: torch.Tensor | None = None
    num_shared: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def moved(self, *, rows: int, tokens: int) -> RowGroup:
        """The same group in a batch with so many rows and tokens before it."""
        index = None if self.index is None else self.index + tokens
        start = self.start if self.index is not None else self.start + tokens
        return replace(self, index=index, start=start, rows=tuple(row + rows for row in self.rows))

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The group's part of packed x [N, ..]: [S·T, ..]."""
        if self.index is None:
            return x[self.start : self.start + self.num_rows * self.num_tokens]
        return x[self.index.view(-1)]


@dataclass(slots=True)
class PackedRows:
    """Where each row of a packed batch lies, how rows are grouped, and the causal masks, shared by all layers."""

    lengths: tuple[int, ...]
    groups: tuple[RowGroup, ...]
    positions: torch.Tensor
    branches: tuple[tuple[int, ...], ...] = ()
    _masks: dict[tuple[int | None, ...], torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        branches: Sequence[tuple[int, ...]] = (),
    ) -> PackedRows:
        """Lay out rows of these lengths one after the other.

        Args:
            branches: of each row, the lengths of the parts that it ends with; () for none in any row.
        """
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        forks = tuple(branches) or ((),) * len(lengths)
        positions = torch.cat([_positions(*row) for row in zip(lengths, forks, strict=True)]).to(device)
        order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
        groups: list[RowGroup] = []
        stack: list[int] = []
        for row in order:
            if stack and not _stackable(lengths[stack[0]], lengths[row], len(stack) + 1):
                groups.append(_group(stack, lengths, starts, forks, device))
                stack = []
            stack.append(row)
        groups.append(_group(stack, lengths, starts, forks, device))
        return cls(tuple(lengths), tuple(groups), positions, forks)

    @classmethod
    def joined(
        cls, parts: Sequence[PackedRows], *, alike: Callable[[int, int], bool] = lambda num_tokens, num_rows: False
    ) -> PackedRows:
        """Parts one after the other, each with its own groups, so that none's depend on the others.

        Args:
            alike: whether so many rows of one length are computed the same together; neighbouring groups then are one.
        """
        groups: list[RowGroup] = []
        first_row = first_token = 0
        for part in parts:
            groups += [group.moved(rows=first_row, tokens=first_token) for group in part.groups]
            first_row, first_token = first_row + len(part.lengths), first_token + sum(part.lengths)
        groups = [group for run in _runs(groups) for group in _stacked(run, alike)]
        lengths = tuple(length for part in parts for length in part.lengths)
        forks = tuple(fork for part in parts for fork in part.branches)
        return cls(lengths, tuple(groups), torch.cat([part.positions for part in parts]), forks)

    def fork_mask(
        self, group: RowGroup, first_query: int, end: int, first_key: int, window: int | None
    ) -> torch.Tensor:
        """bool [S, queries, keys from `first_key` to `end`], True where a query of a group with branches must not look:
        later, in another branch, or too far back.
        """
        key = (group.rows[0], first_query, end, first_key, window)
        if key not in self._masks:
            assert group.branch is not None
            place = torch.arange(end, device=self.positions.device)
            hidden = (place[None, first_key:] > place[first_query:, None])[None]
            mine, theirs = group.branch[:, first_query:end, None], group.branch[:, None, first_key:end]
            hidden = hidden | ((theirs != 0) & (theirs != mine))
            if window is not None:
                where = group.of(self.positions).view(group.num_rows, group.num_tokens)
                hidden |= where[:, None, first_key:end] <= where[:, first_query:end, None] - window
            self._masks[key] = hidden
        mask = self._masks[key]
        assert mask is not None
        return mask

    def mask(self, first_query: int, num_queries: int, first_key: int, window: int | None) -> torch.Tensor | None:
        """bool [num_queries, keys up to the block's end], True where a query must not look; None where all may."""
        key = (first_query, num_queries, first_key, window)
        if key not in self._masks:
            device = self.positions.device
            query = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
            keys = torch.arange(first_key, first_query + num_queries, device=device)[None, :]
            hidden = keys > query
            if window is not None:
                hidden |= keys <= query - window
            self._masks[key] = hidden if bool(hidden.any()) else None
        return self._masks[key]


def _runs(groups: Sequence[RowGroup]) -> list[list[RowGroup]]:
    """Neighbours whose rows have one length, as `_stackable` asks."""
    runs: list[list[RowGroup]] = []
    for group in groups:
        if runs and _goes_on(runs[-1], group):
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def _goes_on(run: Sequence[RowGroup], group: RowGroup) -> bool:
    last, length = run[-1], group.num_tokens
    num_rows = sum(each.num_rows for each in run) + group.num_rows
    plain = all(each.index is None and each.branch is None for each in (last, group))
    follows = last.num_tokens == length and group.start == last.start + last.num_rows * length
    return plain and follows and _stackable(length, length, num_rows)


def _stacked(run: list[RowGroup], alike: Callable[[int, int], bool]) -> list[RowGroup]:
    rows = tuple(row for group in run for row in group.rows)
    sizes = {len(rows), *(group.num_rows for group in run)}
    if len(run) == 1 or not all(alike(run[0].num_tokens, size) for size in sorted(sizes)):
        return run
    return [replace(run[0], rows=rows)]


def _stackable(shortest: int, longest: int, num_rows: int) -> bool:
    """Whether padding to `longest` costs little: at most an eighth, or a few tokens."""
    return (
        longest <= QUERY_BLOCK_TOKENS
        and longest - shortest <= max(8, longest // 8)
        and (longest * num_rows <= STACK_TOKENS)
    )


def _positions(length: int, branches: tuple[int, ...]) -> torch.Tensor:
    """int64 [T]: where each token of a row stands; every branch counts on from the same place."""
    shared = length - sum(branches)
    return torch.cat([torch.arange(shared), *(torch.arange(shared, shared + size) for size in branches)])


def _branch_of(length: int, branches: tuple[int, ...], width: int) -> torch.Tensor:
    """int64 [width]: 0, then the number of each branch; what pads the row belongs to its last."""
    sizes = torch.tensor([length - sum(branches), *branches])
    number = torch.arange(len(sizes)).repeat_interleave(sizes)
    return torch.cat([number, number[-1:].expand(width - length)])


def _group(
    rows: list[int],
    lengths: Sequence[int],
    starts: list[int],
    forks: Sequence[tuple[int, ...]],
    device: torch.device | str,
) -> RowGroup:
    width = max(lengths[row] for row in rows)
    branch, shared = None, 0
    if any(forks[row] for row in rows):
        branch = torch.stack([_branch_of(lengths[row], forks[row], width) for row in rows]).to(device)
        shared = min(lengths[row] - sum(forks[row]) for row in rows)
    if all(lengths[row] == width and row == rows[0] + place for place, row in enumerate(rows)):
        return RowGroup(None, None, starts[rows[0]], tuple(rows), width, branch, shared)
    index = torch.stack([starts[row] + torch.arange(width).clamp(max=lengths[row] - 1) for row in rows])
    length = torch.tensor([lengths[row] for row in rows])[:, None]
    valid = torch.arange(width)[None, :] < length
    padded = not bool(valid.all())
    return RowGroup(
        index=index.to(device),
        valid=valid.to(device) if padded else None,
        start=-1,
        rows=tuple(rows),
        num_tokens=width,
        branch=branch,
        num_shared=shared,
    )
