"""Archives for the benchmarks, made once and kept: many scans from few, and large phantoms."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import deflate
import numpy as np
import pydicom

from pipeline.phantom.files import write_nifti
from pipeline.phantom.patients import draw_phantom

_HEADER_BYTES = 352
_LARGE = (300, 512, 512)


def replicate(archive: Path, out: Path, copies: int) -> Path:
    """Each NIfTI file (.nii.gz) and DICOM folder of an archive, `copies` times.

    Copies are the same but for a few voxels, so that none is a duplicate of another.
    """

    def fill(folder: Path) -> None:
        for source in sorted(archive.iterdir()):
            for copy in range(copies):
                target = folder / f"{copy:03d}" / source.name
                target.parent.mkdir(exist_ok=True)
                (_copy_series if source.is_dir() else _copy_nifti)(source, target, copy)

    return _make_once(out, fill)


def large_phantoms(out: Path, scans: int) -> Path:
    """Phantoms of 512 x 512 x 300 voxels as `.nii`, half of them stored turned."""

    def fill(folder: Path) -> None:
        with get_context("spawn").Pool(2) as pool:
            places = [(n, folder / f"{n:03d}.nii") for n in range(scans)]
            pool.starmap(_write_large, places, chunksize=1)

    return _make_once(out, fill)


def pack(archive: Path, out: Path) -> Path:
    """The files of an archive as gzip."""

    def fill(folder: Path) -> None:
        for file in archive.iterdir():
            packed = deflate.gzip_compress(file.read_bytes(), 6)
            (folder / (file.name + ".gz")).write_bytes(packed)

    return _make_once(out, fill)


def _make_once(out: Path, fill: Callable[[Path], None]) -> Path:
    """A folder that is there when it is whole."""
    if not out.exists():
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(out)
    return out


def _copy_nifti(source: Path, target: Path, copy: int) -> None:
    content = bytearray(gzip.decompress(source.read_bytes()))
    voxels = np.frombuffer(content, "<i2", offset=_HEADER_BYTES)
    voxels[:64] = -1000 + (copy >> np.arange(64) & 1 if copy else 0)
    target.write_bytes(deflate.gzip_compress(bytes(content), 6))


def _copy_series(source: Path, target: Path, copy: int) -> None:
    target.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        data = pydicom.dcmread(file)
        for element in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
            data[element].value = f"{data[element].value}.{copy}"[-64:]
        if number == 0:
            pixels = data.pixel_array.copy()
            pixels[0, :16] = pixels.min() + (copy >> np.arange(16) & 1)
            data.PixelData = pixels.tobytes()
        data.save_as(target / file.name)


def _write_large(index: int, file: Path) -> None:
    phantom = draw_phantom(7, index, matrix=_LARGE[1], protocol="chest")
    height_mm = phantom.size[0] * phantom.spacing_mm[0]
    spacing_mm = (height_mm / _LARGE[0], *phantom.spacing_mm[1:])
    turned = "LPS" if index % 2 else "LAS"
    write_nifti(replace(phantom, size=_LARGE, spacing_mm=spacing_mm, orientation=turned), file)
