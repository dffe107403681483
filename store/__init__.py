"""The persisted patch store: format, writer, reader, verification. numpy and zarr only."""

from store.classes import Annotation, ClassNote, annotate, read_annotation
from store.format import CorruptStore, StoreError
from store.reader import PatchStore, Split

__all__ = [
    "Annotation",
    "ClassNote",
    "CorruptStore",
    "PatchStore",
    "Split",
    "StoreError",
    "annotate",
    "read_annotation",
]
