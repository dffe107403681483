"""Keep SimpleITK quiet while it reads a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import SimpleITK as sitk  # noqa: N813 (as its own documentation does)

from store.images.quiet import Shared


@contextlib.contextmanager
def _no_error_stream() -> Iterator[None]:
    """Redirect standard error to /dev/null: SimpleITK writes to it from outside Python."""
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


quiet_itk = Shared(_no_error_stream)
"""While SimpleITK reads a file: no warnings, and nothing on standard error."""
