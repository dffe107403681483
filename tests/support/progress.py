"""A progress that remembers what it was shown."""

import contextlib
from collections.abc import Iterator

from store.progress import Advance


class Recorder:
    """Stages by name, with the counts by which each advanced."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.counts: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        self.totals[name] = total
        self.counts[name] = []
        yield self.counts[name].append
