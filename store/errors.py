"""The base class of every error that is meant for the user."""


class SemgenError(ValueError):
    """The request cannot be carried out: what is wrong, where, and how to mend it, in one line.

    The command line prints the message alone. Any other exception is a bug and keeps its traceback.
    """


class ConfigError(SemgenError):
    """A setting is unknown, of the wrong type, or out of its range."""
