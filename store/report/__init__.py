"""The discovered classes as one page of HTML that opens anywhere without a network."""

from store.report.build import write_report

__all__ = ["write_report"]
