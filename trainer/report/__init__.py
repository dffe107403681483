"""Runs as one page of HTML: curves, restored crops over time, confusion of classes, features."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from trainer.report.build import write_run_report
    from trainer.report.runs import is_run

__all__ = ["is_run", "write_run_report"]

__getattr__, __dir__ = lazy_names(__name__, {"build": ("write_run_report",), "runs": ("is_run",)})
