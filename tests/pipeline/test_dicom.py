"""DICOM as scanners and archives write it: one scan in many encodings is one scan."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.volume import Volume, read_volume
from pipeline.config import PrepareConfig
from pipeline.phantom.files import write_dicom, write_nifti
from pipeline.phantom.patients import draw_phantom
from store.images import Rejected

CONFIG = PrepareConfig()
Change = Callable[[pydicom.Dataset, NDArray[np.int16]], None]


def read(*archive: Path, config: PrepareConfig = CONFIG) -> Volume:
    (series,) = (s for folder in find_folders(archive) for s in read_folder(folder, config))
    if series.reason:
        raise Rejected(series.reason, series.detail)
    return read_volume(series, config)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One phantom as NIfTI and as DICOM."""
    folder = tmp_path_factory.mktemp("scan")
    phantom = draw_phantom(5, 20, matrix=16, protocol="chest")
    write_nifti(phantom, folder / "scan.nii")
    write_dicom(phantom, folder / "dicom")
    return folder


@pytest.fixture(scope="module")
def nifti(scan: Path) -> Volume:
    return read(scan / "scan.nii")


def store(values: NDArray[np.integer], data: pydicom.Dataset, dtype: str) -> None:
    """Put stored values (before rescaling) into a header that says how to read them."""
    data.PixelRepresentation = int(np.dtype(dtype).kind == "i")
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.PixelData = values.astype(dtype).tobytes()


def slope_two(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    data.RescaleSlope, data.RescaleIntercept = 2, -2048
    store((hu.astype(int) + 2048) // 2, data, "<u2")


def slope_half(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    data.RescaleSlope, data.RescaleIntercept = 0.5, -1024
    store((hu.astype(int) + 1024) * 2, data, "<u2")


def unsigned(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    store(hu.astype(int) + 1024, data, "<u2")


def signed(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    store(hu, data, "<i2")


def big_endian(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    store(hu, data, ">i2")
    data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian


def implicit(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    signed(data, hu)
    data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian


def run_length(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    signed(data, hu)
    data.compress(RLELossless)


def unicode_names(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
    signed(data, hu)
    data.SpecificCharacterSet = "ISO_IR 192"
    data.PatientName = "Müller^Jürgen 山田^太郎"
    data.PatientID = "ИД-7"


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """The series of a folder with each slice changed."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        data = pydicom.dcmread(file)
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        hu = np.rint(data.pixel_array * slope + intercept).astype(np.int16)
        change(data, hu)
        syntax = data.file_meta.TransferSyntaxUID
        fresh = pydicom.Dataset(data)  # without the encoding that it was read in
        fresh.file_meta = data.file_meta
        pydicom.dcmwrite(
            target / file.name,
            fresh,
            implicit_vr=syntax == ImplicitVRLittleEndian,
            little_endian=syntax != ExplicitVRBigEndian,
            enforce_file_format=True,
        )
    return target


@pytest.mark.parametrize(
    "change",
    [
        slope_two,
        slope_half,
        unsigned,
        signed,
        big_endian,
        implicit,
        run_length,
        unicode_names,
    ],
)
def test_a_scan_is_the_same_however_its_slices_are_encoded(
    scan: Path, nifti: Volume, tmp_path: Path, change: Change
) -> None:
    volume = read(rewrite(scan / "dicom", tmp_path / "Пациент 山田", change))
    assert volume.spacing_mm == pytest.approx(nifti.spacing_mm, abs=1e-4)
    np.testing.assert_allclose(volume.hu, nifti.hu, atol=1)


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_padding_beyond_the_field_of_view_is_air(
    scan: Path, nifti: Volume, tmp_path: Path, padding: int
) -> None:
    def pad(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        stored = hu.copy()
        stored[:2] = padding
        store(stored, data, "<i2")

    volume = read(rewrite(scan / "dicom", tmp_path / "padded", pad))
    assert (volume.hu[:, :2] == -1000).all()
    np.testing.assert_allclose(volume.hu[:, 2:], nifti.hu[:, 2:], atol=1)


def test_slices_without_pixels_are_rejected(scan: Path, tmp_path: Path) -> None:
    def drop(data: pydicom.Dataset, hu: NDArray[np.int16]) -> None:
        del data.PixelData

    with pytest.raises(Rejected) as error:
        read(rewrite(scan / "dicom", tmp_path / "empty", drop))
    assert error.value.reason == "short pixel data"


def test_compressed_slices_of_real_scanners_are_read(ct: Path, tmp_path: Path) -> None:
    """MR slices in four encodings, made to pass as CT: all four must give the same values."""
    few = replace(CONFIG, min_slices=4)
    found = []
    for name in ("jpeg", "jpegls", "j2k", "rle"):
        source = ct / "awkward" / "dicom" / f"d2n_generic_compressed_{name}_001"
        target = shutil.copytree(source, tmp_path / name)
        for file in target.iterdir():
            data = pydicom.dcmread(file)
            data.Modality, data.RescaleSlope, data.RescaleIntercept = "CT", 8, -1024
            data.save_as(file)
        found.append(read(target, config=few))
    assert found[0].hu.min() == -1024
    assert found[0].hu.max() == -1024 + 8 * 254
    for other in found[1:]:
        np.testing.assert_array_equal(other.hu, found[0].hu)
        assert other.spacing_mm == found[0].spacing_mm
