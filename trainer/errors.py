"""Errors of training that are meant for the user."""

from store.errors import ConfigError, SemgenError


class TrainError(SemgenError):
    """Training is not possible as requested: one line with what is wrong, where, how to fix it."""


class SettingError(TrainError, ConfigError):
    """A setting of training is unknown, of the wrong type, or out of its range."""


class Diverged(TrainError):
    """The loss or the weights are no longer finite: this run failed, others may not."""
