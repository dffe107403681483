"""The one error of training that is meant for people to read."""


class TrainError(ValueError):
    """Training cannot go on as asked; one line: expected, got, where, how to mend."""
