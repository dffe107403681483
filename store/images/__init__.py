"""Read images from files: DICOM series, NIfTI, MetaImage, NRRD; for preparing and fine-tuning.

Both must read a file alike and reject the same broken ones. The only part of `store` that imports
pydicom and SimpleITK.
"""

from pathlib import Path
from typing import Final

VOLUME_SUFFIXES: Final = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
"""Suffixes of the files that hold one image each; everything else may be a DICOM file."""
HEADER_SUFFIXES: Final = (".mhd", ".nhdr")
"""Of these, the files that hold only a header; the voxels are in another file."""

UNREADABLE: Final = "unreadable"
"""Reason of an image that cannot be read, in part or at all."""


class Rejected(Exception):
    """An image that cannot be used.

    `reason` names the rule, one of a fixed list, safe to show anywhere; `detail` says what was
    found and may quote header text, so it stays in the private catalogue.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def check_fetched(path: str | Path) -> None:
    """Reject a file that Git LFS left in place of an image; OSError when it cannot be read."""
    with open(path, "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise Rejected("Git LFS pointer", "the file's content was not fetched")
