"""What the synthetic patients promise: known anatomy, one truth in every patient, same bytes."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.phantom import patients as phantom_module
from pipeline.phantom.atlas import LANDMARKS
from pipeline.phantom.disease import Effusion, Mass
from pipeline.phantom.files import masks_folder, write_archive, write_dicom, write_nifti
from pipeline.phantom.patients import COVERAGE_MM, TABLE_RADIUS_MM, Phantom, draw_phantom
from pipeline.phantom.solids import LABELS
from pipeline.phantom.variation import MIN_HEIGHT_MM
from store.errors import SemgenError
from tests.support.progress import CountedProgress

WHOLE = "chest-abdomen"


@cache
def small(index: int, protocol: str = WHOLE) -> Phantom:
    return draw_phantom(7, index, matrix=64, protocol=protocol)


@cache
def varied(index: int, protocol: str | None = WHOLE) -> Phantom:
    return draw_phantom(7, index, matrix=64, protocol=protocol, varied=True)


@cache
def masks() -> NDArray[np.uint8]:
    return small(0).render_masks()


@cache
def scan(index: int, protocol: str = WHOLE) -> NDArray[np.int16]:
    return small(index, protocol).render()


def points_in(phantom: Phantom) -> NDArray[np.float64]:
    """(2000, 3) random positions in the scan, in mm."""
    extent_mm = (np.array(phantom.size) - 1) * phantom.spacing_mm
    return np.random.default_rng([0, 2000]).uniform(0, extent_mm, (2000, 3))


def as_lps(image: SimpleITK.Image) -> SimpleITK.Image:
    return SimpleITK.DICOMOrient(image, "LPS")


def read_series(directory: Path) -> SimpleITK.Image:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(directory)))
    return reader.Execute()


def tissue(phantom: Phantom, landmark: str) -> float:
    """HU, without contrast, at a landmark."""
    native = replace(phantom, contrast=0.0)
    return float(native.anatomy_hu(np.array([phantom.landmarks()[landmark]]))[0])


@pytest.mark.parametrize("draw", [small, varied])
@pytest.mark.parametrize("index", range(3))
def test_mapping_to_the_atlas_and_back_returns_every_point(
    draw: Callable[[int], Phantom], index: int
) -> None:
    phantom = draw(index)
    points_mm = points_in(phantom)
    np.testing.assert_allclose(
        phantom.from_atlas(phantom.to_atlas(points_mm)), points_mm, atol=1e-4
    )


@pytest.mark.parametrize("draw", [small, varied])
@pytest.mark.parametrize("index", range(3))
def test_no_deformation_folds_the_body(draw: Callable[[int], Phantom], index: int) -> None:
    phantom = draw(index)
    points_mm, step = points_in(phantom), 0.01
    columns = [
        (phantom.to_atlas(points_mm + shift) - phantom.to_atlas(points_mm - shift)) / (2 * step)
        for shift in step * np.eye(3)
    ]
    assert np.linalg.det(np.stack(columns, axis=2)).min() > 0.1


@pytest.mark.parametrize("draw", [small, varied])
def test_the_same_anatomy_has_the_same_hu_in_two_patients(draw: Callable[[int], Phantom]) -> None:
    one, other = (replace(draw(k), contrast=0.5, arms=None, disease=None) for k in range(2))
    here_mm = points_in(one)
    there_mm = other.from_atlas(one.to_atlas(here_mm))
    assert np.abs(there_mm - here_mm).max() > 10
    np.testing.assert_allclose(one.anatomy_hu(here_mm), other.anatomy_hu(there_mm), atol=0.5)


@pytest.mark.parametrize("draw", [small, varied])
def test_without_noise_table_and_padding_a_voxel_is_the_anatomy_at_its_position(
    draw: Callable[[int], Phantom],
) -> None:
    clean = replace(draw(1), noise_hu=0.0, table_mm=None, padding_hu=None)
    indices = np.random.default_rng(0).integers(0, clean.size, (4000, 3))
    expected = clean.anatomy_hu(indices * np.array(clean.spacing_mm))
    # Rendering is in single precision, which shows at edges only, by hundredths of a mm.
    np.testing.assert_allclose(clean.render()[tuple(indices.T)], expected, atol=25)


def test_rendering_does_not_depend_on_how_many_slices_are_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = scan(2)
    monkeypatch.setattr(phantom_module, "SLAB_VOXELS", 64 * 64 * 7)
    np.testing.assert_array_equal(small(2).render(), at_once)


@pytest.mark.parametrize(("seed", "index"), [(7, 1), (8, 0)])
def test_another_index_or_seed_is_another_patient(seed: int, index: int) -> None:
    assert draw_phantom(seed, index).deformation != draw_phantom(7, 0).deformation


def test_a_finer_matrix_shows_the_same_patient() -> None:
    coarse, fine = draw_phantom(7, 0, matrix=64), draw_phantom(7, 0, matrix=128)
    assert coarse.deformation == fine.deformation


@pytest.mark.parametrize("protocol", COVERAGE_MM)
def test_every_scan_is_large_enough_for_crops(protocol: str) -> None:
    for index in range(20):
        phantom = small(index, protocol)
        z_mm, y_mm, x_mm = np.array(phantom.size) * phantom.spacing_mm
        assert z_mm >= 180
        assert min(y_mm, x_mm) >= 320


def test_all_protocols_are_drawn() -> None:
    assert {draw_phantom(0, index).protocol for index in range(40)} == set(COVERAGE_MM)


def test_axes_grow_to_the_head_the_back_and_the_patients_left() -> None:
    places = small(0).landmarks()
    assert places["vertebra_L4"][0] < places["vertebra_T10"][0] < places["vertebra_T2"][0]
    assert places["heart_centre"][1] + 40 < places["vertebra_T8"][1]
    assert places["liver_dome"][2] < places["heart_centre"][2] < places["spleen"][2]


@pytest.mark.parametrize(
    ("landmark", "low_hu", "high_hu"),
    [
        ("carina", -1000, -950),
        ("stomach_gas", -1000, -950),
        ("left_lung_apex", -900, -750),
        ("aortic_arch", 30, 70),
        ("liver_dome", 40, 80),
        ("right_kidney", 20, 60),
        ("vertebra_L3", 150, 900),
        ("right_humeral_head", 150, 900),
        ("sternal_notch", 150, 900),
        ("xiphoid", 150, 900),
        ("aortic_root", 30, 70),
        ("aortic_bifurcation", 30, 70),
        ("right_atrium", 30, 70),
        ("gallbladder", 0, 20),
        ("pancreas_head", 20, 60),
        ("right_renal_hilum", -110, -80),
        ("left_iliac_crest", 150, 900),
    ],
)
def test_a_landmark_lies_in_its_tissue(landmark: str, low_hu: float, high_hu: float) -> None:
    for index in range(2):
        phantom = replace(small(index), size=(1000, 64, 64))
        assert low_hu <= tissue(phantom, landmark) <= high_hu


def test_landmarks_outside_the_scan_are_left_out() -> None:
    places = small(0, "abdomen").landmarks()
    assert "left_kidney" in places
    assert "carina" not in places


def test_contrast_brightens_the_aorta_and_leaves_the_bone() -> None:
    native, bright = (replace(small(0), contrast=c) for c in (0.0, 1.0))
    at_mm = np.array([native.landmarks()[name] for name in ("aortic_arch", "vertebra_T7")])
    gain_hu = bright.anatomy_hu(at_mm) - native.anatomy_hu(at_mm)
    assert gain_hu[0] > 100
    assert abs(gain_hu[1]) < 1


def test_noise_has_the_patients_noise_hu() -> None:
    phantom = replace(small(0), noise_hu=12.0)
    noise = phantom.render().astype(float) - replace(phantom, noise_hu=0.0).render()
    inside = scan(0) > -500  # air is clipped
    assert noise[inside].std() == pytest.approx(12, rel=0.05)


def test_a_table_lies_behind_the_patient_and_nowhere_else() -> None:
    phantom = replace(small(0), noise_hu=0.0, padding_hu=None, table_mm=250.0)
    changed = np.argwhere(phantom.render() != replace(phantom, table_mm=None).render())
    assert changed[:, 1].min() * phantom.spacing_mm[1] > 200


def test_no_patient_intersects_the_table() -> None:
    for index in range(5):
        phantom = small(index)
        if phantom.table_mm is not None:
            points_mm = points_in(phantom)
            points_mm[:, 1:] = phantom.table_mm + 1, phantom.deformation.centre_mm[2]
            assert phantom.anatomy_hu(points_mm).max() == -1000


def test_padding_fills_the_corners_only() -> None:
    padded = replace(small(0), padding_hu=-2000).render()
    assert (padded[:, 0, 0] == -2000).all()
    assert (padded[:, 32, 32] > -2000).all()


# Varied patients ---------------------------------------------------------------------------------


def test_a_patient_who_is_not_varied_keeps_the_bytes_that_are_recorded() -> None:
    voxels = draw_phantom(7, 0, matrix=32, protocol=WHOLE).render().tobytes()
    assert hashlib.sha256(voxels).hexdigest()[:16] == "7c001542915d0e8c"


def test_a_varied_patient_has_the_same_bytes_each_time_and_is_another_one() -> None:
    again = draw_phantom(7, 1, matrix=64, protocol=WHOLE, varied=True)
    assert again == varied(1) != small(1)
    np.testing.assert_array_equal(again.render(), pickle.loads(pickle.dumps(varied(1))).render())


def test_varied_scans_are_cut_at_both_ends_and_stay_large_enough() -> None:
    patients = [varied(index) for index in range(20)]
    ends = np.array([
        [p.to_atlas(np.array([[z_mm, *p.deformation.centre_mm[1:]]]))[0, 0]
         for z_mm in (0, (p.size[0] - 1) * p.spacing_mm[0])]
        for p in patients
    ])  # fmt: skip
    assert (np.ptp(ends, axis=0) > 90).all()
    for index, phantom in enumerate(patients):
        for patient in (phantom, varied(index, "chest") if index < 5 else phantom):
            assert patient.size[0] * patient.spacing_mm[0] >= MIN_HEIGHT_MM
            assert patient.size[0] >= 24


def test_organs_of_varied_patients_move_against_the_spine() -> None:
    names = ["heart_centre", "liver_dome", "right_kidney", "left_kidney", "bladder"]
    spine = ["vertebra_T8", "vertebra_T10", "vertebra_L2", "vertebra_L2", "vertebra_L5"]
    organ, bone = (np.array([LANDMARKS[name] for name in group]) for group in (names, spine))

    def spread_mm(draw: Callable[[int], Phantom]) -> NDArray[np.float64]:
        patients = map(draw, range(12))
        apart = [(p.from_atlas(organ) - p.from_atlas(bone)) / p.deformation.scale for p in patients]
        return np.std(apart, axis=0)[:, 0]

    assert (spread_mm(varied) > 1.3 * spread_mm(small)).all()


def test_arms_are_drawn_up_down_or_not_at_all() -> None:
    assert {p.arms and p.arms.pose for p in map(varied, range(20))} == {"up", "down", None}


def test_arms_beside_the_trunk_are_parts_of_their_own_in_a_slice() -> None:
    phantom = replace(varied(1), table_mm=None, noise_hu=0.0)
    assert phantom.arms
    assert phantom.arms.pose == "down"
    parts, count = ndimage.label(phantom.render()[phantom.size[0] // 2] > -300)
    largest = np.sort(np.bincount(parts.ravel())[1:])[::-1] * np.prod(phantom.spacing_mm[1:])
    assert count >= 3
    assert largest[2] > 20 * 20


def test_no_varied_patient_intersects_the_table() -> None:
    for index in range(8):
        phantom = varied(index)
        if phantom.table_mm is not None:
            points_mm = points_in(phantom)
            aside_mm = points_mm[:, 2] - phantom.deformation.centre_mm[2]
            top_mm = phantom.table_mm - TABLE_RADIUS_MM
            points_mm[:, 1] = top_mm + np.sqrt(TABLE_RADIUS_MM**2 - aside_mm**2) + 1
            assert phantom.anatomy_hu(points_mm[np.abs(aside_mm) < 205]).max() < -990


def test_all_diseases_are_drawn_within_their_organ() -> None:
    diseases = [varied(index, None).disease for index in range(20)]
    found = {(d.kind, d.organ.removeprefix("right_").removeprefix("left_")) for d in diseases if d}
    assert found == {("mass", "lung"), ("mass", "liver"), ("effusion", "lung")}
    assert 0.05 < np.mean([d is not None for d in diseases]) < 0.5


@pytest.mark.parametrize(
    ("disease", "hidden", "hu"),
    [
        (Mass("right_lung", LANDMARKS["right_lung_apex"], (12, 9, 9), (0, 0, 0)),
         "right_lung_apex", 36),
        (Effusion("left_lung", 30.0), "left_lung_base", 10),
    ],
)  # fmt: skip
def test_landmarks_within_the_disease_are_left_out(
    disease: Mass | Effusion, hidden: str, hu: float
) -> None:
    healthy = replace(small(0), contrast=0.0)
    ill = replace(healthy, disease=disease)
    assert healthy.landmarks().keys() - ill.landmarks().keys() == {hidden}
    at_mm = np.array([healthy.landmarks()[hidden]])
    assert healthy.anatomy_hu(at_mm)[0] < -750
    assert ill.anatomy_hu(at_mm)[0] == pytest.approx(hu, abs=1)
    assert (ill.render_masks() == LABELS[disease.kind]).any()


# Masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("organ", "low_hu", "high_hu"),
    [
        ("background", -1024, -900),
        ("right_lung", -900, -600),
        ("left_lung", -900, -600),
        ("heart", 30, 250),
        ("aorta", 30, 260),
        ("liver", 40, 130),
        ("spleen", 40, 140),
        ("right_kidney", 20, 200),
        ("stomach", -100, 100),
        ("bladder", -20, 60),
        ("spine", 60, 400),
    ],
)
def test_a_mask_covers_the_tissue_of_its_organ(organ: str, low_hu: float, high_hu: float) -> None:
    assert low_hu <= np.median(scan(0)[masks() == LABELS[organ]]) <= high_hu


def test_all_healthy_organs_have_a_mask() -> None:
    shown = replace(small(0), size=(small(0).size[0] + 30, 64, 64)).render_masks()
    assert set(np.unique(shown).tolist()) == set(LABELS.values()) - {
        LABELS["mass"], LABELS["effusion"]
    }  # fmt: skip


def test_masks_tell_right_from_left() -> None:
    for organ in ("lung", "kidney"):
        right, left = (
            np.argwhere(masks() == LABELS[f"{side}_{organ}"])[:, 2] for side in ("right", "left")
        )
        assert right.mean() + 10 < left.mean()


def test_the_mask_of_the_aorta_is_a_tube_before_the_spine() -> None:
    aorta = masks() == LABELS["aorta"]
    assert ndimage.label(aorta, np.ones((3, 3, 3)))[1] == 1
    places = np.argwhere(aorta) * small(0).spacing_mm
    below = places[places[:, 0] < small(0).landmarks()["heart_centre"][0] - 40]
    for z_mm in np.unique(below[:, 0]):
        assert (np.ptp(below[below[:, 0] == z_mm], axis=0) < 45).all()
    assert below[:, 1].max() < small(0).landmarks()["vertebra_T10"][1]


def test_masks_are_on_the_grid_of_their_scans_and_beside_the_archive(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    write_archive(archive, patients=2, format="mixed", seed=2, matrix=16, masks=True)
    files = sorted(path.name for path in masks_folder(archive).iterdir())
    assert files == ["labels.json", "phantom-0000.nii.gz", "phantom-0001.nii.gz"]
    assert sorted(path.name for path in archive.iterdir()) == [
        "landmarks.json", "phantom-0000.nii.gz", "phantom-0001"
    ]  # fmt: skip
    assert json.loads((masks_folder(archive) / "labels.json").read_text()) == LABELS
    (tmp_path / "new.masks").mkdir()
    (tmp_path / "new.masks" / "mine.nii.gz").touch()
    with pytest.raises(SemgenError, match=r"new\.masks: exists and is not an empty folder"):
        write_archive(tmp_path / "new", patients=1, masks=True)
    scans = [
        SimpleITK.ReadImage(str(archive / "phantom-0000.nii.gz")),
        read_series(archive / "phantom-0001"),
    ]
    for index, image in enumerate(scans):
        mask = SimpleITK.ReadImage(str(masks_folder(archive) / f"phantom-{index:04d}.nii.gz"))
        assert mask.GetSize() == image.GetSize()
        np.testing.assert_allclose(mask.GetSpacing(), image.GetSpacing(), atol=1e-4)
        np.testing.assert_allclose(mask.GetOrigin(), image.GetOrigin(), atol=2e-3)
        np.testing.assert_allclose(mask.GetDirection(), image.GetDirection(), atol=1e-6)
        expected = draw_phantom(2, index, matrix=16).render_masks()
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(as_lps(mask)), expected)


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PSR"])
def test_a_nifti_file_turned_to_lps_is_the_rendered_scan(tmp_path: Path, orientation: str) -> None:
    phantom = replace(small(1, "chest"), orientation=orientation)
    write_nifti(phantom, tmp_path / "scan.nii")
    image = as_lps(SimpleITK.ReadImage(str(tmp_path / "scan.nii")))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), scan(1, "chest"))
    np.testing.assert_allclose(image.GetSpacing()[::-1], phantom.spacing_mm, rtol=1e-6)
    np.testing.assert_allclose(image.GetOrigin()[::-1], phantom.origin_mm, atol=1e-3)


@pytest.mark.parametrize(("signed", "padding_hu"), [(False, None), (True, -2000)])
def test_a_dicom_series_is_the_rendered_scan(
    tmp_path: Path, signed: bool, padding_hu: int | None
) -> None:
    phantom = replace(small(1, "chest"), signed=signed, padding_hu=padding_hu)
    write_dicom(phantom, tmp_path)
    image = as_lps(read_series(tmp_path))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), phantom.render())
    np.testing.assert_allclose(image.GetSpacing()[::-1], phantom.spacing_mm, atol=1e-4)
    np.testing.assert_allclose(image.GetOrigin()[::-1], phantom.origin_mm, atol=1e-3)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[pydicom.Dataset]:
    """One series, by file name."""
    directory = tmp_path_factory.mktemp("series")
    write_dicom(draw_phantom(2, 1, matrix=16), directory)
    return [pydicom.dcmread(path) for path in sorted(directory.iterdir())]


def test_every_dicom_file_has_its_own_instance_uid(slices: list[pydicom.Dataset]) -> None:
    assert len({data.SOPInstanceUID for data in slices}) == len(slices)
    assert all(d.file_meta.MediaStorageSOPInstanceUID == d.SOPInstanceUID for d in slices)


def test_dicom_files_are_not_named_in_slice_order(slices: list[pydicom.Dataset]) -> None:
    heights = [float(data.ImagePositionPatient[2]) for data in slices]
    assert heights != sorted(heights)
    assert heights != sorted(heights, reverse=True)


def test_every_drawn_patient_fits_the_range_of_its_dicom_pixels() -> None:
    assert all(p.signed or p.padding_hu is None for p in map(small, range(20)))


def test_a_series_is_not_mixed_into_a_directory_that_holds_files(tmp_path: Path) -> None:
    (tmp_path / "other.dcm").touch()
    with pytest.raises(FileExistsError, match="must be empty"):
        write_dicom(small(1, "chest"), tmp_path)


def test_a_mixed_archive_alternates_formats_and_has_the_same_bytes_each_time(
    tmp_path: Path,
) -> None:
    trees = []
    for name in ("one", "two"):
        write_archive(tmp_path / name, patients=2, format="mixed", seed=2, matrix=16)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        trees.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
    assert trees[0] == trees[1]
    stored = {path.parts[0] for path in trees[0]}
    assert stored == {"phantom-0000.nii.gz", "phantom-0001", "landmarks.json"}


def test_a_compressed_file_contains_no_time(tmp_path: Path) -> None:
    write_nifti(draw_phantom(7, 0, matrix=16), tmp_path / "scan.nii.gz")
    assert (tmp_path / "scan.nii.gz").read_bytes()[4:8] == bytes(4)


def test_the_truth_of_an_archive_describes_its_files(tmp_path: Path) -> None:
    write_archive(tmp_path, patients=2, seed=2, matrix=16)
    truth = json.loads((tmp_path / "landmarks.json").read_text())["patients"]
    for name, entry in truth.items():
        image = as_lps(SimpleITK.ReadImage(str(tmp_path / name)))
        assert list(image.GetSize()[::-1]) == entry["size"]
        np.testing.assert_allclose(image.GetSpacing()[::-1], entry["spacing_mm"], rtol=1e-6)
    assert len(truth) == 2


def test_writing_an_archive_shows_its_progress(tmp_path: Path) -> None:
    progress = CountedProgress()
    write_archive(tmp_path, patients=2, seed=2, matrix=16, progress=progress)
    assert progress.totals == {"phantoms": 2}
    assert progress.units == {"phantoms": 2}


def test_the_writer_and_a_patient_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps((write_archive, small(0)))) == (write_archive, small(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "head"}, "protocol must be one of chest, abdomen, chest-abdomen, got 'head'"),
        ({"index": -1}, "seed and index must be >= 0"),
        ({"matrix": 8}, "matrix >= 16"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_phantom(**{"seed": 0, "index": 0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": 0}, "patients must be >= 1, got 0"),
        ({"patients": 1, "format": "png"}, "format must be nifti, dicom or mixed, got 'png'"),
    ],
)
def test_wrong_arguments_for_an_archive_are_refused(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_archive(tmp_path, **arguments)
