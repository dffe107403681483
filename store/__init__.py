"""The patch store: format, writer, reader, verification; and the reader of image files."""

from typing import TYPE_CHECKING

from store.lazy import lazy_names

if TYPE_CHECKING:
    from store.classes import Annotation, AnnotationChanged, ClassNote, annotate, read_annotation
    from store.errors import ConfigError, SemgenError
    from store.format import CorruptStore, StoreError
    from store.quality import Quality, assess
    from store.reader import Members, PatchStore, Split
    from store.verification import Problem, verify

__version__: str

__all__ = [
    "Annotation",
    "AnnotationChanged",
    "ClassNote",
    "ConfigError",
    "CorruptStore",
    "Members",
    "PatchStore",
    "Problem",
    "Quality",
    "SemgenError",
    "Split",
    "StoreError",
    "annotate",
    "assess",
    "read_annotation",
    "verify",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "classes": ("Annotation", "AnnotationChanged", "ClassNote", "annotate", "read_annotation"),
        "errors": ("ConfigError", "SemgenError"),
        "format": ("CorruptStore", "StoreError"),
        "quality": ("Quality", "assess"),
        "reader": ("Members", "PatchStore", "Split"),
        "verification": ("Problem", "verify"),
    },
)
