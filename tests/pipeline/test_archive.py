"""What is found in an archive, in which order its slices stand, and why series are rejected."""

import gzip
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from numpy.typing import NDArray

from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.series import Series
from pipeline.archive.volume import Volume, read_geometry, read_volume
from pipeline.config import PrepareConfig
from pipeline.phantom.files import write_dicom
from pipeline.phantom.patients import Phantom, draw_phantom
from pipeline.stages.survey import survey_series
from store.images import Rejected
from store.images.slices import check_positions
from tests.support.command import Semgen

CONFIG = PrepareConfig()
NUM_SLICES = 59


@cache
def patient(index: int = 20) -> Phantom:
    """Few and thick slices of few pixels."""
    return draw_phantom(5, index, matrix=16, protocol="chest")


@cache
def voxels(index: int = 20) -> NDArray[np.int16]:
    return patient(index).render()


def find(*archive: Path, config: PrepareConfig = CONFIG) -> list[Series]:
    return [s for folder in find_folders(archive) for s in read_folder(folder, config)]


def read_reason(series: Series, config: PrepareConfig = CONFIG) -> str | None:
    """The reason why a series is rejected, by its headers or on reading; None for a good one."""
    if series.reason is not None:
        return series.reason
    try:
        read_volume(series, config)
    except Rejected as rejected:
        return rejected.reason
    return None


def reasons(*archive: Path, config: PrepareConfig = CONFIG) -> list[str | None]:
    return [read_reason(series, config) for series in find(*archive, config=config)]


def write_image(
    values: NDArray[np.generic], path: Path, *, spacing_mm: tuple[float, ...] = (5, 20, 20)
) -> None:
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing(spacing_mm[::-1])
    SimpleITK.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "series"
    write_dicom(patient(), folder)
    return folder


@pytest.fixture
def series(template: Path, tmp_path: Path) -> Path:
    """A folder with one good DICOM series, to be changed."""
    return shutil.copytree(template, tmp_path / "series")


def change_headers(folder: Path, change: Callable[[pydicom.Dataset, int], None]) -> None:
    """Apply a change to each slice's header; its number counts from the feet."""
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        change(data, int(data.InstanceNumber) - 1)
        data.save_as(file)


def slice_file(folder: Path, number: int) -> Path:
    """The file of a slice, counted from the feet."""
    (file,) = (
        file
        for file in folder.iterdir()
        if int(pydicom.dcmread(file, stop_before_pixels=True).InstanceNumber) == number + 1
    )
    return file


# Formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.nhdr", "A.NII", "b.c.nii.gz"]
)
def test_a_scan_in_one_file_is_read_from_any_format(tmp_path: Path, name: str) -> None:
    write_image(voxels(), tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    (found,) = find(tmp_path)
    volume = read_volume(found, CONFIG)
    np.testing.assert_array_equal(np.sort(volume.hu, axis=None), np.sort(voxels(), axis=None))
    np.testing.assert_allclose(volume.spacing_mm, (5, 20, 20))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_hu_are_read_from_any_pixel_type(tmp_path: Path, dtype: type) -> None:
    write_image(voxels().astype(dtype), tmp_path / "scan.mha")
    (found,) = find(tmp_path)
    np.testing.assert_array_equal(read_volume(found, CONFIG).hu, voxels())


def test_slices_of_a_series_are_put_in_order_whatever_their_names(series: Path) -> None:
    (found,) = find(series)
    numbers = [pydicom.dcmread(file).InstanceNumber for file in found.files]
    assert numbers == sorted(numbers)
    assert [Path(file).name for file in found.files] != sorted(os.listdir(series))
    np.testing.assert_array_equal(read_volume(found, CONFIG).hu, voxels())


def test_the_slice_gap_is_that_of_the_positions_not_of_the_header(series: Path) -> None:
    def claim(data: pydicom.Dataset, number: int) -> None:
        data.SliceThickness, data.SpacingBetweenSlices = 1.0, 17.0

    change_headers(series, claim)
    (found,) = find(series)
    assert read_volume(found, CONFIG).spacing_mm[0] == pytest.approx(5.0)


def test_a_series_stored_from_head_to_feet_is_the_same_scan(series: Path) -> None:
    def renumber(data: pydicom.Dataset, number: int) -> None:
        data.InstanceNumber = NUM_SLICES - number

    change_headers(series, renumber)
    (found,) = find(series)
    np.testing.assert_array_equal(read_volume(found, CONFIG).hu, voxels())


def test_dicom_files_need_no_suffix(series: Path) -> None:
    for file in list(series.iterdir()):
        file.rename(file.with_suffix(""))
    assert [len(found.files) for found in find(series)] == [NUM_SLICES]


def test_two_series_in_one_folder_are_two_scans(series: Path, tmp_path: Path) -> None:
    write_dicom(patient(4), tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        file.rename(series / f"other-{file.name}")
    volumes = [read_volume(found, CONFIG).hu for found in find(series)]
    expected = {voxels(20).tobytes(), voxels(4).tobytes()}
    assert {hu.tobytes() for hu in volumes} == expected


def test_folders_are_searched_to_any_depth(series: Path, tmp_path: Path) -> None:
    deep = tmp_path / "archive" / "ward" / "2" / "ct"
    deep.mkdir(parents=True)
    series.rename(deep / "dicom")
    write_image(voxels(4), deep / "scan.nii.gz")
    assert sorted(found.kind for found in find(tmp_path / "archive")) == ["dicom", "file"]


def test_an_archive_may_be_several_folders_and_files(series: Path, tmp_path: Path) -> None:
    for name in ("one.nii", "two.nii"):
        write_image(voxels(4), tmp_path / name)
    found = find(series, tmp_path / "one.nii")
    assert [Path(s.files[0]).name for s in found if s.kind == "file"] == ["one.nii"]
    assert [len(s.files) for s in found if s.kind == "dicom"] == [NUM_SLICES]


def test_files_that_are_no_images_are_ignored(tmp_path: Path) -> None:
    for name in (
        "notes.txt",
        "report.pdf",
        "table.csv",
        "scan.nii.gz.json",
        "DICOMDIR.bak",
        "notes.txt.gz",
    ):
        (tmp_path / name).write_bytes(b"%PDF" * 100)
    assert find(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "scans.zip",
        "scans.tar",
        "scans.tar.gz",
        "SCANS.TGZ",
        "scans.7z",
        "scan.nii.xz",
        "scan.nii.lzma",
        "scan.hdr.gz",
        "1.dcm.gz",
        "1.dcm.Z",
        "IM0001.gz",
        "1.2.840.113.gz",
    ],
)
def test_a_packed_archive_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK" * 100)
    assert reasons(tmp_path) == ["packed archive"]


@pytest.mark.parametrize("first_is_empty", [True, False])
@pytest.mark.parametrize("with_meta_information", [True, False])
@pytest.mark.parametrize("implicit", [True, False])
def test_dicom_files_without_preamble_and_suffix_are_read(
    series: Path, template: Path, with_meta_information: bool, implicit: bool, first_is_empty: bool
) -> None:
    """As old scanners wrote them."""
    for number, file in enumerate(sorted(series.iterdir())):
        data = pydicom.dcmread(file)
        if first_is_empty:
            data.SpecificCharacterSet = None
        if implicit:
            data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        data.save_as(file, implicit_vr=implicit, little_endian=True)
        content = file.read_bytes()[132:]
        if not with_meta_information:
            content = content[12 + int.from_bytes(content[8:12], "little") :]
        file.unlink()
        (series / f"IM{number:04}").write_bytes(content)
    (found,), (other,) = find(series), find(template)
    np.testing.assert_array_equal(read_volume(found, CONFIG).hu, read_volume(other, CONFIG).hu)


def test_a_dicomdir_is_ignored(series: Path) -> None:
    shutil.copy(slice_file(series, 0), series / "DICOMDIR")
    assert reasons(series) == [None]


def test_a_linked_folder_outside_the_archive_is_followed_once(series: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for name in ("a", "b"):
        (archive / name).symlink_to(tmp_path / "series")
    (series / "loop").symlink_to(archive)
    (series / "up").symlink_to(tmp_path)
    found = {one.files[0]: read_reason(one) for one in find(archive)}
    links = {f"{archive}/{name}/": "linked folder" for name in ("b", "a/loop")}
    (used,) = set(found) - set(links)
    assert found == {used: None, **links}
    assert used.startswith(f"{archive}/a/")


def test_a_linked_folder_inside_the_archive_is_found_without_the_link(
    series: Path, tmp_path: Path
) -> None:
    (tmp_path / "a-link").symlink_to(series)
    (series / "self").symlink_to(".")
    assert reasons(tmp_path) == ["linked folder", None, "linked folder"]


def test_a_folder_that_is_given_twice_is_found_once(series: Path, tmp_path: Path) -> None:
    write_image(voxels(4), tmp_path / "scan.nii")
    for archive in ((tmp_path, series), (series, tmp_path), (tmp_path / "scan.nii", tmp_path)):
        assert reasons(*archive) == [None, None]


def test_a_file_that_is_given_and_also_behind_a_link_is_found_once(tmp_path: Path) -> None:
    for name in ("archive", "elsewhere"):
        (tmp_path / name).mkdir()
    write_image(voxels(4), tmp_path / "elsewhere" / "scan.nii")
    (tmp_path / "archive" / "link").symlink_to(tmp_path / "elsewhere")
    assert reasons(tmp_path / "archive", tmp_path / "elsewhere" / "scan.nii") == [None]


def test_a_link_to_a_folder_above_a_followed_one_finds_only_the_rest(
    series: Path, tmp_path: Path
) -> None:
    archive, outside = tmp_path / "archive", tmp_path / "outside"
    archive.mkdir()
    outside.mkdir()
    series.rename(outside / "series")
    write_image(voxels(4), outside / "scan.nii")
    (archive / "1").symlink_to(outside / "series")
    (archive / "2").symlink_to(outside)
    assert sorted(one.kind for one in find(archive)) == ["dicom", "file"]


def test_a_broken_link_is_reported(tmp_path: Path) -> None:
    (tmp_path / "scan").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert reasons(tmp_path) == ["broken link", "broken link"]


def test_unreadable_files_and_folders_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder and a file that the system denies, whoever runs the test."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "patient").write_bytes(b"perhaps a slice")
    scandir, opened = os.scandir, open

    def deny(path: str, *arguments: object) -> object:
        if str(path).endswith(("locked", "patient")):
            raise PermissionError(13, "Permission denied", path)
        return (opened if arguments else scandir)(path, *arguments)  # type: ignore[operator]

    monkeypatch.setattr("os.scandir", deny)
    monkeypatch.setattr("builtins.open", deny)
    found = {Path(one.files[0]).name: (one.reason, one.detail) for one in find(tmp_path)}
    monkeypatch.undo()
    assert found == {
        "patient": ("file not readable", "Permission denied"),
        "locked": ("folder not readable", "Permission denied"),
    }


def test_pipes_and_devices_are_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scan.nii.gz")  # opening it would wait for ever
    os.mkfifo(tmp_path / "slice")
    assert reasons(tmp_path) == ["file not readable", "file not readable"]


def test_the_list_of_series_does_not_depend_on_where_the_archive_lies(
    series: Path, tmp_path: Path
) -> None:
    write_image(voxels(4), series / "scan.nii")
    moved = shutil.copytree(series, tmp_path / "moved" / "series")
    assert [s.key for s in find(series)] == [s.key for s in find(moved)]


def test_series_of_one_patient_share_a_patient_key(series: Path, tmp_path: Path) -> None:
    def another_series(data: pydicom.Dataset, number: int) -> None:
        data.SeriesInstanceUID = f"{data.SeriesInstanceUID[:60]}.1"

    again = shutil.copytree(series, tmp_path / "again")
    change_headers(again, another_series)
    write_dicom(patient(4), tmp_path / "other")
    one, two, other = (find(folder)[0] for folder in (series, again, tmp_path / "other"))
    assert one.patient == two.patient != other.patient
    assert "PHANTOM" not in one.patient.upper()
    assert one.key != two.key


def test_each_series_without_a_patient_is_a_patient_of_its_own(
    series: Path, tmp_path: Path
) -> None:
    def anonymise(data: pydicom.Dataset, number: int) -> None:
        data.PatientID = ""

    write_dicom(patient(4), tmp_path / "other")
    for folder in (series, tmp_path / "other"):
        change_headers(folder, anonymise)
    one, other = find(series, tmp_path / "other")
    assert one.patient != other.patient


def test_series_of_one_study_without_a_patient_are_of_one_patient(
    series: Path, tmp_path: Path
) -> None:
    def anonymise(data: pydicom.Dataset, number: int) -> None:
        data.PatientID = ""

    def anonymise_another_series(data: pydicom.Dataset, number: int) -> None:
        data.PatientID = ""
        data.SeriesInstanceUID = f"{data.SeriesInstanceUID[:60]}.1"

    again = shutil.copytree(series, tmp_path / "again")
    change_headers(series, anonymise)
    change_headers(again, anonymise_another_series)
    one, other = find(series, again)
    assert one.key != other.key
    assert one.patient == other.patient


def test_listing_series_reads_headers_alone(series: Path) -> None:
    for file in series.iterdir():
        content = file.read_bytes()
        start = content.index(b"\xe0\x7f\x10\x00") + 12
        file.write_bytes(content[:start] + b"\x40" * (len(content) - start))
    (series / "scan.nii").write_bytes(b"")
    assert [found.reason for found in find(series)] == [None, None]
    assert reasons(series) == ["unreadable", "not in HU"]


# Slice positions ---------------------------------------------------------------------------------

AXIAL = np.array([1.0, 0, 0, 0, 1, 0])


def positions(along: NDArray[np.float64], *, tilt: float = 0.0) -> NDArray[np.float64]:
    """Positions (x, y, z) at heights z that drift along y by `tilt` mm per mm."""
    return np.stack([np.full_like(along, -200), -150 + tilt * along, along], axis=1)


def check(along: NDArray[np.float64], *, tilt: float = 0.0) -> tuple[list[int], float]:
    return check_positions(positions(along, tilt=tilt), AXIAL, CONFIG.spacing_tolerance)


EVEN = -700 + 2.5 * np.arange(40)


def test_an_even_series_keeps_its_order_and_has_its_gap() -> None:
    assert check(EVEN) == (list(range(40)), pytest.approx(2.5))


def test_a_reversed_series_is_sorted() -> None:
    assert check(EVEN[::-1]) == (list(range(39, -1, -1)), pytest.approx(2.5))


def test_a_shuffled_series_is_sorted() -> None:
    shuffle = np.random.default_rng(0).permutation(40)
    order, _ = check(EVEN[shuffle])
    assert shuffle[order].tolist() == list(range(40))


def test_slices_are_ordered_along_their_normal_not_along_z() -> None:
    coronal = np.array([1.0, 0, 0, 0, 0, -1])  # its normal is y
    position = np.stack([np.zeros(20), 3.0 * np.arange(20)[::-1], np.zeros(20)], axis=1)
    order, gap = check_positions(position, coronal, 0.1)
    assert (order[0], gap) == (19, pytest.approx(3.0))


def test_rounded_positions_are_accepted() -> None:
    order, gap = check(np.round(-700 + 0.6249 * np.arange(300), 2))
    assert (order, gap) == (list(range(300)), pytest.approx(0.6249, abs=1e-4))


@pytest.mark.parametrize(
    ("along", "reason"),
    [
        (np.delete(EVEN, 17), "missing slices"),
        (np.delete(EVEN, [17, 18, 30]), "missing slices"),
        (np.append(EVEN, EVEN[7]), "slices at one position"),
        (np.append(EVEN[:20], EVEN[19] + 4.1 * np.arange(1, 20)), "uneven slice spacing"),
        (EVEN + np.where(np.arange(40) == 9, 0.9, 0), "uneven slice spacing"),
    ],
)
def test_slices_off_an_even_grid_are_rejected_by_name(
    along: NDArray[np.float64], reason: str
) -> None:
    with pytest.raises(Rejected) as caught:
        check(np.random.default_rng(0).permutation(along))
    assert caught.value.reason == reason


def test_slices_that_shift_steadily_are_rejected_as_gantry_tilt() -> None:
    with pytest.raises(Rejected) as caught:
        check(EVEN, tilt=np.tan(np.deg2rad(12)))
    assert caught.value.reason == "gantry tilt"


def test_a_slice_that_is_shifted_in_its_plane_is_rejected() -> None:
    position = positions(EVEN)
    position[20, 0] += 3
    with pytest.raises(Rejected) as caught:
        check_positions(position, AXIAL, CONFIG.spacing_tolerance)
    assert caught.value.reason == "shifted slices"


def test_a_very_small_shift_is_no_gantry_tilt() -> None:
    assert check(EVEN, tilt=0.005)[1] == pytest.approx(2.5)


# Rejected by header ------------------------------------------------------------------------------


def delete_slice(folder: Path) -> None:
    slice_file(folder, 20).unlink()


def copy_slice(folder: Path) -> None:
    shutil.copy(slice_file(folder, 20), folder / "copy.dcm")


def keep_ten(folder: Path) -> None:
    for number in range(10, NUM_SLICES):
        slice_file(folder, number).unlink()


def setter(**values: object) -> Callable[[Path], None]:
    """A change of every header of a folder."""

    def change(data: pydicom.Dataset, number: int) -> None:
        for name, value in values.items():
            setattr(data, name, value)

    return lambda folder: change_headers(folder, change)


def set_one(**values: object) -> Callable[[Path], None]:
    """A change of the header of one slice."""

    def change(data: pydicom.Dataset, number: int) -> None:
        for name, value in values.items():
            setattr(data, name, value if number == 5 else data.get(name))

    return lambda folder: change_headers(folder, change)


def forget_positions(folder: Path) -> None:
    def change(data: pydicom.Dataset, number: int) -> None:
        del data.ImagePositionPatient

    change_headers(folder, change)


def jitter(folder: Path) -> None:
    def change(data: pydicom.Dataset, number: int) -> None:
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x + 40 * (number % 2), y, z]

    change_headers(folder, change)


def spread_out(folder: Path) -> None:
    def change(data: pydicom.Dataset, number: int) -> None:
        x, y, _ = data.ImagePositionPatient
        data.ImagePositionPatient = [x, y, 1000 * number]

    change_headers(folder, change)


def forget_spacing(folder: Path) -> None:
    def change(data: pydicom.Dataset, number: int) -> None:
        del data.PixelSpacing

    change_headers(folder, change)


def shorten(folder: Path) -> None:
    """One slice holds less than its header says, though its file is whole."""

    def change(data: pydicom.Dataset, number: int) -> None:
        if number == 5:
            data.PixelData = data.PixelData[:100]

    change_headers(folder, change)


def tilt(folder: Path) -> None:
    def change(data: pydicom.Dataset, number: int) -> None:
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x, y + number, z]

    change_headers(folder, change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setter(Modality="MR"), "not CT"),
        (setter(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "scout"),
        (setter(SamplesPerPixel=3), "RGB or vector"),
        (setter(NumberOfFrames="4"), "multi-frame"),
        (keep_ten, "too few slices"),
        (forget_positions, "no slice positions"),
        (set_one(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "mixed orientations"),
        (delete_slice, "missing slices"),
        (copy_slice, "slices at one position"),
        (tilt, "gantry tilt"),
        (jitter, "shifted slices"),
        (forget_spacing, "no pixel spacing"),
        (setter(PixelSpacing=[0.7]), "no pixel spacing"),
        (setter(PixelSpacing=[0, 0]), "impossible spacing"),
        (setter(PixelSpacing=[-0.7, -0.7]), "impossible spacing"),
        (setter(PixelSpacing=[1e6, 1e6]), "impossible spacing"),
        (spread_out, "impossible spacing"),
        (set_one(PixelSpacing=[0.5, 0.5]), "mixed pixel spacing"),
        (shorten, "short pixel data"),
        (set_one(Modality="PT"), "not CT"),
        (set_one(RescaleSlope=0.5), "mixed rescaling"),
        (set_one(RescaleIntercept=None), "mixed rescaling"),
        (setter(BitsStored=8), "not in HU"),
        (setter(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), "no slice positions"),
        (setter(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "no slice positions"),
        (setter(ImagePositionPatient=[0, 0, 1e30]), "no slice positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_series_is_rejected_by_the_rule_that_it_breaks(
    series: Path, change: Callable[[Path], None], reason: str
) -> None:
    change(series)
    assert [found.reason for found in find(series)] == [reason]


def test_slices_of_two_sizes_are_rejected(series: Path) -> None:
    def crop(data: pydicom.Dataset, number: int) -> None:
        if number == 3:
            data.Rows, data.PixelData = 8, data.PixelData[: len(data.PixelData) // 2]

    change_headers(series, crop)
    assert [found.reason for found in find(series)] == ["mixed slice sizes"]


def test_a_series_larger_than_the_limit_is_rejected_before_it_is_read(series: Path) -> None:
    small = replace(CONFIG, max_voxels=NUM_SLICES * 16 * 16 - 1)
    assert [found.reason for found in find(series, config=small)] == ["too large"]


@pytest.mark.parametrize(
    "values",
    [{"Rows": None}, {"Columns": None}, {"ImagePositionPatient": [1, 2]},
     {"ImageOrientationPatient": None}, {"ImagePositionPatient": None}, {"Modality": None},
     {"SeriesInstanceUID": None}, {"PatientID": None}, {"ImageType": None}],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_an_empty_or_short_element_rejects_at_most_its_series(
    series: Path, values: dict[str, object]
) -> None:
    setter(**values)(series)
    write_image(voxels(4), series / "scan.nii")
    assert None in reasons(series)


def test_damaged_headers_do_not_stop_the_listing(series: Path, tmp_path: Path) -> None:
    files = sorted(series.iterdir())[:2]
    content = files[0].read_bytes()
    header = content.index(b"\xe0\x7f\x10\x00")
    few = replace(CONFIG, min_slices=2)
    rng = np.random.default_rng(0)
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(files[1], folder / "whole.dcm")
        damaged = bytearray(content)
        for place in rng.integers(132, header, 1 + number % 8):
            damaged[place] = rng.integers(256)
        (folder / "damaged.dcm").write_bytes(damaged[: rng.integers(140, len(content) + 1)])
        assert len(find(folder, config=few)) >= 1


# Rejected on reading -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((20, 20, 20), 40, np.int16), "not in HU"),
        (np.full((20, 20, 20), -1000, np.int16), "empty"),
        (np.zeros((20, 20, 20), np.uint8), "not in HU"),
        (np.full((20, 20, 20), np.nan, np.float32), "not in HU"),
        (np.where(np.indices((20, 20, 20))[0] < 4, -3024, 40).astype(np.int16), "not in HU"),
        (np.full((10, 20, 20), -500, np.int16), "too few slices"),
        (np.full((20, 10, 20), -500, np.int16), "too few slices"),
        (np.full((64, 64), -500, np.int16), "2-D"),
        (np.full((3, 20, 20, 20), -500, np.int16), "4-D"),
    ],
    ids=["water", "air", "8 bits", "nan", "padding", "flat", "narrow", "slice", "film"],
)
def test_an_image_whose_values_are_not_hu_is_rejected_with_its_reason(
    tmp_path: Path, values: NDArray[np.generic], reason: str
) -> None:
    image = SimpleITK.GetImageFromArray(values, isVector=False)
    SimpleITK.WriteImage(image, str(tmp_path / "image.nii.gz"))
    assert reasons(tmp_path) == [reason]


def shifted() -> NDArray[np.int16]:
    """A CT whose values were stored without the intercept, and 51 strays."""
    values = voxels() + 1024
    values.flat[np.arange(51) * 7] = -900
    return values.astype(np.int16)


def magnetic() -> NDArray[np.int16]:
    """An MR: dark around the body, its tissues spread over hundreds, some values negative."""
    body = voxels() > -200
    spread = np.random.default_rng(0).normal(900, 400, body.shape)
    return np.where(body, spread, -400).clip(-400, 3000).astype(np.int16)


@pytest.mark.parametrize("make", [shifted, magnetic])
def test_values_whose_histogram_is_not_that_of_ct_are_not_in_hu(
    tmp_path: Path, make: Callable[[], NDArray[np.int16]]
) -> None:
    write_image(make(), tmp_path / "scan.nii")
    assert reasons(tmp_path) == ["not in HU"]


def test_a_real_mr_with_negative_values_is_not_in_hu(ct: Path) -> None:
    assert reasons(ct / "awkward" / "nifti" / "anatomical.nii") == ["not in HU"]


@pytest.mark.parametrize("absurd", [3e38, -3e38, 1e30, 40_000])
def test_a_float_scan_with_an_absurd_value_and_padding_is_read(
    tmp_path: Path, absurd: float
) -> None:
    values = voxels().astype(np.float32)
    values[0] = -3024
    values[5, 5, 5] = absurd
    write_image(values, tmp_path / "scan.nii.gz")
    (found,) = find(tmp_path)
    hu = read_volume(found, CONFIG).hu
    assert hu[0].max() == -1000
    assert hu[5, 5, 5] == (32767 if absurd > 0 else -1000)


@pytest.mark.parametrize("spacing_mm", [(1e6, 1e6, 5.0), (1.0, 1.0, 1000.0), (1e-4, 1e-4, 1e-4)])
def test_an_impossible_spacing_is_rejected(
    tmp_path: Path, spacing_mm: tuple[float, float, float]
) -> None:
    write_image(voxels(), tmp_path / "scan.mha", spacing_mm=spacing_mm)
    assert reasons(tmp_path) == ["impossible spacing"]


@pytest.mark.parametrize("stated", [b"", b"0 20 5", b"-20 20 5", b"nan 20 5", b"20 20 0", b"x y z"])
@pytest.mark.parametrize("field", [b"ElementSpacing", b"ElementSize"])
def test_a_meta_image_that_states_no_possible_spacing_is_rejected(
    tmp_path: Path, field: bytes, stated: bytes
) -> None:
    """SimpleITK reads some of them with 1 mm, others without their signs."""
    write_image(voxels(), tmp_path / "scan.mha")
    line = field + b" = " + stated if stated else b""
    state_spacing(tmp_path / "scan.mha", b"ElementSpacing = 20 20 5", line)
    assert_without_spacing(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"space directions: (0,0,0) (0,20,0) (0,0,5)",
        b"space directions: none (0,20,0) (0,0,5)",
        b"spacings: -20 20 5",
        b"spacings: nan 20 5",
    ],
)
def test_an_nrrd_that_states_no_possible_spacing_is_rejected(tmp_path: Path, line: bytes) -> None:
    write_image(voxels(), tmp_path / "scan.nrrd")
    state_spacing(tmp_path / "scan.nrrd", b"space directions: (20,0,0) (0,20,0) (0,0,5)", line)
    assert_without_spacing(tmp_path)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("stated", [0, -5, np.nan, np.inf])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_nifti_that_states_no_possible_spacing_is_rejected(
    tmp_path: Path, name: str, stated: float, axis: int
) -> None:
    write_image(voxels(), tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    struct.pack_into("<f", content, 80 + 4 * axis, stated)
    (tmp_path / "scan.nii").unlink()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert_without_spacing(tmp_path)


@pytest.mark.parametrize(
    ("name", "written", "line"),
    [
        ("scan.mha", b"ElementSpacing = 20 20 5", b"ElementSize = 20 20 5"),
        ("scan.mha", b"ElementSpacing = 20 20 5", b"ElementSpacing: 20  20  5 \r"),
        ("scan.mha", b"ElementSpacing = 20 20 5", b"Comment =\nElementSpacing = 20 20 5"),
        ("scan.nrrd", b"space directions: (20,0,0) (0,20,0) (0,0,5)", b"Spacings: 20 20 5"),
        (
            "scan.nrrd",
            b"space directions: (20,0,0) (0,20,0) (0,0,5)",
            b"spacedirections: (20,0,0) (0,20,0) (0,0,5)",
        ),
    ],
)
def test_other_spellings_of_a_spacing_are_read(
    tmp_path: Path, name: str, written: bytes, line: bytes
) -> None:
    write_image(voxels(), tmp_path / name)
    state_spacing(tmp_path / name, written, line)
    (found,) = find(tmp_path)
    assert read_volume(found, CONFIG).spacing_mm == (5, 20, 20)


def state_spacing(file: Path, written: bytes, line: bytes) -> None:
    content = file.read_bytes()
    if line.lower().startswith(b"spacings"):  # not allowed beside these
        content = re.sub(rb"space( origin)?: .*\n", b"", content)
    assert content.count(written + b"\n") == 1
    file.write_bytes(content.replace(written + b"\n", line + b"\n" if line else b""))


def assert_without_spacing(folder: Path) -> None:
    (found,) = find(folder)
    for read in (read_volume, read_geometry):
        with pytest.raises(Rejected) as rejected:
            read(found, CONFIG)
        assert rejected.value.reason in ("impossible spacing", "no pixel spacing")


@pytest.mark.parametrize("name", ["SCAN.MHA", "Scan.Nrrd", "SCAN.NII", "plain.nii.gz"])
def test_suffixes_may_be_in_capitals_and_files_not_packed(tmp_path: Path, name: str) -> None:
    plain = tmp_path / name.lower().removesuffix(".gz")
    write_image(voxels(), plain)
    plain.rename(tmp_path / name)
    (found,) = find(tmp_path)
    np.testing.assert_array_equal(read_volume(found, CONFIG).hu, voxels())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_nifti_of_8_bits_is_not_in_hu(tmp_path: Path, scaled: bool) -> None:
    values = (voxels().clip(-1000, 1000) // 8 + 127).astype(np.uint8)
    write_image(values, tmp_path / "scan.nii")
    if scaled:
        content = bytearray((tmp_path / "scan.nii").read_bytes())
        struct.pack_into("<2f", content, 112, 8, -1016)
        (tmp_path / "scan.nii").write_bytes(content)
    assert reasons(tmp_path) == ["not in HU"]


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd", "scan.nrrd", "scan.nhdr"])
@pytest.mark.parametrize("slope", [0, 8])
def test_files_that_were_converted_from_nifti_are_not_taken_for_it(
    tmp_path: Path, name: str, slope: float
) -> None:
    """SimpleITK copies the fields of a NIfTI header into what it writes."""
    values = (voxels().clip(-1000, 1000) // 8 + 127).astype(np.uint8) if slope else voxels()
    write_image(values, tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    struct.pack_into("<2f", content, 112, slope, -1016)
    (tmp_path / "scan.nii").write_bytes(content)
    image = SimpleITK.ReadImage(str(tmp_path / "scan.nii"))
    (tmp_path / "converted").mkdir()
    SimpleITK.WriteImage(image, str(tmp_path / "converted" / name), useCompression=True)
    (found,) = find(tmp_path / "converted")
    expected = np.rint(SimpleITK.GetArrayFromImage(image)).clip(-32768)
    hu = read_volume(found, CONFIG).hu
    np.testing.assert_array_equal(hu[expected > -2000], expected[expected > -2000])


def test_a_direction_that_is_no_number_is_rejected(tmp_path: Path) -> None:
    write_image(voxels(), tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    struct.pack_into("<2h", content, 252, 0, 1)
    struct.pack_into("<12f", content, 280, *[np.nan] * 12)
    (tmp_path / "scan.nii").write_bytes(content)
    assert reasons(tmp_path) == ["oblique"]


def test_the_intercept_of_a_nifti_without_a_slope_does_not_count(tmp_path: Path) -> None:
    write_image(voxels(), tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    struct.pack_into("<2f", content, 112, 0, -24)
    (tmp_path / "scan.nii").write_bytes(content)
    (found,) = find(tmp_path)
    np.testing.assert_array_equal(read_volume(found, CONFIG).hu, voxels())


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_nifti_pair_is_reported(tmp_path: Path, order: str) -> None:
    (tmp_path / "scan.hdr").write_bytes(struct.pack(f"{order}i", 348) + bytes(344))
    (tmp_path / "scan.img").write_bytes(bytes(100))
    (tmp_path / "scene.hdr").write_bytes(b"#?RADIANCE")
    assert reasons(tmp_path) == ["NIfTI pair"]


@pytest.mark.parametrize("components", [2, 3])
def test_a_vector_image_is_rejected_by_name(tmp_path: Path, components: int) -> None:
    values = np.full((20, 20, 20, components), -500, np.int16)
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(values, isVector=True), str(tmp_path / "flow.mha")
    )
    assert reasons(tmp_path) == ["RGB or vector"]


def test_a_complex_image_is_rejected_not_fatal(tmp_path: Path) -> None:
    values = np.full((20, 20, 20), -500 + 2j, np.complex64)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(tmp_path / "kspace.nii"))
    assert None not in reasons(tmp_path)


def test_axes_of_length_one_at_the_end_are_dropped(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(voxels()[None], isVector=False)
    SimpleITK.WriteImage(image, str(tmp_path / "image.nii"))
    (found,) = find(tmp_path)
    assert read_volume(found, CONFIG).hu.shape == voxels().shape


@pytest.mark.parametrize(("degrees", "reason"), [(5, None), (30, "oblique")])
def test_an_oblique_scan_is_rejected(tmp_path: Path, degrees: float, reason: str | None) -> None:
    image = SimpleITK.GetImageFromArray(voxels())
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    image.SetDirection((1, 0, 0, 0, cos, -sin, 0, sin, cos))
    SimpleITK.WriteImage(image, str(tmp_path / "oblique.mha"))
    assert reasons(tmp_path) == [reason]


def test_a_header_with_more_voxels_than_the_limit_is_rejected_before_reading(
    tmp_path: Path,
) -> None:
    (tmp_path / "bomb.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 100000 100000 100000\n"
        "ElementType = MET_SHORT\nElementDataFile = bomb.raw\n"
    )
    (tmp_path / "bomb.raw").write_bytes(b"\0" * 100)
    assert reasons(tmp_path) == ["too large"]


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.mhd", "scan.nrrd", "slice.dcm", "slice"])
def test_a_git_lfs_pointer_is_rejected_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    )
    assert reasons(tmp_path) == ["Git LFS pointer"]


def test_a_name_that_is_not_utf_8_is_rejected_as_such(tmp_path: Path) -> None:
    """SimpleITK ends the process when it opens one."""
    folder = tmp_path / os.fsdecode(b"d\xe9r")
    write_image(voxels(), tmp_path / "scan.nii.gz")
    (tmp_path / "scan.nii.gz").rename(tmp_path / os.fsdecode(b"sc\xe9n.nii.gz"))
    write_dicom(patient(), folder)
    assert reasons(tmp_path) == ["name not UTF-8", "name not UTF-8"]


@pytest.mark.parametrize("left", [0, 100, 348])
def test_a_file_that_ends_in_its_header_is_unreadable(tmp_path: Path, left: int) -> None:
    write_image(voxels(), tmp_path / "scan.nii")
    (tmp_path / "scan.nii").write_bytes((tmp_path / "scan.nii").read_bytes()[:left])
    assert reasons(tmp_path) == ["unreadable"]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.mha", "scan.nrrd"])
def test_a_file_that_lacks_its_last_part_is_unreadable(
    tmp_path: Path, name: str, share: float
) -> None:
    write_image(voxels(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    assert reasons(tmp_path) == ["unreadable"]


def test_a_gzip_file_with_a_flipped_bit_is_unreadable(tmp_path: Path) -> None:
    write_image(voxels(), tmp_path / "scan.nii.gz")
    content = bytearray((tmp_path / "scan.nii.gz").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "scan.nii.gz").write_bytes(content)
    assert reasons(tmp_path) == ["unreadable"]


@pytest.mark.parametrize("intercept", [0.0, 1.0])
def test_a_gzip_file_whose_checksum_fails_is_unreadable(tmp_path: Path, intercept: float) -> None:
    """The gzip level is 0, so only the voxels are wrong, and SimpleITK reads it without an error.

    intercept
        Where it is not 0, SimpleITK reads the voxels.
    """
    write_image(voxels(), tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    (tmp_path / "scan.nii").unlink()
    content[112:120] = struct.pack("<2f", 1, intercept)
    packed = bytearray(gzip.compress(bytes(content), compresslevel=0))
    (tmp_path / "scan.nii.gz").write_bytes(packed)
    assert reasons(tmp_path) == [None]
    packed[len(packed) // 2] ^= 16
    (tmp_path / "scan.nii.gz").write_bytes(packed)
    assert reasons(tmp_path) == ["unreadable"]


def test_a_metaimage_without_its_data_is_unreadable(tmp_path: Path) -> None:
    write_image(voxels(), tmp_path / "scan.mhd")
    (tmp_path / "scan.raw").unlink()
    assert reasons(tmp_path) == ["unreadable"]


def test_a_truncated_slice_rejects_its_series(series: Path) -> None:
    file = slice_file(series, 30)
    file.write_bytes(file.read_bytes()[:-100])
    assert reasons(series) == ["short pixel data"]


# Real files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nifti/example4d.nii.gz", "4-D"),
        ("nifti/functional.nii", "4-D"),
        ("nifti/not-nifti.nii", "unreadable"),
        ("nifti/lfs_pointer_ct.nii.gz", "Git LFS pointer"),
        ("nifti/big.nii.gz", "not in HU"),
        ("nifti/little.nii.gz", "not in HU"),
        ("nifti/with_extension.nii.gz", "not in HU"),
        ("dicom/d2n_generic_rgb_001", "not CT"),
        ("dicom/d2n_generic_compressed_jpegls_001", "not CT"),
        ("dicom/d2n_generic_anatomical_002_non_isotropic", "not CT"),
        ("dicom/lidc_0003_11slices", "too few slices"),
        ("dicom_single/pydicom_CT_small.dcm", "too few slices"),
        ("dicom_single/pydicom_MR_truncated.dcm", "not CT"),
        ("dicom_single/pydicom_rtdose.dcm", "not CT"),
    ],
)
def test_an_unusual_file_is_rejected_with_the_right_reason(
    ct: Path, name: str, reason: str
) -> None:
    assert reasons(ct / "awkward" / name) == [reason]


@pytest.mark.parametrize("name", ["mhd_lfs_pointer", "mhd_lfs_pointer/small"])
def test_a_metaimage_that_git_did_not_fetch_is_rejected(ct: Path, name: str) -> None:
    found = find(*(ct / "awkward" / name).glob("*.mhd"))
    assert [read_reason(series) for series in found] in (["Git LFS pointer"], ["unreadable"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("d2n_failing_notavolume_001", "slices at one position"),
        ("d2n_failing_sliceincrement_001", "missing slices"),
    ],
)
def test_unusual_slice_positions_are_rejected_with_the_right_reason(
    ct: Path, name: str, reason: str
) -> None:
    few = replace(CONFIG, min_slices=3)
    assert reasons(ct / "awkward" / "dicom" / name, config=few) == [reason]


def read_only_series(folder: Path, config: PrepareConfig = CONFIG) -> Volume:
    (found,) = find(folder, config=config)
    return read_volume(found, config)


def test_a_prone_patient_is_turned_to_lie_like_the_others(ct: Path) -> None:
    folder = ct / "awkward" / "dicom" / "qin_breast_prone_flip"
    volume = read_only_series(folder, replace(CONFIG, min_slices=9))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    oriented = SimpleITK.DICOMOrient(reader.Execute(), "LPS")
    expected = np.maximum(SimpleITK.GetArrayFromImage(oriented), -2000)
    np.testing.assert_array_equal(np.where(expected == -2000, -1000, expected), volume.hu)


def test_a_real_dicom_series_is_read_with_its_own_spacing(ct: Path) -> None:
    volume = read_only_series(ct / "archive" / "Lung_Dx-A0002")
    assert volume.hu.shape == (30, 512, 512)
    np.testing.assert_allclose(volume.spacing_mm, (8, 0.646, 0.646), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("elastix_3DCT_lung_baseline_small.mha", (64, 78, 57)),
        ("ct-64.nrrd", (79, 64, 64)),
        ("totalseg_example_ct.nii.gz", (112, 101, 122)),
    ],
)
def test_small_real_scans_of_every_format_are_accepted(
    ct: Path, name: str, shape: tuple[int, int, int]
) -> None:
    (found,) = find(ct / "small" / name)
    assert read_volume(found, CONFIG).hu.shape == shape


def test_an_archive_without_usable_files_is_refused_with_all_reasons(
    ct: Path, semgen: Semgen, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    shutil.copytree(ct / "awkward", archive, ignore=shutil.ignore_patterns("anatomical.nii"))
    done = semgen("prepare", archive, tmp_path / "s", "--workers", 1)
    assert done.returncode == 1
    shown = done.stderr.splitlines()[-1]
    wanted = ("not CT", "too few slices", "4-D", "unreadable", "Git LFS pointer", "not in HU")
    assert [reason for reason in wanted if reason not in shown] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]


def test_output_of_the_reading_library_is_hidden(
    ct: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = find(*(ct / "awkward/mhd_lfs_pointer/small").glob("*.mhd"))
    assert [read_reason(series) for series in found] == ["unreadable"]
    assert capfd.readouterr() == ("", "")


def test_odd_headers_are_not_printed(ct: Path, semgen: Semgen, tmp_path: Path) -> None:
    odd = ct / "awkward" / "dicom_single" / "pydicom_no_meta.dcm"
    shutil.copytree(odd.parent, tmp_path / "archive")
    done = semgen("prepare", tmp_path / "archive", tmp_path / "s", "--workers", 1)
    assert "Invalid value" not in done.stderr


# Bugs ----------------------------------------------------------------------------------


def test_a_bug_costs_one_series_and_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(voxels(), tmp_path / "scan.nii")

    def stumble(*_: object) -> None:
        raise OverflowError("as a bug would")

    monkeypatch.setattr("pipeline.stages.survey.read_volume", stumble)
    found = survey_series(find(tmp_path)[0], CONFIG, str(tmp_path), [str(tmp_path)])
    assert found.reason == "internal error"
    assert found.detail.startswith("Traceback")
    assert "OverflowError: as a bug would" in found.detail


def test_a_bug_in_checking_headers_costs_one_series(
    series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.archive.headers.order_slices", None)
    (found,) = find(series)
    assert found.reason == "internal error"
    assert "TypeError" in found.detail
