"""Comparison of starting points on tasks: trials, statistics, tables, figures."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from trainer.comparison.trials import compare, read_results

__all__ = [
    "compare",
    "read_results",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "trials": ("compare", "read_results"),
    },
)
