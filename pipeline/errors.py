"""Errors of preparing a store that are meant for the user and have no module of their own."""

from store.errors import SemgenError


class PrepareError(SemgenError):
    """The job cannot continue; the message says why and what to do."""


class ClusterError(SemgenError):
    """The Dask cluster cannot be used as asked."""
