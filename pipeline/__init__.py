"""Prepare a store from an archive of CT scans.

>>> from pipeline import PrepareConfig, prepare
>>> prepare("archive", "chest.store", PrepareConfig(classes=50))  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.batch import ClusterConfig, load_cluster_config
    from pipeline.config import AutoencoderConfig, PrepareConfig, load_config
    from pipeline.job import prepare
    from pipeline.summary import Summary

__version__: str

__all__ = [
    "AutoencoderConfig",
    "ClusterConfig",
    "PrepareConfig",
    "Summary",
    "load_cluster_config",
    "load_config",
    "prepare",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "batch": ("ClusterConfig", "load_cluster_config"),
        "config": ("AutoencoderConfig", "PrepareConfig", "load_config"),
        "job": ("prepare",),
        "summary": ("Summary",),
    },
)
