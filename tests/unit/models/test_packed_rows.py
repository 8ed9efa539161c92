"""Which rows of a packed batch are computed together."""

from __future__ import annotations

from model_foundry.models.packed_rows import PackedRows


def test_rows_of_one_length_are_one_group_where_they_are_alike() -> None:
    """Attention call by call was half of what a pass of sixteen short requests had to do."""
    asked: list[tuple[int, int]] = []

    def alike(num_tokens: int, num_rows: int) -> bool:
        asked.append((num_tokens, num_rows))
        return num_rows < 4

    parts = [PackedRows.of(lengths) for lengths in ([32], [32], [32, 32], [48], [300], [300], [40, 48])]
    joined = PackedRows.joined(parts, alike=alike)
    assert [(group.num_tokens, group.rows) for group in joined.groups] == [
        (32, (0, 1)), (32, (2, 3)), (48, (4,)), (300, (5,)), (300, (6,)), (48, (7, 8)),
    ]  # fmt: skip
    assert {(32, 1), (32, 2), (32, 4)} <= set(asked)
    assert [len(PackedRows.joined(parts).groups), joined.groups[0].start, joined.groups[1].start] == [7, 0, 64]
