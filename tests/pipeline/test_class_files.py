"""Crops as NIfTI files: they lie over the original scan, at any orientation."""

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from pipeline.archive.lookup import catalogue_folder, read_sources
from pipeline.archive.series import Series
from pipeline.archive.volume import read_volume
from pipeline.class_files import ClassFiles, export_class
from pipeline.config import PrepareConfig
from pipeline.crops import cut_crop
from store import PatchStore, SemgenError, StoreError, annotate
from store.images.frame import ScanFrame, frame_of_file, frame_of_slices, write_crop
from store.images.read import find_slices
from tests.support.stores import copy_with_catalogue

SHAPE = (8, 24, 24)


def sample_at(image: sitk.Image, scan: sitk.Image) -> NDArray[np.float64]:
    """The scan at the physical points of an image's voxels, as SimpleITK computes them."""
    linear = sitk.Resample(sitk.Cast(scan, sitk.sitkFloat32), image, sitk.Transform(),
                           sitk.sitkLinear, float("nan"))  # fmt: skip
    values: NDArray[np.float64] = sitk.GetArrayFromImage(linear).astype(np.float64)
    return values


def assert_lies_over(crop_file: Path, scan: sitk.Image) -> None:
    image = sitk.ReadImage(str(crop_file))
    expected = np.clip(sample_at(image, scan), -1000, 1000)
    crop = sitk.GetArrayFromImage(image)
    assert np.ptp(crop) > 100
    np.testing.assert_allclose(crop, expected, atol=2)


def write_some_crop(file: Path, series: Series, frame: ScanFrame) -> None:
    """A crop from somewhere in a scan, off its grid and no coarser than it."""
    volume = read_volume(series, PrepareConfig())
    assert (frame.size, frame.spacing_mm) == (volume.hu.shape, pytest.approx(volume.spacing_mm))
    step_mm = 0.7 * np.array(volume.spacing_mm)
    origin_mm = np.array([0.3, 0.31, 0.42]) * volume.hu.shape * volume.spacing_mm
    place = {"origin_mm": origin_mm, "extent_mm": step_mm * SHAPE}
    crop = cut_crop(volume, shape=SHAPE, window_hu=(-1000, 1000), **place)  # type: ignore[arg-type]
    write_crop(file, crop, frame=frame, **place)


def oblique(scan: sitk.Image, letters: str) -> sitk.Image:
    """A scan of 12 degrees about x and 7 about z, with axes in the given order."""
    turned = sitk.DICOMOrient(scan, letters)
    turn = sitk.Euler3DTransform((0, 0, 0), np.radians(12), 0, np.radians(7)).GetMatrix()
    direction = np.reshape(turn, (3, 3)) @ np.reshape(turned.GetDirection(), (3, 3))
    turned.SetDirection(direction.ravel().tolist())
    turned.SetOrigin((-91.5, 213.25, -1204.75))
    return turned


@pytest.fixture(scope="module")
def noise() -> sitk.Image:
    """Air around a smooth random body."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2000, (24, 60, 70)).astype(np.float32)
    values[:, :4] = -1000
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((0.8, 0.7, 2.5))
    return sitk.Cast(sitk.SmoothingRecursiveGaussian(image, 2.0), sitk.sitkInt16)


@pytest.mark.parametrize("letters", ["LPS", "RAS", "SAR", "PIR"])
def test_a_crop_of_an_oblique_scan_lies_over_it(
    noise: sitk.Image, tmp_path: Path, letters: str
) -> None:
    scan = oblique(noise, letters)
    sitk.WriteImage(scan, str(tmp_path / "scan.nii.gz"))
    series = Series(key="x", kind="file", files=(str(tmp_path / "scan.nii.gz"),), patient="x")
    write_some_crop(tmp_path / "crop.nii.gz", series, frame_of_file(tmp_path / "scan.nii.gz"))
    assert_lies_over(tmp_path / "crop.nii.gz", sitk.ReadImage(str(tmp_path / "scan.nii.gz")))


def test_a_crop_of_a_real_nifti_lies_over_the_scan(ct: Path, tmp_path: Path) -> None:
    file = ct / "archive" / "CMB-CRC-MSB-01068.nii.gz"
    series = Series(key="x", kind="file", files=(str(file),), patient="x")
    write_some_crop(tmp_path / "crop.nii.gz", series, frame_of_file(file))
    assert_lies_over(tmp_path / "crop.nii.gz", sitk.ReadImage(str(file)))


def test_a_crop_of_a_real_dicom_series_lies_over_the_scan(ct: Path, tmp_path: Path) -> None:
    slices, gap_mm = find_slices(ct / "archive" / "Lung_Dx-A0002")
    files = tuple(one.path for one in slices)
    series = Series(key="x", kind="dicom", files=files, patient="x", slice_gap_mm=gap_mm)
    write_some_crop(tmp_path / "crop.nii.gz", series, frame_of_slices(files, gap_mm))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(ct / "archive" / "Lung_Dx-A0002")))
    assert_lies_over(tmp_path / "crop.nii.gz", reader.Execute())


# Whole classes


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "members.csv").open() as file:
        return list(csv.DictReader(file))


def test_members_are_written_nearest_first_after_the_reference(
    prepared: Path, patches: PatchStore, tmp_path: Path
) -> None:
    done = export_class(prepared, 1, tmp_path / "out", members=None)
    rows = table(tmp_path / "out")
    num = sum(len(patches.members(1, split)) for split in ("train", "validation"))
    assert done == ClassFiles(folder=str(tmp_path / "out"), members=num, files=num, relative=0)
    assert sorted(row["file"] for row in rows) == sorted(
        file.name for file in (tmp_path / "out").glob("*.nii.gz")
    )
    reference = f"{int(patches.scans.id[patches.classes.reference[1]]):016x}"
    assert rows[0]["file"] == f"reference-{reference}.nii.gz"
    assert [row["file"] for row in rows[1:]] == [f"{row['scan']}.nii.gz" for row in rows[1:]]
    distances = [float(row["distance"]) for row in rows]
    assert distances == sorted(distances)
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_every_file_lies_in_the_scan_that_it_was_cut_from(
    prepared: Path, patches: PatchStore, tmp_path: Path
) -> None:
    """Phantoms are alternately NIfTI in several orientations and DICOM."""
    export_class(prepared, 0, tmp_path / "out", members=None)
    sources = read_sources(prepared)
    ids = [f"{int(number):016x}" for number in patches.scans.id]
    kinds = set()
    for row in table(tmp_path / "out"):
        source = Path(sources[ids.index(row["scan"])])
        kinds.add(source.suffix)
        if source.suffix == ".dcm":
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source.parent)))
            scan = reader.Execute()
        else:
            scan = sitk.ReadImage(str(source))
        image = sitk.ReadImage(str(tmp_path / "out" / row["file"]))
        expected = sample_at(image, scan)  # crops of phantoms are a little smoother
        assert np.corrcoef(expected.ravel(), sitk.GetArrayFromImage(image).ravel())[0, 1] > 0.9
    assert kinds >= {".dcm", ".gz"}


def test_all_scales_are_written_on_request(prepared: Path, tmp_path: Path) -> None:
    done = export_class(prepared, 1, tmp_path / "out", members=1, all_scales=True)
    rows = table(tmp_path / "out")
    assert (done.members, [row["scale"] for row in rows]) == (1, ["0", "1", "2"])
    assert rows[2]["file"].endswith("-scale2.nii.gz")


def test_without_the_catalogue_positions_are_relative_and_the_summary_says_so(
    prepared: Path, patches: PatchStore, tmp_path: Path
) -> None:
    copy = copy_with_catalogue(prepared, tmp_path / "copy.store")
    catalogue_folder(copy).rename(tmp_path / "elsewhere")
    scan = int(patches.members(1).scans[0])
    annotate(copy, {1: {"excluded_members": [scan]}})
    done = export_class(copy, 1, tmp_path / "out", members=2)
    assert done.relative == 2
    assert "positions are in mm from the centre of the scan's first voxel" in str(done)
    (first, second) = table(tmp_path / "out")
    assert (first["origin"], first["excluded"], second["excluded"]) == (
        "first voxel", "true", "false"
    )  # fmt: skip
    image = sitk.ReadImage(str(tmp_path / "out" / first["file"]))
    row = patches.members(1).rows[0]
    step_mm = patches.train.extent_mm[row] / patches.crop_shape
    expected = patches.train.origin_mm[row] + step_mm / 2
    np.testing.assert_allclose(image.GetOrigin()[::-1], expected, atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), patches.train.read([row])[0])


def test_a_scan_that_is_another_one_now_gives_no_geometry(
    prepared: Path, patches: PatchStore, tmp_path: Path
) -> None:
    copy = copy_with_catalogue(prepared, tmp_path / "copy.store")
    gone = next(row for row, file in read_sources(copy).items() if file.endswith(".nii.gz"))
    file = Path(read_sources(copy)[gone])
    split = ("train", "validation")[patches.scans.split[gone]]
    label = next(c for c in range(4) if gone in patches.members(c, split).scans)
    kept = file.rename(tmp_path / file.name)  # with its times, which other tests depend on
    try:
        sitk.WriteImage(sitk.ReadImage(str(kept))[:, :, 1:], str(file))
        export_class(copy, label, tmp_path / "out", members=None)
    finally:
        kept.replace(file)
    origins = {row["scan"]: row["origin"] for row in table(tmp_path / "out")}
    assert origins.pop(f"{int(patches.scans.id[gone]):016x}") == "first voxel"
    assert set(origins.values()) == {"scanner"}


def test_a_folder_with_files_and_an_unknown_class_are_refused(
    prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(SemgenError, match="is not an empty folder"):
        export_class(prepared, 1, tmp_path)
    with pytest.raises(StoreError, match="no class 9; classes are 0 to 3"):
        export_class(prepared, 9, tmp_path / "out")
    assert not (tmp_path / "out").exists()
