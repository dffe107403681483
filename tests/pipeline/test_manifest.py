"""Which series are used: one of a study, or what a manifest lists."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from pipeline.archive.catalogue import Catalogue, Surveyed
from pipeline.archive.folders import find_folders
from pipeline.archive.headers import read_folder
from pipeline.archive.manifest import Manifest, ManifestError
from pipeline.archive.selection import (
    choose_next_best,
    choose_one_per_study,
    number_scans,
    patients_of_scans,
    reject_duplicates,
    series_in_parts,
)
from pipeline.archive.series import Series, patient_key
from pipeline.config import PrepareConfig
from pipeline.phantom.files import write_archive
from pipeline.splits import split_patients
from store.errors import SemgenError
from tests.support.listing import list_series

THIN = Series(
    key="thin", kind="dicom", files=("/a/1", "/a/2"), patient="p", study="s", slice_gap_mm=1.0
)
THICK = replace(THIN, key="thick", slice_gap_mm=5.0)
CORONAL = replace(THIN, key="coronal", axial=False, slice_gap_mm=0.5)
SHORT = replace(THIN, key="a short one", files=("/b/1",))
OTHER = replace(THICK, key="other study", study="t")
READ = Surveyed(
    key="",
    spacing_mm=(1.0, 1.0, 1.0),
    size=(9, 9, 9),
    frame_mm=((0.0,) * 3,) * 2,
    statistics_hu=(-300.0, 500.0),
)
"""What the survey finds, but for the key and the id."""


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    opened = Catalogue(tmp_path / "catalogue")
    yield opened
    opened.close()


def usable(catalogue: Catalogue) -> set[str]:
    return {series.key for series in catalogue.pending()}


# One series of a study ---------------------------------------------------------------------------


def test_the_thinnest_complete_axial_series_of_a_study_is_used(catalogue: Catalogue) -> None:
    catalogue.add([CORONAL, THICK, SHORT, THIN, OTHER])
    choose_one_per_study(catalogue)
    assert usable(catalogue) == {"thin", "other study"}
    assert catalogue.reasons() == {"not chosen": 3}


@pytest.mark.parametrize("keys", [("1", "2"), ("2", "1")])
def test_names_of_folders_do_not_decide_between_equal_series(
    catalogue: Catalogue, keys: tuple[str, str]
) -> None:
    """A key is a hash of the folder's name, a uid one of what the header says."""
    catalogue.add(replace(THIN, key=key, uid=uid) for key, uid in zip(keys, "ab", strict=True))
    choose_one_per_study(catalogue)
    assert usable(catalogue) == {keys[0]}


@pytest.mark.parametrize("keys", [("1", "2"), ("2", "1")])
def test_names_of_folders_do_not_decide_between_copies(
    catalogue: Catalogue, keys: tuple[str, str]
) -> None:
    """The spacing of a NIfTI is that of its DICOM series, rounded."""
    dicom, file = keys
    catalogue.add([replace(THIN, key=dicom), replace(THIN, key=file, kind="file", study="t")])
    for key, spacing in ((dicom, 0.7), (file, 0.699999988)):
        catalogue.record(replace(READ, key=key, scan_id=5, spacing_mm=(spacing,) * 3))
    reject_duplicates(catalogue)
    number_scans(catalogue)
    assert catalogue.scan_series(0).key == dicom


def test_a_coronal_series_is_used_where_the_study_has_no_other(catalogue: Catalogue) -> None:
    catalogue.add([CORONAL, replace(THIN, reason="gantry tilt")])
    choose_one_per_study(catalogue)
    assert usable(catalogue) == {"coronal"}


def test_the_next_best_is_used_when_the_best_cannot_be_read(catalogue: Catalogue) -> None:
    catalogue.add([CORONAL, THICK, THIN, OTHER])
    choose_one_per_study(catalogue)
    catalogue.record(Surveyed(key="thin", reason="unreadable"))
    catalogue.record(Surveyed(key="other study", scan_id=5))
    assert choose_next_best(catalogue) == 1
    assert usable(catalogue) == {"thick"}
    catalogue.record(Surveyed(key="thick", scan_id=5))  # the same content as the other study's
    reject_duplicates(catalogue)
    assert choose_next_best(catalogue) == 0


def test_choosing_twice_changes_nothing(catalogue: Catalogue) -> None:
    catalogue.add([CORONAL, THICK, THIN])
    choose_one_per_study(catalogue)
    catalogue.add([CORONAL, THICK, THIN])
    choose_one_per_study(catalogue)
    assert usable(catalogue) == {"thin"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients; the first one's study also has a thick series, a secondary capture, a scout."""
    archive = tmp_path_factory.mktemp("studies")
    write_archive(archive, patients=2, format="dicom", seed=3, matrix=64)
    (archive / "landmarks.json").unlink()
    headers = [pydicom.dcmread(file) for file in (archive / "phantom-0000").iterdir()]
    headers.sort(key=lambda header: float(header.ImagePositionPatient[2]))
    for kind in ("thick", "capture", "scout"):
        (archive / kind).mkdir()
        for number, original in enumerate(headers):
            header = copy.deepcopy(original)
            header.SeriesInstanceUID = f"{header.SeriesInstanceUID[:62]}.{len(kind)}"
            if kind == "capture":
                header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
            if kind == "scout":
                header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            if kind != "thick" or number % 2 == 0:
                header.save_as(archive / kind / f"{number}.dcm")
    return archive


def dry_run(archive: Path, manifest: Path | None = None, **settings: bool) -> dict[str, str | None]:
    """Reason by folder, None for what would be read."""
    listed = list_series(archive, PrepareConfig(min_slices=8, **settings), manifest)
    return {Path(one.file).parent.name: one.reason for one in listed}


def test_a_dry_run_shows_what_is_used_and_why_the_rest_is_not(studies: Path) -> None:
    assert dry_run(studies) == {
        "phantom-0000": None,
        "phantom-0001": None,
        "thick": "not chosen",
        "capture": "secondary capture",
        "scout": "scout",
    }


def test_all_series_are_used_when_asked_for(studies: Path) -> None:
    assert dry_run(studies, one_per_study=False)["thick"] is None


# Manifest ----------------------------------------------------------------------------------------


def manifest_of(tmp_path: Path, archive: Path, text: str) -> Manifest:
    (tmp_path / "list.csv").write_text(text)
    return Manifest(tmp_path / "list.csv", [archive])


def series_of(archive: Path) -> list[Series]:
    config = PrepareConfig(min_slices=8)
    return [one for folder in find_folders([archive]) for one in read_folder(folder, config)]


def test_listed_series_are_used_and_no_others(studies: Path, tmp_path: Path) -> None:
    text = "path,patient,split\nphantom-0000,Anna,validation\nthick,Anna,validation\n"
    found = manifest_of(tmp_path, studies, text).apply(series_of(studies))
    listed = {Path(one.files[0]).parent.name: one for one in found if one.reason is None}
    assert sorted(listed) == ["phantom-0000", "thick"]
    assert {one.patient for one in listed.values()} == {patient_key("Anna")}
    assert {one.split for one in listed.values()} == {1}
    assert len({one.study for one in listed.values()}) == 2  # both are used, though of one study


def test_a_manifest_overrides_the_choice_within_a_study(studies: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path\n{studies / 'thick'}\n")
    found = dry_run(studies, tmp_path / "list.csv")
    assert found["thick"] is None
    assert found["phantom-0000"] == "not in the manifest"


def test_a_manifest_of_patients_alone_sets_their_splits(studies: Path, tmp_path: Path) -> None:
    series = series_of(studies)
    header = pydicom.dcmread(next(iter((studies / "phantom-0001").iterdir())))
    text = f"patient,split\n{header.PatientID},validation\n"
    found = manifest_of(tmp_path, studies, text).apply(series)
    splits = {Path(one.files[0]).parent.name: one.split for one in found}
    assert splits["phantom-0001"] == 1
    assert splits["phantom-0000"] is None
    assert [one.reason for one in found] == [one.reason for one in series]


def listed_in(manifest: Manifest, archive: Path) -> dict[str, int | None]:
    """Split of the series that are used, by folder."""
    found = [one for one in manifest.apply(series_of(archive)) if one.reason is None]
    return {Path(one.files[0]).parent.name: one.split for one in found}


@pytest.mark.parametrize("place", [0, 7, -1])
def test_any_file_of_a_series_stands_for_all_of_it(
    studies: Path, tmp_path: Path, place: int
) -> None:
    name = sorted(file.name for file in (studies / "thick").iterdir())[place]
    listed = manifest_of(tmp_path, studies, f"path,split\nthick/{name},validation\n")
    assert listed_in(listed, studies) == {"thick": 1}
    assert listed.unused() == []


def test_a_line_nearer_to_a_file_counts_more_than_one_of_a_folder_above(
    studies: Path, tmp_path: Path
) -> None:
    text = f"path,split\n{studies},train\nthick,validation\n"
    found = listed_in(manifest_of(tmp_path, studies, text), studies)
    assert (found["thick"], found["phantom-0001"]) == (1, 0)


def test_a_linked_file_is_listed_by_the_folder_of_its_link(studies: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for file in (studies / "thick").iterdir():
        (links / file.name).symlink_to(file)
    assert listed_in(manifest_of(tmp_path, links, "path\nlinks\n"), links) == {"links": None}


def test_a_link_to_itself_is_shown_as_broken(studies: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "circle.nii").symlink_to(links / "circle.nii")
    manifest = manifest_of(tmp_path, links, "path\nlinks\n")
    assert [one.reason for one in manifest.apply(series_of(links))] == ["broken link"]


def test_lines_for_files_of_one_series_must_agree(studies: Path, tmp_path: Path) -> None:
    one, other = sorted(file.name for file in (studies / "thick").iterdir())[:2]
    text = f"path,split\nscout,\nthick/{one},train\nthick/{other},"
    with pytest.raises(ManifestError, match="lines 3 and 4: files of one series have different"):
        manifest_of(tmp_path, studies, f"{text}validation\n").apply(series_of(studies))
    assert listed_in(manifest_of(tmp_path, studies, f"{text}train\n"), studies) == {"thick": 0}


def test_lines_without_a_series_are_shown(studies: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("path\nthick\nempty\n")
    found = dry_run(studies, tmp_path / "list.csv")
    assert found[tmp_path.name] == "manifest line without a series"
    assert Counter(found.values())["manifest line without a series"] == 1


def test_a_listed_patient_without_a_series_is_shown(studies: Path, tmp_path: Path) -> None:
    header = pydicom.dcmread(next(iter((studies / "phantom-0001").iterdir())))
    text = f"patient,split\n{header.PatientID},train\nNobody,validation\n"
    listed = manifest_of(tmp_path, studies, text)
    listed.apply(series_of(studies))
    assert [one.detail for one in listed.unused()] == ["line 3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "path,split\nthick,train\nscout,train\n./scout/../thick,validation\n",
            ["line 4", "this path is in line 2, too"],
        ),
        ("path,patient\nthick,A\nthick,B\n", ["line 3", "this path is in line 2, too"]),
        ("", ["header needs path or patient"]),
        ("split\ntrain\n", ["header needs path or patient"]),
        ("path,age\nx,3\n", ["header needs path or patient"]),
        ("path\nnowhere.nii\n", ["line 2", "no such file or folder: nowhere.nii"]),
        ("path,split\nthick,test\n", ["line 2", "train, validation or empty", "'test'"]),
        (
            "path,patient,split\nthick,A,train\nscout,A,validation\n",
            ["line 3", "the same split"],
        ),
        ("patient,split\n,train\n", ["line 2", "patient is empty"]),
        ('path\n"thick\n', ["not a CSV file"]),
    ],
)
def test_a_wrong_manifest_is_refused_naming_the_line(
    studies: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ManifestError) as error:
        manifest_of(tmp_path, studies, text)
    assert [word for word in words if word not in str(error.value)] == []


# Copies ------------------------------------------------------------------------------------------

FIRST = replace(THIN, key="a", study="a", patient="Anna")
COPY = replace(THIN, key="b", study="b", patient="Berta")
OTHER_OF_BERTA = replace(THIN, key="c", study="c", patient="Berta")
STRANGER = replace(THIN, key="d", study="d", patient="Dora")
HELD = {"a": 7, "b": 7, "c": 3, "d": 9}  # scans by series: Anna and Berta have scan 7


def survey(catalogue: Catalogue, series: list[Series], *, seed: int = 0) -> dict[int, tuple]:
    """(patient, split) by scan, after all these series were read."""
    catalogue.add(series)
    for one in series:
        if one.reason is None:
            catalogue.record(replace(READ, key=one.key, scan_id=HELD[one.key]))
    reject_duplicates(catalogue)
    number_scans(catalogue)
    config = PrepareConfig(seed=seed, validation_fraction=0.5)
    found = split_patients(**patients_of_scans(catalogue), config=config)
    rows = zip(*(values.tolist() for values in found), strict=True)
    return dict(zip(catalogue.scan_tables()["id"].tolist(), rows, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_two_patients_with_an_identical_scan_are_one(catalogue: Catalogue, seed: int) -> None:
    found = survey(catalogue, [FIRST, COPY, OTHER_OF_BERTA, STRANGER], seed=seed)
    assert found[7] == found[3]
    assert found[9][0] != found[3][0]


@pytest.mark.parametrize("swapped", [False, True])
def test_patients_and_splits_do_not_depend_on_which_copy_is_kept(
    catalogue: Catalogue, swapped: bool
) -> None:
    kept = {False: FIRST, True: replace(COPY, key="a")}
    copy = {False: COPY, True: replace(FIRST, key="b")}
    found = survey(catalogue, [kept[swapped], copy[swapped], OTHER_OF_BERTA, STRANGER])
    assert found == {3: (0, 1), 7: (0, 1), 9: (1, 0)}


def test_the_split_that_a_manifest_wants_for_a_copy_is_its_patients(catalogue: Catalogue) -> None:
    found = survey(catalogue, [FIRST, replace(COPY, split=1), OTHER_OF_BERTA, STRANGER])
    assert [found[scan][1] for scan in (3, 7, 9)] == [1, 1, 0]


def test_patients_with_an_identical_scan_cannot_be_wanted_in_both_splits(
    catalogue: Catalogue,
) -> None:
    with pytest.raises(SemgenError, match=r"scans of 1 patient\(s\) to both splits"):
        survey(catalogue, [replace(FIRST, split=0), replace(COPY, split=1), STRANGER])


def test_two_patients_with_parts_of_one_series_are_one(catalogue: Catalogue) -> None:
    whole = replace(FIRST, uid="one series")
    for reason in ("joined", "duplicate"):
        part = replace(COPY, key=reason, uid="one series", reason=reason)
        found = survey(catalogue, [whole, part, OTHER_OF_BERTA, STRANGER])
        assert found[7] == found[3] != found[9]


# Many series -------------------------------------------------------------------------------------


def count_steps(folder: Path, num_files: int) -> int:
    """Instructions of SQLite, in thousands, from the list of an archive of files to its splits."""
    catalogue, steps = Catalogue(folder), 0

    def count() -> None:
        nonlocal steps
        steps += 1

    catalogue.db.set_progress_handler(count, 1000)
    names = [f"{number:04d}" for number in range(num_files)]
    catalogue.add(
        Series(key=name, kind="file", files=(name,), patient=name, study=name) for name in names
    )
    assert series_in_parts(catalogue) == []
    choose_one_per_study(catalogue)
    for number, name in enumerate(names):
        catalogue.record(replace(READ, key=name, scan_id=number))
    assert choose_next_best(catalogue) == 0
    reject_duplicates(catalogue)
    assert number_scans(catalogue) == len(patients_of_scans(catalogue)["scan"]) == num_files
    catalogue.close()
    return steps


def test_the_work_grows_with_the_number_of_series_not_with_its_square(tmp_path: Path) -> None:
    few, many = (count_steps(tmp_path / str(num), num) for num in (500, 2000))
    assert many < 5 * few
