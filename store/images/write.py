"""Write an image file and check it: SimpleITK does not report a disk that became full."""

from __future__ import annotations

from pathlib import Path

import SimpleITK as sitk  # noqa: N813 (as its own documentation does)

from store.atomic import replace_file
from store.errors import SemgenError, is_utf8
from store.images.quiet_itk import quiet_itk


def write_image(image: sitk.Image, file: Path) -> None:
    """Write an image compressed, replacing the file in one step; its folder must exist.

    Raises SemgenError for a name that is not UTF-8, and where what was written cannot be read back.
    """
    if not is_utf8(file):
        raise SemgenError(f"{file}: the name must be UTF-8; give another one")
    with replace_file(file) as partial:
        try:
            with quiet_itk():
                sitk.WriteImage(image, str(partial), useCompression=True)
                same = sitk.Hash(sitk.ReadImage(str(partial))) == sitk.Hash(image)
        except RuntimeError:
            same = False
        if not same:
            raise SemgenError(
                f"{file}: cannot be written; free disk space or check write permission, then run"
                " the same command again"
            )
