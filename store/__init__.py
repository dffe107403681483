"""The persisted patch store: format, writer, reader, verification. numpy and zarr only."""

from store.format import CorruptStore, StoreError
from store.reader import PatchStore, Split

__all__ = ["CorruptStore", "PatchStore", "Split", "StoreError"]
