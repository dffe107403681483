"""Archive -> store: Dask, SimpleITK, FAISS and a small autoencoder."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.config import AutoencoderConfig, PrepareConfig, load_config
    from pipeline.job import prepare
    from pipeline.summary import Summary

__all__ = [
    "AutoencoderConfig",
    "PrepareConfig",
    "Summary",
    "load_config",
    "prepare",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": ("AutoencoderConfig", "PrepareConfig", "load_config"),
        "job": ("prepare",),
        "summary": ("Summary",),
    },
)
