"""Reading ahead with threads."""

import threading
import time
from collections.abc import Iterator

import pytest

from trainer.data.readahead import read_ahead


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def read(item: int) -> int:
        time.sleep(0.001 * (item % 3))  # later items may be done first
        return item**2

    assert list(read_ahead(read, range(20), threads=threads)) == [n**2 for n in range(20)]


def test_at_most_one_result_more_than_threads_is_read_ahead() -> None:
    started: list[int] = []
    results = read_ahead(started.append, range(20), threads=2)
    for taken in range(1, 5):
        next(results)
        assert len(started) <= taken + 2


def test_an_error_is_raised_when_its_item_is_due() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise ValueError("item 2")
        return item

    results = read_ahead(read, range(5), threads=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)


def test_closing_early_leaves_no_thread_behind() -> None:
    results: Iterator[int] = read_ahead(abs, range(20), threads=3)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
