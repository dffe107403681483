"""The patch store: format, writer, reader, verification; and the reader of image files."""

from store.classes import Annotation, ClassNote, annotate, read_annotation
from store.errors import ConfigError, SemgenError
from store.format import CorruptStore, StoreError
from store.reader import PatchStore, Split

__all__ = [
    "Annotation",
    "ClassNote",
    "ConfigError",
    "CorruptStore",
    "PatchStore",
    "SemgenError",
    "Split",
    "StoreError",
    "annotate",
    "read_annotation",
]
