"""Rows and shards: which shard holds which row."""

import pytest

from store.format import format_rows
from store.layout import ShardGrid


@pytest.mark.parametrize(("num_rows", "rows_per_shard"), [(0, 4), (1, 4), (4, 4), (10, 4), (7, 1)])
def test_shards_hold_every_row_once_and_in_order(num_rows: int, rows_per_shard: int) -> None:
    grid = ShardGrid(num_rows=num_rows, rows_per_shard=rows_per_shard)
    rows = [row for shard in range(grid.num_shards) for row in grid.rows_of(shard)]
    assert rows == list(range(num_rows))


def test_shard_of_names_the_shard_that_holds_a_row() -> None:
    grid = ShardGrid(num_rows=10, rows_per_shard=4)
    assert all(row in grid.rows_of(grid.shard_of(row)) for row in range(10))


@pytest.mark.parametrize(("first", "stop"), [(0, 10), (3, 4), (3, 5), (8, 10), (5, 5)])
def test_shards_of_names_the_shards_of_consecutive_rows(first: int, stop: int) -> None:
    grid = ShardGrid(num_rows=10, rows_per_shard=4)
    expected = sorted({grid.shard_of(row) for row in range(first, stop)})
    assert list(grid.shards_of(range(first, stop))) == expected


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_the_grid_does_not_have_is_refused(shard: int) -> None:
    with pytest.raises(IndexError, match=r"shard must be in \[0, 3\)"):
        ShardGrid(num_rows=10, rows_per_shard=4).rows_of(shard)


def test_a_grid_of_empty_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="rows_per_shard >= 1"):
        ShardGrid(num_rows=10, rows_per_shard=0)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([3], "3"),
        ([9, 7, 8, 3], "3, 7-9"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, 10, 12, 14, ... (20 in all)"),
    ],
)
def test_rows_are_printed_as_ranges_and_long_lists_are_shortened(
    rows: list[int], text: str
) -> None:
    assert format_rows(rows) == text
