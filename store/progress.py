"""How long work shows its progress: named stages that count in increments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol, TypeAlias

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of units just done."""


class Progress(Protocol):
    """Shows stages, one after the other; pass one to any function that takes `progress`."""

    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Enter a stage of `total` units (None: unknown), `done` of them by an earlier run."""
        ...


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        """Ignore a stage."""
        yield lambda count: None


SILENT: Final = Silent()
