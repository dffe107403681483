"""A progress display that counts what it is shown."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from store.progress import Advance


class CountedProgress:
    """Units by stage; totals, units done by an earlier run, notes, tallies, as announced."""

    def __init__(self) -> None:
        self.units: Counter[str] = Counter()
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}
        self.notes: list[str] = []
        self.tallies: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tally(self, text: str) -> None:
        self.tallies.append(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        self.totals[name], self.done[name] = total, done

        def advance(count: int) -> None:
            self.units[name] += count

        yield advance
