"""The errors of training that are meant for the user."""

from store.errors import SemgenError


class TrainError(SemgenError):
    """Training cannot go on as asked; one line: expected, got, where, how to mend."""


class Diverged(TrainError):
    """The loss or the weights are no longer numbers: this run failed, others may not."""
