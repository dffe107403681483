"""Errors of training that are meant for the user."""

from store.errors import SemgenError


class TrainError(SemgenError):
    """Training is not possible as requested: one line with what is wrong, where, how to fix it."""


class Diverged(TrainError):
    """The loss or the weights are no longer finite: this run failed, others may not."""
