"""Which rows of a packed batch are computed together."""

from __future__ import annotations

from model_foundry.models.packed_rows import PackedRows


def test_rows_of_one_length_are_one_group_where_they_are_alike() -> None:
    """Attention call by call was half of what a pass of sixteen short requests had to do."""
    parts = [PackedRows.of(lengths) for lengths in ([32], [32], [32, 32], [48], [300], [300], [40, 48])]
    asked: list[tuple[int, int]] = []

    def alike(num_tokens: int, num_rows: int) -> bool:
        asked.append((num_tokens, num_rows))
        return True

    joined = PackedRows.joined(parts, alike=alike)
    assert [(group.num_tokens, group.rows) for group in joined.groups] == [
        (32, (0, 1, 2, 3)), (48, (4,)), (300, (5,)), (300, (6,)), (48, (7, 8)),
    ]  # fmt: skip
    assert asked == [(32, 1), (32, 2), (32, 4)], "as they are alone, and together"
    assert [group.start for group in joined.groups[:2]] == [0, 128]
    for refused in (1, 2, 4):
        groups = PackedRows.joined(parts, alike=lambda tokens, rows, refused=refused: rows != refused).groups
        assert [group.rows for group in groups[:3]] == [(0,), (1,), (2, 3)]
    assert len(PackedRows.joined(parts).groups) == 7
