"""A progress display that counts what it is shown."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from store.progress import Advance


class CountedProgress:
    """Units by stage, and the totals that the stages announced."""

    def __init__(self) -> None:
        self.units: Counter[str] = Counter()
        self.totals: dict[str, int | None] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        self.totals[name] = total

        def advance(count: int) -> None:
            self.units[name] += count

        yield advance
