"""Keep the reading libraries quiet: their warnings quote headers and file names.

Nothing is changed at import. Each setting of the process is changed while some thread reads, and
restored when the last one has finished.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pydicom.config
import SimpleITK as sitk  # noqa: N813 (as its own documentation does)


class _Shared:
    """A context of the whole process: the first user enters it, the last one leaves it."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._users = 0
        self._entered = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._entered.enter_context(self._context())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._entered.close()


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


@contextlib.contextmanager
def _no_error_stream() -> Iterator[None]:
    """Close standard error of the process, which SimpleITK writes to from outside Python."""
    shows_warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        sitk.ProcessObject.SetGlobalWarningDisplay(shows_warnings)


quiet_pydicom = _Shared(_no_pydicom_warnings)
"""While pydicom reads headers: no validation, warnings or log records."""
quiet_itk = _Shared(_no_error_stream)
"""While SimpleITK reads a file: no warnings, and nothing on standard error."""
