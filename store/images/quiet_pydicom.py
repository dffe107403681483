"""Keep pydicom quiet while it reads headers."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pydicom.config

from store.images.quiet import Shared


@contextlib.contextmanager
def _no_pydicom_warnings() -> Iterator[None]:
    settings, logger = pydicom.config.settings, logging.getLogger("pydicom")
    mode, level = settings.reading_validation_mode, logger.level
    # not catch_warnings: it would undo what other threads change meanwhile
    filters: Any = warnings.filters
    ignore = ("ignore", None, Warning, re.compile(r"pydicom\..*"), 0)
    settings.reading_validation_mode = pydicom.config.IGNORE
    logger.setLevel(logging.CRITICAL + 1)
    filters.insert(0, ignore)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # somebody reset all filters
            filters.remove(ignore)
        logger.setLevel(level)
        settings.reading_validation_mode = mode


quiet_pydicom = Shared(_no_pydicom_warnings)
"""While pydicom reads headers: no validation, warnings or log records."""
