"""Scans and crops as NIfTI, for the viewer in the page.

Positions are in mm from the centre of the scan's first voxel; NIfTI's axes point to the right, to
the front and to the head.
"""

from __future__ import annotations

import struct
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray

from store.reader import PatchStore

VIEWER: Final = "niivue.js"
"""In the folder `vendor`: NiiVue, with its licence beside it."""
_HEADER_BYTES, _OFFSET = 348, 352
_TYPES = {"uint8": 2, "int16": 4}
_MM = 2


def read_viewer() -> bytes:
    """The script of the viewer."""
    return (files("store.report") / "vendor" / VIEWER).read_bytes()


def scan_nifti(store: PatchStore, scan: int) -> bytes:
    """The thumbnail of a scan in HU; KeyError if there is no such scan."""
    if scan >= len(store.scans.id):
        raise KeyError(scan)
    low, high = store.window_hu
    first_mm, last_mm = store.scans.frame_mm[scan]
    return encode_nifti(
        store.thumbnails.read([scan])[0],
        origin_mm=first_mm,
        extent_mm=last_mm - first_mm,
        scale=((high - low) / 255, low),
    )


def crop_nifti(store: PatchStore, split: str, row: int) -> bytes:
    """A crop in HU, where it lies in its scan; KeyError if there is no such row."""
    table = store.split(split)
    if row >= len(table):
        raise KeyError(row)
    return encode_nifti(
        table.read([row])[0], origin_mm=table.origin_mm[row], extent_mm=table.extent_mm[row]
    )


def encode_nifti(
    values: NDArray[np.uint8] | NDArray[np.int16],
    *,
    origin_mm: NDArray[np.float64],
    extent_mm: NDArray[np.float64],
    scale: tuple[float, float] = (1, 0),
) -> bytes:
    """A volume (Z, Y, X) as the content of a .nii file; pages need no reader of images.

    origin_mm, extent_mm
        First corner (voxel edges) and size, (z, y, x).
    scale
        Slope and intercept that turn values into HU.
    """
    step_z, step_y, step_x = (extent_mm / values.shape).tolist()
    z, y, x = (origin_mm + extent_mm / values.shape / 2).tolist()
    header = bytearray(_OFFSET)
    for offset, layout, *content in (
        (0, "i", _HEADER_BYTES),
        (40, "8h", 3, *values.shape[::-1], 1, 1, 1, 1),
        (70, "2h", _TYPES[values.dtype.name], 8 * values.itemsize),
        (76, "8f", 1, step_x, step_y, step_z, 0, 0, 0, 0),
        (108, "3f", _OFFSET, *scale),
        (123, "b", _MM),
        (254, "h", 1),  # the rows below hold positions in the scanner's frame
        (280, "4f", -step_x, 0, 0, -x),
        (296, "4f", 0, -step_y, 0, -y),
        (312, "4f", 0, 0, step_z, z),
        (344, "4s", b"n+1"),
    ):
        struct.pack_into(f"<{layout}", header, offset, *content)
    return bytes(header) + values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
