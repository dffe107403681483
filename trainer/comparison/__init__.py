"""Comparison of starting points: trials, statistics, tables, figures."""
