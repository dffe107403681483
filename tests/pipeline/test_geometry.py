"""Where crops lie and what is in them, against slow versions that share no code with ours."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.lookup import catalogue_folder
from pipeline.archive.series import Series
from pipeline.archive.volume import Volume, read_volume
from pipeline.config import PrepareConfig
from pipeline.crops import CropOutsideVolume, cut_crop, make_thumbnail
from pipeline.frame import frame_box
from pipeline.phantom.files import write_dicom, write_nifti
from pipeline.phantom.patients import Phantom, draw_phantom
from store import PatchStore

WINDOW = (-1000, 1000)
SHAPE = (16, 32, 32)
REAL = ("LIDC-IDRI-0001", "C3L-00189", "Lung_Dx-A0002", "ACRIN-FLT-Breast_001-b")


def read(file: Path) -> Volume:
    return read_volume(
        Series(key="x", kind="file", files=(str(file),), patient="x"), PrepareConfig()
    )


@cache
def read_slowly(file: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Voxels and spacing of a file or a DICOM folder in LPS, z, y, x; padding is air."""
    if file.is_dir():
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(file)))
        image = reader.Execute()
    else:
        image = SimpleITK.ReadImage(str(file))
    image = SimpleITK.DICOMOrient(image, "LPS")
    values = SimpleITK.GetArrayFromImage(image).astype(np.float64)
    values[values <= -2000] = -1000
    return values, np.array(image.GetSpacing()[::-1])


def cut_slowly(
    file: Path, origin_mm: NDArray[Any], extent_mm: NDArray[Any], shape: Sequence[int]
) -> NDArray[np.float64]:
    values, spacing_mm = read_slowly(file)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) + 0.5
    index = (origin_mm + places * (extent_mm / shape)) / spacing_mm
    crop = ndimage.map_coordinates(values, np.moveaxis(index, -1, 0), order=1, mode="nearest")
    return np.clip(crop, *WINDOW)


# Interpolation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REAL)
def test_crops_of_real_scans_equal_those_of_a_slow_independent_version(ct: Path, name: str) -> None:
    file = ct / "archive-2mm" / f"{name}.nii.gz"
    volume = read(file)
    spacing_mm = np.array(volume.spacing_mm)
    last_mm = (np.array(volume.hu.shape) - 1) * spacing_mm
    rng = np.random.default_rng(0)
    for _ in range(12):
        step_mm = rng.uniform(0.3, 1, 3) * spacing_mm  # finer than the scan: not smoothed
        first_mm = rng.uniform(0, last_mm - step_mm * (np.array(SHAPE) - 1))
        origin_mm, extent_mm = first_mm - step_mm / 2, step_mm * SHAPE
        crop = cut_crop(
            volume, origin_mm=origin_mm, extent_mm=extent_mm, shape=SHAPE, window_hu=WINDOW
        )
        np.testing.assert_allclose(crop, cut_slowly(file, origin_mm, extent_mm, SHAPE), atol=2)


def sources(store: Path) -> dict[int, Path]:
    """The file, or DICOM folder, of each scan id, from the private catalogue."""
    with closing(sqlite3.connect(catalogue_folder(store) / "catalogue.sqlite")) as catalogue:
        rows = catalogue.execute("SELECT scan_id, files FROM series WHERE scan_row IS NOT NULL")
        found = {
            int(scan, 16): bytes.fromhex(json.loads(files)[0]).decode() for scan, files in rows
        }
    return {
        scan: Path(file).parent if file.endswith(".dcm") else Path(file)
        for scan, file in found.items()
    }


def test_crops_of_a_store_equal_those_of_a_slow_independent_version(
    prepared: Path, patches: PatchStore
) -> None:
    rows, scans, files = patches.train, patches.scans, sources(prepared)
    step_mm = rows.extent_mm / rows.patch.shape[1:]
    unsmoothed = (step_mm <= scans.spacing_mm[rows.scan] + 1e-9).all(axis=1)
    assert unsmoothed.sum() >= 3
    for row in np.flatnonzero(unsmoothed):
        expected = cut_slowly(
            files[int(scans.id[rows.scan[row]])],
            rows.origin_mm[row],
            rows.extent_mm[row],
            rows.patch.shape[1:],
        )
        np.testing.assert_allclose(rows.read([row])[0], expected, atol=2)


@pytest.fixture(scope="module")
def noise() -> Volume:
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1001, (24, 40, 50)).astype(np.int16)
    return Volume(hu=hu, spacing_mm=(2.5, 0.7031, 0.7))


def cut(
    volume: Volume, first_voxel: Sequence[float], step_voxels: Sequence[float]
) -> NDArray[np.int16]:
    """A crop of (8, 16, 16) whose first sample and step are given in voxels."""
    step_mm = np.array(step_voxels) * volume.spacing_mm
    return cut_crop(
        volume,
        origin_mm=np.array(first_voxel) * volume.spacing_mm - step_mm / 2,
        extent_mm=step_mm * (8, 16, 16),
        shape=(8, 16, 16),
        window_hu=WINDOW,
    )


@pytest.mark.parametrize("first", [(0, 0, 0), (3, 5, 7), (16, 24, 34)])
def test_a_crop_on_the_scans_own_voxels_is_a_copy(
    noise: Volume, first: tuple[int, int, int]
) -> None:
    z, y, x = first
    expected = noise.hu[z : z + 8, y : y + 16, x : x + 16]
    np.testing.assert_array_equal(cut(noise, first, (1, 1, 1)), expected)


def test_a_crop_between_voxels_is_their_mean(noise: Volume) -> None:
    pairs = noise.hu[3:11, 5:21, 7:23].astype(float) + noise.hu[3:11, 5:21, 8:24]
    np.testing.assert_allclose(cut(noise, (3, 5, 7.5), (1, 1, 1)), pairs / 2, atol=0.5)


@pytest.mark.parametrize("step", [(0.4, 0.4, 0.4), (1, 1.5, 1.1), (1.3, 2, 2.3)])
def test_a_crop_of_a_constant_is_that_constant(step: tuple[float, float, float]) -> None:
    water = Volume(hu=np.full((24, 60, 60), 37, np.int16), spacing_mm=(2.5, 0.7, 0.7))
    assert (cut(water, (1, 2, 3), step) == 37).all()


@pytest.mark.parametrize("step", [(0.4, 0.4, 0.4), (1, 1.5, 1.1), (1.3, 2, 2.3)])
def test_smoothing_does_not_shift_a_ramp(step: tuple[float, float, float]) -> None:
    z, y, x = np.indices((40, 60, 70))
    ramp = Volume(hu=(9 * z + 5 * y - 7 * x).astype(np.int16), spacing_mm=(2.5, 0.7, 0.7))
    first = np.array((12.3, 11.6, 13.1))  # far enough from the edges for the Gaussian
    at = [f + s * np.arange(n) for f, s, n in zip(first, step, (8, 16, 16))]
    expected = 9 * at[0][:, None, None] + 5 * at[1][:, None] - 7 * at[2]
    np.testing.assert_allclose(cut(ramp, tuple(first), step), expected, atol=0.51)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_detail_finer_than_the_crops_step_is_averaged_not_aliased(axis: int) -> None:
    stripes = np.where(np.indices((60, 80, 80))[axis] % 2, 800, -800).astype(np.int16)
    volume = Volume(hu=stripes, spacing_mm=(1, 1, 1))
    step = [1.0, 1.0, 1.0]
    step[axis] = 4
    inner = cut(volume, (8, 8, 8), step)
    assert np.abs(inner).max() < 20


def test_values_are_clipped_to_the_window() -> None:
    metal = Volume(
        hu=np.where(np.indices((24, 40, 40))[2] < 20, -1024, 3071).astype(np.int16),
        spacing_mm=(1, 1, 1),
    )
    assert set(np.unique(cut(metal, (4, 4, 12), (1, 1, 1))).tolist()) == {-1000, 1000}


def test_a_window_wider_than_int16_clips_nothing() -> None:
    hu = np.full((8, 8, 8), 32767, np.int16)
    hu[:, :, :4] = -32768
    volume = Volume(hu=hu, spacing_mm=(1.0, 1.0, 1.0))
    crop = cut_crop(
        volume,
        origin_mm=(-0.5, -0.5, -0.5),
        extent_mm=(8.0, 8.0, 8.0),
        shape=hu.shape,
        window_hu=(-40000, 40000),
    )
    assert (crop == hu).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", ["low", "high"])
def test_a_crop_that_extends_beyond_the_scan_is_refused(noise: Volume, axis: int, end: str) -> None:
    first = [0.0, 0.0, 0.0] if end == "low" else [16.0, 24.0, 34.0]
    cut(noise, first, (1, 1, 1))  # touching the outermost voxels is no harm
    first[axis] += -0.02 if end == "low" else 0.02
    with pytest.raises(CropOutsideVolume, match=f"mm along {'zyx'[axis]}, the scan 0 to"):
        cut(noise, first, (1, 1, 1))


def test_a_thumbnail_spans_the_box_from_edge_to_edge() -> None:
    y = np.indices((32, 64, 64))[1]
    volume = Volume(hu=(y * 20 - 500).astype(np.int16), spacing_mm=(2, 1, 1))
    box = np.array([[-1.0, 15.5, -0.5], [63.0, 47.5, 63.5]])
    thumbnail = make_thumbnail(volume, box, (4, 32, 4), PrepareConfig())
    hu = thumbnail[:, :, 0] / 255 * 2000 - 1000
    np.testing.assert_allclose(hu, np.tile(np.arange(16, 48) * 20 - 500, (4, 1)), atol=4)


def test_a_thumbnail_of_a_fine_scan_that_is_thinned_is_not_shifted() -> None:
    y = np.indices((8, 256, 256))[1]
    ramp = Volume(hu=(y * 7 - 900).astype(np.int16), spacing_mm=(3, 0.4, 0.4))
    thumbnail = make_thumbnail(ramp, ramp.edges_mm, (8, 32, 32), PrepareConfig())
    hu = thumbnail[:, 2:-2].mean(axis=(0, 2)) / 255 * 2000 - 1000
    centres = (np.arange(2, 30) + 0.5) * 8 - 0.5  # of the thumbnail's voxels, in the scan's
    np.testing.assert_allclose(hu, centres * 7 - 900, atol=4)


# Orientation -------------------------------------------------------------------------------------


@cache
def patient(index: int, matrix: int = 64) -> Phantom:
    return replace(draw_phantom(5, index, matrix=matrix, protocol="chest"), padding_hu=None)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LPI", "PSR", "SAL", "ILA"])
def test_a_scan_is_the_same_however_its_axes_were_stored(tmp_path: Path, orientation: str) -> None:
    write_nifti(replace(patient(0), orientation=orientation), tmp_path / "scan.nii.gz")
    volume = read(tmp_path / "scan.nii.gz")
    expected = Volume(hu=patient(0).render(), spacing_mm=patient(0).spacing_mm)
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.spacing_mm, expected.spacing_mm, rtol=1e-6)
    assert volume.scan_id() == expected.scan_id()


def test_a_scan_is_the_same_as_nifti_and_as_dicom(tmp_path: Path, config: PrepareConfig) -> None:
    write_nifti(patient(0), tmp_path / "scan.nii.gz")
    write_dicom(patient(0), tmp_path / "series")
    (folder,) = find_folders([tmp_path / "series"])
    (series,) = read_folder(folder, config)
    assert read_volume(series, config).scan_id() == read(tmp_path / "scan.nii.gz").scan_id()


def test_one_voxel_more_dense_is_another_scan(noise: Volume) -> None:
    hu = noise.hu.copy()
    hu[5, 5, 5] += 1
    assert replace(noise, hu=hu).scan_id() != noise.scan_id()


def test_another_spacing_is_another_scan(noise: Volume) -> None:
    assert replace(noise, spacing_mm=(2.5, 0.7031, 0.71)).scan_id() != noise.scan_id()


@pytest.mark.parametrize("padding_hu", [-2000, -3024])
def test_padding_outside_the_field_of_view_is_air(tmp_path: Path, padding_hu: int) -> None:
    write_nifti(replace(patient(0), padding_hu=padding_hu), tmp_path / "padded.nii.gz")
    hu = read(tmp_path / "padded.nii.gz").hu
    assert hu[0, 0, 0] == -1000
    assert hu.min() >= -1024


# Frames ------------------------------------------------------------------------------------------


@cache
def rendered(index: int, *, table: bool = True, noise: bool = True) -> Volume:
    phantom = patient(index, 128)
    if not table:
        phantom = replace(phantom, table_mm=None)
    if not noise:
        phantom = replace(phantom, noise_hu=0.0)
    return Volume(hu=phantom.render(), spacing_mm=phantom.spacing_mm)


WITH_TABLE = [index for index in range(8) if patient(index).table_mm is not None][:4]


@pytest.mark.parametrize("index", WITH_TABLE)
def test_the_body_frame_is_the_bodys_extent(index: int) -> None:
    body = rendered(index, table=False, noise=False)
    _, y, x = np.nonzero(body.hu > -300)
    truth = np.stack([(y.min(), x.min()), (y.max() + 1, x.max() + 1)]) - 0.5
    truth_mm = truth * body.spacing_mm[1:]
    # The body narrows to the neck, so that a few rows of voxels more or less are no error.
    np.testing.assert_allclose(frame_box(rendered(index), "body")[:, 1:], truth_mm, atol=12)


@pytest.mark.parametrize("index", WITH_TABLE)
def test_the_table_does_not_move_the_body_frame(index: int) -> None:
    box = frame_box(rendered(index), "body")
    np.testing.assert_array_equal(box, frame_box(rendered(index, table=False), "body"))


@pytest.mark.parametrize("index", WITH_TABLE)
def test_the_body_frame_spans_the_scan_along_z(index: int) -> None:
    volume = rendered(index)
    box = frame_box(volume, "body")
    np.testing.assert_array_equal(box[:, 0], volume.edges_mm[:, 0])


@pytest.mark.parametrize("frame", ["scan", "voxel"])
def test_the_other_frames_are_the_scan_from_voxel_edge_to_voxel_edge(
    noise: Volume, frame: str
) -> None:
    low, high = frame_box(noise, frame)
    np.testing.assert_allclose(low, [-1.25, -0.35155, -0.35])
    np.testing.assert_allclose(high - low, np.array([24, 40, 50]) * noise.spacing_mm)


def test_where_there_is_no_body_the_body_frame_is_the_scan() -> None:
    air = Volume(hu=np.full((20, 64, 64), -1000, np.int16), spacing_mm=(2, 2, 2))
    np.testing.assert_array_equal(frame_box(air, "body"), air.edges_mm)


def test_both_legs_are_in_the_body_frame() -> None:
    y, x = np.ogrid[:150, :200]
    legs = sum(np.hypot(y - 75, x - centre) < 25 for centre in (50, 150))
    volume = Volume(
        hu=np.where(np.tile(legs, (20, 1, 1)), 40, -1000).astype(np.int16), spacing_mm=(4, 2, 2)
    )
    low, high = frame_box(volume, "body")
    np.testing.assert_allclose([low[2], high[2]], [2 * 25, 2 * 175], atol=1.01)


def ellipse(centre_mm: NDArray[Any], half_mm: NDArray[Any], pixel_mm: float) -> Volume:
    """An upright elliptic cylinder of water in air, y and x in mm."""
    y, x = (np.arange(round(side / pixel_mm)) * pixel_mm for side in (320, 400))
    inside = np.hypot((y[:, None] - centre_mm[0]) / half_mm[0], (x - centre_mm[1]) / half_mm[1]) < 1
    hu = np.where(np.tile(inside, (6, 1, 1)), 0, -1000).astype(np.int16)
    return Volume(hu=hu, spacing_mm=(12.0, pixel_mm, pixel_mm))


@cache
def ellipse_errors(pixel_mm: float) -> NDArray[np.float64]:
    """(ellipses, low or high, y or x) found minus true edge of the body frame in mm."""
    errors = []
    for rng in map(np.random.default_rng, range(20)):
        half_mm = rng.uniform([80, 110], [110, 150])
        centre_mm = np.array([160, 200]) + rng.uniform(-6, 6, 2)
        box = frame_box(ellipse(centre_mm, half_mm, pixel_mm), "body")
        errors.append(box[:, 1:] - [centre_mm - half_mm, centre_mm + half_mm])
    return np.array(errors)


every_pixel_size = pytest.mark.parametrize("pixel_mm", [0.4, 0.55, 0.7, 0.85, 0.977, 1.1, 1.2])


@every_pixel_size
def test_the_body_frame_has_no_bias_to_a_side_at_any_pixel_size(pixel_mm: float) -> None:
    np.testing.assert_allclose(ellipse_errors(pixel_mm).mean(axis=0), 0, atol=0.2)


@every_pixel_size
def test_each_edge_of_the_body_frame_is_exact_to_half_a_voxel(pixel_mm: float) -> None:
    assert np.abs(ellipse_errors(pixel_mm)).max() < 0.5 * pixel_mm + 0.1


def test_the_frame_of_a_body_cut_off_by_the_scan_ends_at_the_scans_edge() -> None:
    cut_off = ellipse(np.array([20.3, 395.2]), np.array([90, 110]), 0.7)
    box, edges = frame_box(cut_off, "body"), cut_off.edges_mm
    assert (box[0, 1], box[1, 2]) == (edges[0, 1], edges[1, 2])


def test_something_narrow_that_touches_the_body_moves_its_frame_by_4_mm_at_most() -> None:
    body = ellipse(np.array([160.0, 200]), np.array([90, 130]), 0.8)
    hu = body.hu.copy()
    hu[:, 300:340, 240:252] = 0  # 10 mm wide, from within the body to 20 mm behind it
    touched = replace(body, hu=hu)
    np.testing.assert_allclose(frame_box(touched, "body"), frame_box(body, "body"), atol=4.01)


@pytest.mark.parametrize("name", [*REAL, "LungFCP-01-0001", "CRLM-CT-1004"])
def test_the_body_frame_of_a_real_scan_lies_within_it_and_contains_the_body(
    ct: Path, name: str
) -> None:
    volume = read(ct / "archive-2mm" / f"{name}.nii.gz")
    box, edges = frame_box(volume, "body"), volume.edges_mm
    assert (box[0] >= edges[0]).all()
    assert (box[1] <= edges[1]).all()
    low, high = (np.rint(corner / volume.spacing_mm + 0.5).astype(int) for corner in box)
    tissue = volume.hu > -200
    inside = tissue[:, low[1] : high[1], low[2] : high[2]]
    assert inside.sum() > 0.95 * tissue.sum()  # the rest is table and clothes


@pytest.mark.parametrize("name", ["LIDC-IDRI-0001", "CRLM-CT-1004"])
def test_the_body_frame_of_a_real_scan_excludes_the_air_around(ct: Path, name: str) -> None:
    volume = read(ct / "archive-2mm" / f"{name}.nii.gz")
    sides = np.diff(frame_box(volume, "body"), axis=0) / np.diff(volume.edges_mm, axis=0)
    assert sides[0, 1] < 0.9
