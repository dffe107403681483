"""Images in any orientation: read, resampled to the grid, and masks resampled back."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom import dcmread

from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.series import Series
from pipeline.archive.volume import read_volume
from pipeline.config import PrepareConfig
from pipeline.phantom.files import write_dicom
from pipeline.phantom.patients import draw_phantom
from trainer import TrainError
from trainer.finetuning.grid import Grid, resample
from trainer.finetuning.images import (
    compute_scan_id,
    find_stem,
    read_image,
    read_mask,
    read_spacing,
    spacing_zyx,
    to_lps,
    write_image,
)
from trainer.finetuning.inference import to_mask
from trainer.finetuning.task import Case

SIZE, SPACING = (30, 26, 20), (1.5, 1.0, 3.0)
GRID = Grid(
    spacing_mm=(2.0, 1.6, 1.4), shape=(8, 8, 8), intensity="ct", window_hu=(-1000.0, 1000.0)
)


def turned_by(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_z, about_x = [[c, -s, 0], [s, c, 0], [0, 0, 1]], [[1, 0, 0], [0, c, -s], [0, s, c]]
    return np.array(about_z) @ np.array(about_x)


DIRECTIONS = {
    "as it comes": np.eye(3),
    "x flipped": np.diag([-1, 1, 1]),
    "all flipped": np.diag([-1, -1, -1]),
    "sagittal": np.eye(3)[[2, 0, 1]],
    "coronal, flipped": np.eye(3)[[0, 2, 1]] * [[1], [-1], [1]],
    "oblique by 20 degrees": turned_by(20),
    "oblique and flipped": turned_by(-35) @ np.diag([1, -1, 1]),
}
ALL = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=list(DIRECTIONS))


def make_image(direction: np.ndarray) -> sitk.Image:
    """Voxels that hold the sum of their coordinates in space, in mm."""
    image = sitk.Image(SIZE, sitk.sitkFloat32)
    image.SetSpacing(SPACING)
    image.SetOrigin((-20.0, 11.0, 5.0))
    image.SetDirection(direction.ravel().tolist())
    for index in itertools.product(*map(range, SIZE)):
        image[index] = sum(image.TransformIndexToPhysicalPoint(index))
    return image


def make_ball(image: sitk.Image) -> sitk.Image:
    """One where a point is within 9 mm of the image's middle."""
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in SIZE])
    mask = sitk.Image(SIZE, sitk.sitkUInt8)
    mask.CopyInformation(image)
    for index in itertools.product(*map(range, SIZE)):
        point = image.TransformIndexToPhysicalPoint(index)
        mask[index] = int(np.linalg.norm(np.subtract(point, middle)) < 9)
    return mask


@ALL
def test_a_resampled_image_has_the_spacing_and_keeps_positions(direction: np.ndarray) -> None:
    """A linear ramp in space survives linear resampling, but near the edge."""
    on_grid = GRID.resample(make_image(direction))
    assert np.allclose(on_grid.GetSpacing()[::-1], GRID.spacing_mm, rtol=0.1)
    extent = np.multiply(on_grid.GetSize(), on_grid.GetSpacing())
    turned = to_lps(make_image(direction))
    assert np.allclose(extent, np.multiply(turned.GetSize(), turned.GetSpacing()))
    values = sitk.GetArrayFromImage(on_grid)
    for index in itertools.product(*(range(6, n - 6) for n in on_grid.GetSize())):
        expected = sum(on_grid.TransformIndexToPhysicalPoint(index))
        assert abs(values[index[::-1]] - expected) < 0.05


@ALL
def test_a_mask_is_brought_back_to_the_grid_of_the_image(direction: np.ndarray) -> None:
    image = make_image(direction)
    ball = make_ball(image)
    grid = GRID.resample(ball, nearest=True)
    inside = sitk.GetArrayFromImage(grid).astype(np.float32)
    mask = to_mask(np.stack([1 - inside, inside]), grid, image)
    assert (mask.GetSize(), mask.GetSpacing(), mask.GetOrigin(), mask.GetDirection()) == (
        image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())  # fmt: skip
    one, other = sitk.GetArrayFromImage(mask) == 1, sitk.GetArrayFromImage(ball) == 1
    assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.9


@ALL
def test_the_order_of_axes_in_the_file_does_not_matter(direction: np.ndarray) -> None:
    """The same voxels in another order of axes give the same array on the grid."""
    image = make_image(direction)
    other = sitk.DICOMOrient(image, "RSA")
    one, two = (sitk.GetArrayFromImage(GRID.resample(i)) for i in (image, other))
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_a_mask_of_several_classes_is_brought_back(tmp_path: Path) -> None:
    image = make_image(np.eye(3))
    grid = GRID.resample(image)
    shape = grid.GetSize()[::-1]
    probability = np.zeros((3, *shape), np.float32)
    thirds = np.array_split(np.arange(shape[0]), 3)
    for number, slices in enumerate(thirds):
        probability[number, slices] = 1
    named = sitk.GetArrayFromImage(to_mask(probability, grid, image))
    assert np.unique(named).tolist() == [0, 1, 2]
    assert (np.diff(named[:, 5, 5].astype(int)) >= 0).all()


def test_a_coarser_grid_is_smoothed_first() -> None:
    noise = sitk.GetImageFromArray(np.random.default_rng(0).normal(0, 100, (32, 32, 32)))
    coarse = resample(noise, spacing_mm=(4.0, 4.0, 4.0))
    assert sitk.GetArrayFromImage(coarse).std() < 30, "without smoothing it would be 100"


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    image = make_image(np.eye(3))
    shifted = make_ball(image)
    shifted.SetOrigin((0.0, 0.0, 0.0))
    sitk.WriteImage(shifted, str(tmp_path / "mask.nii.gz"))
    with pytest.raises(TrainError, match=r"mask\.nii\.gz: does not have the grid"):
        read_mask(tmp_path / "mask.nii.gz", image, 2)


def test_a_mask_of_unknown_classes_is_refused(tmp_path: Path) -> None:
    image = make_image(np.eye(3))
    mask = make_ball(image) * 7
    sitk.WriteImage(mask, str(tmp_path / "mask.nii.gz"))
    with pytest.raises(TrainError, match="values from 0 to 7; expected whole numbers below 2"):
        read_mask(tmp_path / "mask.nii.gz", image, 2)


def test_a_file_that_is_not_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.nii.gz").write_bytes(b"nothing")
    with pytest.raises(TrainError, match=r"no\.nii\.gz: cannot be read as an image"):
        read_image(tmp_path / "no.nii.gz")


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    """SimpleITK would fill it with zeros."""
    file = tmp_path / "image.nii"
    sitk.WriteImage(make_image(np.eye(3)), str(file))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(TrainError, match="bytes where the header asks for"):
        read_image(file)


@pytest.mark.parametrize("stated", [0, -SPACING[0], np.nan])
def test_an_image_without_a_possible_spacing_is_refused(tmp_path: Path, stated: float) -> None:
    """SimpleITK would read it with 1 mm, or without the sign."""
    file = tmp_path / "image.nii"
    sitk.WriteImage(make_image(np.eye(3)), str(file))
    content = bytearray(file.read_bytes())
    content[80:84] = np.float32(stated).tobytes()
    file.write_bytes(content)
    for reader in (read_image, read_spacing):
        with pytest.raises(TrainError, match="impossible spacing"):
            reader(file)


@pytest.fixture
def dicom(tmp_path: Path) -> Path:
    write_dicom(draw_phantom(5, 20, matrix=16, protocol="chest"), tmp_path / "series")
    return tmp_path / "series"


def test_a_dicom_folder_is_read_as_prepare_reads_it(dicom: Path) -> None:
    (found,) = read_folder(next(find_folders([dicom])), PrepareConfig())
    volume = read_volume(found, PrepareConfig())
    image = to_lps(read_image(dicom))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.hu)
    assert read_spacing(dicom) == spacing_zyx(image) == volume.spacing_mm
    assert compute_scan_id(image) == f"{volume.scan_id():016x}"


def test_slices_of_several_slopes_are_read_exactly(dicom: Path) -> None:
    """As in PET; the first slice alone would make all whole numbers."""
    expected = []
    for number, file in enumerate(sorted(dicom.iterdir(), key=lambda f: dcmread(f).InstanceNumber)):
        data = dcmread(file)
        data.RescaleSlope, data.RescaleIntercept = 1 + number / 8, 0
        data.save_as(file)
        expected.append(data.pixel_array * (1 + number / 8))
    found = sitk.GetArrayFromImage(read_image(dicom))
    assert sorted(found.sum((1, 2))) == pytest.approx(sorted(np.sum(expected, (1, 2))), rel=1e-6)


def test_a_folder_with_missing_slices_is_refused(dicom: Path) -> None:
    for file in sorted(dicom.iterdir(), key=lambda f: dcmread(f).InstanceNumber)[20:28]:
        file.unlink()
    for reader in (read_image, read_spacing):
        with pytest.raises(TrainError, match="series: cannot be read as an image: missing slices"):
            reader(dicom)


def test_a_folder_of_two_series_is_refused(dicom: Path) -> None:
    write_dicom(draw_phantom(5, 21, matrix=16, protocol="chest"), dicom.with_name("other"))
    for file in dicom.with_name("other").iterdir():
        file.rename(dicom / f"other-{file.name}")
    with pytest.raises(TrainError, match="several series"):
        read_image(dicom)


def test_a_folder_without_slices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no DICOM files"):
        read_image(tmp_path)


def test_an_image_cannot_be_written_as_mhd(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"a\.mhd: \.mhd cannot be written.* use \.mha"):
        write_image(make_image(np.eye(3)), tmp_path / "a.mhd")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd"])
def test_a_suffix_in_upper_case_is_read(tmp_path: Path, suffix: str) -> None:
    image = make_image(np.eye(3))
    write_image(image, tmp_path / f"a{suffix}")
    (tmp_path / f"a{suffix}").rename(tmp_path / f"A{suffix.upper()}")
    assert find_stem(tmp_path / f"A{suffix.upper()}") == "A"
    assert read_image(tmp_path / f"A{suffix.upper()}").GetSize() == image.GetSize()
    assert read_spacing(tmp_path / f"A{suffix.upper()}") == spacing_zyx(to_lps(image))


def test_a_suffix_in_upper_case_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"a\.NII: masks are written as .*; use one of these"):
        write_image(make_image(np.eye(3)), tmp_path / "a.NII")


VOLUMES = [sitk.Image((6, 5, 4), sitk.sitkInt16) + n for n in range(3)]
SEVERAL = pytest.mark.parametrize(
    "image", [sitk.JoinSeries(VOLUMES), sitk.Compose(VOLUMES)], ids=["4-D", "vectors"]
)


@SEVERAL
def test_the_given_channel_of_an_image_is_read(tmp_path: Path, image: sitk.Image) -> None:
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    found = read_image(tmp_path / "a.nii.gz", 2)
    assert (found.GetSize(), found[0, 0, 0]) == ((6, 5, 4), 2)


@SEVERAL
@pytest.mark.parametrize(
    ("channel", "message"), [(None, "none is given"), (3, "channel 3 is given")]
)
def test_several_channels_without_a_valid_choice_are_refused(
    tmp_path: Path, image: sitk.Image, channel: int | None, message: str
) -> None:
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    with pytest.raises(TrainError, match=rf"a\.nii\.gz: has channels 0 to 2, and {message}"):
        read_image(tmp_path / "a.nii.gz", channel)


def test_a_fourth_axis_of_length_one_needs_no_channel(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.JoinSeries(VOLUMES[:1]), str(tmp_path / "a.nii.gz"))
    assert read_image(tmp_path / "a.nii.gz").GetSize() == (6, 5, 4)


def test_a_mask_of_several_channels_is_refused(tmp_path: Path) -> None:
    masks = sitk.JoinSeries([sitk.Cast(v, sitk.sitkUInt8) for v in VOLUMES[:2]])
    sitk.WriteImage(masks, str(tmp_path / "mask.nii.gz"))
    with pytest.raises(TrainError, match=r"mask\.nii\.gz: has channels 0 to 1"):
        read_mask(tmp_path / "mask.nii.gz", VOLUMES[0], 2)


# Intensities


def ramp(high: float, kind: int) -> sitk.Image:
    """Values from 0 to `high` along x."""
    values = np.broadcast_to(np.linspace(0, high, 16), (12, 14, 16))
    return sitk.Cast(sitk.GetImageFromArray(np.ascontiguousarray(values)), kind)


@pytest.mark.parametrize(
    ("high", "kind"),
    [(255, sitk.sitkUInt8), (1, sitk.sitkUInt8), (1, sitk.sitkFloat32), (1, sitk.sitkInt16)],
)
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_unit_maps_bytes_binary_images_and_fractions_to_0_to_1(
    tmp_path: Path, high: int, kind: int, spacing_mm: tuple[float, float, float] | None
) -> None:
    grid = Grid(spacing_mm=spacing_mm, shape=(12, 14, 16), intensity="unit", window_hu=(0, 1))
    sitk.WriteImage(ramp(high, kind), str(tmp_path / "a.nii.gz"))
    image = grid.read(tmp_path / "a.nii.gz")
    for seen in (grid.to_unit(grid.resample(image)), grid.to_unit(to_lps(image))):
        wanted = sitk.GetArrayFromImage(image)[0, 0] / high
        np.testing.assert_allclose(seen[5, 7], wanted, atol=2e-3)


def test_unit_does_not_change_masks() -> None:
    grid = Grid(spacing_mm=(1, 1, 1), shape=(8, 8, 8), intensity="unit", window_hu=(0, 1))
    mask = sitk.GetArrayFromImage(grid.resample(ramp(3, sitk.sitkUInt8), nearest=True))
    assert np.unique(mask).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("image", [ramp(255, sitk.sitkInt16), ramp(1, sitk.sitkFloat32) - 1])
def test_unit_refuses_values_of_unknown_range(tmp_path: Path, image: sitk.Image) -> None:
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    grid = Grid(spacing_mm=None, shape=(8, 8, 8), intensity="unit", window_hu=(0, 1))
    with pytest.raises(TrainError, match=r'a\.nii\.gz: has values .* "unit" needs 0 to 1'):
        grid.read(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_an_image_with_voxels_that_are_no_numbers_is_refused(
    tmp_path: Path, value: float, suffix: str
) -> None:
    image = make_image(np.eye(3))
    image[3, 4, 5] = value
    write_image(image, tmp_path / f"a{suffix}")
    with pytest.raises(TrainError, match=rf"a\{suffix}: has voxels that are NaN or infinite"):
        GRID.read(tmp_path / f"a{suffix}")


def test_a_crop_around_a_point_outside_its_image_is_refused(tmp_path: Path) -> None:
    image = make_image(turned_by(20))
    for share, is_inside in ((0.0, True), (1.0, True), (-0.1, False), (1.1, False)):
        index = [share * (n - 1) for n in SIZE]
        centre = image.TransformContinuousIndexToPhysicalPoint(index)
        case = Case(name="n", patient="n", image=tmp_path / "a.mha", centre_mm=centre)
        if is_inside:
            assert GRID.resample_case(case, image).GetSize() == GRID.shape
        else:
            with pytest.raises(TrainError, match=r"a\.mha: x_mm.* of n are outside .* LPS"):
                GRID.resample_case(case, image)


def test_per_image_does_not_depend_on_scale_and_offset() -> None:
    grid = Grid(spacing_mm=None, shape=(8, 8, 8), intensity="per-image", window_hu=(0, 1))
    noise = sitk.GetImageFromArray(np.random.default_rng(0).normal(0, 1, (8, 8, 8)))
    one, other = (grid.to_unit(grid.resample(image)) for image in (noise, noise * 700 + 5000))
    np.testing.assert_allclose(one, other, atol=2e-3)
    assert (one.min(), one.max()) == (0, 1)


def test_crops_of_one_image_share_its_percentiles() -> None:
    grid = Grid(spacing_mm=None, shape=(4, 4, 4), intensity="per-image", window_hu=(0, 1))
    values = np.repeat(np.linspace(0, 1000, 16), 64).reshape(16, 8, 8)
    image = sitk.GetImageFromArray(values)
    low, high = np.percentile(values, (0.5, 99.5))
    for z in (3, 12):
        crop = grid.resample(image, centre_mm=(3.5, 3.5, z + 0.5))
        seen = grid.to_input(crop, image)
        wanted = (values[z - 1 : z + 3, 2:6, 2:6] - low) / (high - low)
        np.testing.assert_allclose(seen, wanted, atol=2e-3)


@pytest.mark.parametrize("intensity", ["ct-zscore", "zscore"])
def test_z_scores_are_those_of_the_image_before_resampling(intensity: str) -> None:
    """Padding counts as air in CT only, and only HU are clipped."""
    values = np.random.default_rng(0).integers(-3024, 3000, (12, 14, 16)).astype(np.int16)
    image = sitk.GetImageFromArray(values)
    window = (-900.0, 700.0)
    grid = Grid(spacing_mm=(1, 1, 1), shape=(8, 8, 8), intensity=intensity, window_hu=window)
    known, wanted = values.astype(np.float64), values.astype(np.float64)
    if intensity == "ct-zscore":
        known[known <= -2000] = -1000
        wanted = np.clip(values, *window)
    seen = grid.to_input(grid.resample(image), image)
    assert seen.dtype == np.float16
    np.testing.assert_allclose(seen, (wanted - known.mean()) / known.std(), atol=5e-3)
    coarse = Grid(spacing_mm=(2, 2, 2), shape=(8, 8, 8), intensity=intensity, window_hu=window)
    smooth = sitk.GetArrayFromImage(coarse.resample(image)).astype(np.float64)
    if intensity == "ct-zscore":
        smooth = np.clip(smooth, *window)
    seen = coarse.to_input(coarse.resample(image), image)
    np.testing.assert_allclose(seen, (smooth - known.mean()) / known.std(), atol=5e-3)


def test_the_scan_id_is_the_one_that_prepare_gives(ct: Path) -> None:
    """Test cases that the weights were pretrained on are found by it."""
    files = sorted((ct / "archive-2mm").glob("*.nii.gz"))[:3]
    files += sorted((ct / "sts").glob("*CT_image*"))[:2]
    assert len(files) == 5
    for file in files:
        series = Series(key="k", kind="nifti", files=(str(file),), patient="p")
        scan_id = read_volume(series, PrepareConfig()).scan_id()
        assert compute_scan_id(read_image(file)) == f"{scan_id:016x}"
