"""Compare starting points of fine-tuning on tasks: trials, statistics, tables, figures."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from trainer.comparison.figures import write_figures
    from trainer.comparison.results import read_results
    from trainer.comparison.tables import write_tables
    from trainer.comparison.trials import compare

__all__ = [
    "compare",
    "read_results",
    "write_figures",
    "write_tables",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "figures": ("write_figures",),
        "results": ("read_results",),
        "tables": ("write_tables",),
        "trials": ("compare",),
    },
)
