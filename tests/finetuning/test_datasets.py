"""Public data sets: a tiny copy of each download's layout, complete and incomplete."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from click.testing import CliRunner

from cli import main
from pipeline.phantom.files import write_archive
from tests.support.finetuning import read_rows
from trainer import TrainError
from trainer.finetuning import FinetuneConfig, finetune, load_task
from trainer.finetuning.cases import prepare_cases
from trainer.finetuning.datasets import convert
from trainer.finetuning.grid import Grid


def write(file: Path, values: np.ndarray, *, origin: tuple[float, ...] = (0, 0, 0)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(values)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(file))


# LUNA16


@pytest.fixture
def luna(tmp_path: Path) -> Path:
    """One scan in each subset, with a bright voxel where its nodule is."""
    folder = tmp_path / "LUNA16"
    lines = []
    for number in range(10):
        uid = f"1.3.6.{number}"
        values = np.full((20, 24, 28), -900, np.int16)
        values[10, 12 + number % 3, 14] = 900
        write(folder / f"subset{number}" / f"{uid}.mhd", values, origin=(-100.0, 50.0, 7.0))
        lines.append([uid, -100.0 + 14, 50.0 + 12 + number % 3, 7.0 + 10, 1])
        lines += [[uid, -100.0 + k, 55.0, 9.0, 0] for k in range(5)]
    with (folder / "candidates_V2.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["seriesuid", "coordX", "coordY", "coordZ", "class"])
        writer.writerows(lines)
    return folder


def test_ncc_splits_the_subsets_as_published(luna: Path, tmp_path: Path) -> None:
    task = load_task(convert("ncc", luna, tmp_path / "ncc", negatives=0))
    assert (task.classes, task.segments, len(task.cases)) == (("0", "1"), False, 60)
    split = {case.patient: case.split for case in task.cases}
    assert [split[f"1.3.6.{n}"] for n in range(10)] == (
        ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    )


def test_ncc_keeps_the_given_number_of_negatives_for_each_nodule(
    luna: Path, tmp_path: Path
) -> None:
    rows = read_rows(convert("ncc", luna, tmp_path / "ncc", negatives=2))
    for split, nodules in (("train", 5), ("validation", 2), ("test", 3)):
        labels = [row["label"] for row in rows if row["split"] == split]
        assert (labels.count("1"), labels.count("0")) == (nodules, 2 * nodules)


def test_a_candidate_is_at_the_centre_of_its_crop(luna: Path, tmp_path: Path) -> None:
    task = load_task(convert("ncc", luna, tmp_path / "ncc", negatives=1))
    grid = Grid(spacing_mm=None, shape=(9, 17, 17), intensity="ct", window_hu=(-1000.0, 1000.0))
    for prepared in prepare_cases(task, grid, tmp_path / "cases"):
        image = np.array(prepared.image)
        assert image.shape == (9, 17, 17)
        bright = np.argwhere(image > 0.9).tolist()
        assert (bright == [[4, 8, 8]]) == (prepared.case.label == 1) or prepared.case.label == 0


def test_ncc_trains(luna: Path, tmp_path: Path) -> None:
    manifest = convert("ncc", luna, tmp_path / "ncc", negatives=2)
    config = FinetuneConfig(width=2, shape=(8, 16, 16), batch_size=8, steps=3, device="cpu")
    assert finetune(manifest, tmp_path / "run", config).num_test == 9


def test_an_incomplete_luna16_is_refused(luna: Path, tmp_path: Path) -> None:
    (luna / "subset3" / "1.3.6.3.raw").unlink()
    with pytest.raises(TrainError, match=r"1\.3\.6\.3\.mhd: its \.raw is missing"):
        convert("ncc", luna, tmp_path / "a")
    shutil.rmtree(luna / "subset3")
    with pytest.raises(TrainError, match="subset3 is missing or empty; LUNA16 has ten"):
        convert("ncc", luna, tmp_path / "b")
    (luna / "candidates_V2.csv").unlink()
    with pytest.raises(TrainError, match=r"has no candidates_V2\.csv"):
        convert("ncc", luna, tmp_path / "c")


@pytest.mark.parametrize(
    "line", ["1.3.6.0,nan,1,2,1", "1.3.6.0,1,2,inf,1", "1.3.6.0,1,2,3,2", "1.3.6.0,1,2,3,x", "a"]
)
def test_a_broken_table_of_candidates_is_refused(luna: Path, tmp_path: Path, line: str) -> None:
    with (luna / "candidates_V2.csv").open("a") as table:
        table.write(line + "\n")
    with pytest.raises(TrainError, match=r"candidates_V2\.csv: line \d+ has no seriesuid, coordX"):
        convert("ncc", luna, tmp_path / "ncc")


# LIDC-IDRI

XML = """<?xml version="1.0" encoding="UTF-8"?>
<LidcReadMessage xmlns="http://www.nih.gov">{sessions}</LidcReadMessage>"""
SESSION = "<readingSession>{nodules}</readingSession>"
NODULE = "<unblindedReadNodule><noduleID>{name}</noduleID>{rois}</unblindedReadNodule>"
ROI = """<roi><imageZposition>{z}</imageZposition><inclusion>{inclusion}</inclusion>{edges}</roi>"""
EDGE = "<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"


def square(z: float, low: int, high: int, *, inclusion: str = "TRUE") -> str:
    """An outline that lies just outside the voxels low..high - 1, as the readers drew."""
    corners = [(low - 1, low - 1), (high, low - 1), (high, high), (low - 1, high)]
    edges = "".join(EDGE.format(x=x, y=y) for x, y in [*corners, corners[0]])
    return ROI.format(z=z, inclusion=inclusion, edges=edges)


def write_readings(folder: Path, *readers: list[str]) -> None:
    """The XML of a series: for each reader the regions of each of their nodules."""
    sessions = "".join(
        SESSION.format(
            nodules="".join(NODULE.format(name=k, rois=rois) for k, rois in enumerate(nodules))
        )
        for nodules in readers
    )
    (folder / "069.xml").write_text(XML.format(sessions=sessions))


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("phantoms") / "archive"
    write_archive(made, patients=1, format="dicom", seed=3, matrix=64)
    return next(path.parent for path in made.rglob("*.dcm"))


@pytest.fixture
def series(slices: Path, tmp_path: Path) -> Path:
    """The DICOM series of one patient."""
    folder = tmp_path / "LIDC-IDRI" / "LIDC-IDRI-0001" / "study" / "series"
    return Path(shutil.copytree(slices, folder))


@pytest.fixture
def heights(series: Path) -> list[float]:
    """z in mm of three slices."""
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    return [image.TransformIndexToPhysicalPoint((0, 0, k))[2] for k in (8, 9, 10)]


@pytest.fixture
def lidc(series: Path, heights: list[float], tmp_path: Path) -> Path:
    """One patient; three readers mark a nodule, one of them larger, and one a dot."""
    small = "".join(square(z, 20, 26) for z in heights)
    large = "".join(square(z, 20, 30) for z in heights)
    dot = ROI.format(z=heights[0], inclusion="TRUE", edges=EDGE.format(x=50, y=50))
    write_readings(series, [small], [small], [large], [dot])
    return tmp_path / "LIDC-IDRI"


def convert_masks(tmp_path: Path) -> list[np.ndarray]:
    task = load_task(convert("ncs", tmp_path / "LIDC-IDRI", tmp_path / "ncs"))
    masks = [sitk.GetArrayFromImage(sitk.ReadImage(str(case.mask))) for case in task.cases]
    return [mask.astype(bool) for mask in masks]


def test_ncs_keeps_voxels_that_half_of_the_readers_marked(lidc: Path, tmp_path: Path) -> None:
    task = load_task(convert("ncs", lidc, tmp_path / "ncs"))
    (case,) = task.cases
    assert (case.patient, task.segments) == ("LIDC-IDRI-0001", True)
    assert case.mask is not None
    mask = sitk.ReadImage(str(case.mask))
    image = sitk.ReadImage(str(case.image))
    values = sitk.GetArrayFromImage(mask)
    assert values.sum() == 3 * 6 * 6, "two of three drew the small one"
    assert mask.GetSize()[:2] == (64, 64)
    assert (mask.GetOrigin(), mask.GetSize()) == (image.GetOrigin(), image.GetSize())
    assert np.argwhere(values).min(axis=0)[1:].tolist() == [20, 20]


def test_a_hole_marked_by_a_reader_is_not_nodule(
    series: Path, heights: list[float], tmp_path: Path
) -> None:
    """Nor is its outline, which belongs to the hole; other slices have no hole."""
    solid = "".join(square(z, 20, 30) for z in heights)
    hole = square(heights[1], 24, 26, inclusion="FALSE")
    for reading in (solid + hole, hole + solid):  # the order in the file does not matter
        write_readings(series, [reading])
        (mask,) = convert_masks(tmp_path)
        assert mask.sum(axis=(1, 2)).tolist()[8:11] == [100, 100 - 4 * 4, 100]
        assert not mask[9, 23:27, 23:27].any()
        shutil.rmtree(tmp_path / "ncs")


def test_a_hole_of_one_reader_leaves_the_nodule_of_the_others(
    series: Path, heights: list[float], tmp_path: Path
) -> None:
    solid = square(heights[0], 20, 30)
    hole = square(heights[0], 24, 26, inclusion="FALSE")
    write_readings(series, [solid], [solid], [solid + hole])
    (mask,) = convert_masks(tmp_path)
    assert mask.sum() == 100


def test_marks_that_overlap_in_a_chain_are_one_nodule(
    series: Path, heights: list[float], tmp_path: Path
) -> None:
    """Five marks of which no three share a voxel; three readers made them, so two must agree."""
    chain = [square(heights[0], low, low + 4) for low in (20, 23, 26, 29, 32)]
    write_readings(series, [chain[0], chain[3]], [chain[1], chain[4]], [chain[2]])
    (mask,) = convert_masks(tmp_path)
    assert np.argwhere(mask).tolist() == [[8, k, k] for k in (23, 26, 29, 32)]


def test_two_marks_of_one_reader_count_once(
    series: Path, heights: list[float], tmp_path: Path
) -> None:
    """One reader marks two nodules where the other marks one around both: half of two agree."""
    parts = [square(heights[0], 20, 24), square(heights[0], 26, 30)]
    write_readings(series, parts, [square(heights[0], 20, 30)])
    (mask,) = convert_masks(tmp_path)
    assert mask.sum() == 100


def test_without_agreement_of_half_the_readers_the_most_votes_decide(
    series: Path, heights: list[float], tmp_path: Path
) -> None:
    chain = [square(heights[0], low, low + 4) for low in (20, 23, 26, 29, 32)]
    write_readings(series, *([mark] for mark in chain))
    (mask,) = convert_masks(tmp_path)
    assert np.argwhere(mask).tolist() == [[8, k, k] for k in (23, 26, 29, 32)]


@pytest.mark.parametrize("broken", ["imageZposition", "xCoord", "yCoord"])
def test_an_outline_with_an_invalid_position_is_refused(
    series: Path, heights: list[float], tmp_path: Path, broken: str
) -> None:
    rois = square(heights[0], 20, 30).replace(f"<{broken}>", f"<{broken}>?")
    write_readings(series, [rois])
    with pytest.raises(
        TrainError, match=r"069\.xml: an outline has a position that is not a number"
    ):
        convert_masks(tmp_path)


def test_lidc_without_its_images_is_refused(lidc: Path, tmp_path: Path) -> None:
    for file in lidc.rglob("*.dcm"):
        file.unlink()
    with pytest.raises(TrainError, match=r"069\.xml: no DICOM files beside it"):
        convert("ncs", lidc, tmp_path / "ncs")


# LiTS, BraTS


def test_lcs_splits_the_volumes_as_published(tmp_path: Path) -> None:
    for number in (0, 99, 100, 114, 115, 130):
        batch = tmp_path / "LiTS" / f"Training Batch {1 + (number > 27)}"
        write(batch / f"volume-{number}.nii", np.zeros((4, 8, 8), np.int16))
        mask = np.zeros((4, 8, 8), np.uint8)
        mask[1, 2:4, 2], mask[2, 2, 2] = 1, 2
        write(batch / f"segmentation-{number}.nii", mask)
    task = load_task(convert("lcs", tmp_path / "LiTS", tmp_path / "lcs"))
    assert [case.split for case in task.cases] == [
        "train", "train", "validation", "validation", "test", "test"]  # fmt: skip
    assert task.cases[0].mask is not None
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(task.cases[0].mask)))
    assert (values.max(), values.sum()) == (1, 3), "tumour counts as liver"


def test_an_incomplete_lits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "LiTS").mkdir()
    with pytest.raises(TrainError, match=r"has no volume-0\.nii"):
        convert("lcs", tmp_path / "LiTS", tmp_path / "a")
    write(tmp_path / "LiTS" / "volume-0.nii", np.zeros((4, 8, 8), np.int16))
    write(tmp_path / "LiTS" / "volume-1.nii", np.zeros((4, 8, 8), np.int16))
    write(tmp_path / "LiTS" / "segmentation-0.nii", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(TrainError, match="volume or segmentation 1 is missing"):
        convert("lcs", tmp_path / "LiTS", tmp_path / "b")


@pytest.mark.parametrize(
    ("flair", "mask"),
    [("{}_flair.nii.gz", "{}_seg.nii.gz"), ("{}-t2f.nii.gz", "{}-seg.nii.gz")],
    ids=["2018", "2023"],
)
def test_bms_uses_flair_and_all_labels_of_the_tumour(tmp_path: Path, flair: str, mask: str) -> None:
    for number in range(6):
        case = f"Brats_{number}"
        folder = tmp_path / "BraTS" / "HGG" / case
        write(folder / flair.format(case), np.zeros((4, 8, 8), np.int16))
        labels = np.zeros((4, 8, 8), np.uint8)
        labels[1, 1, 1], labels[1, 1, 2] = 4, 2
        write(folder / mask.format(case), labels)
    manifest = convert("bms", tmp_path / "BraTS", tmp_path / "bms")
    assert {row["intensity"] for row in read_rows(manifest)} == {"per-image"}
    task = load_task(manifest)
    assert sum(case.split == "test" for case in task.cases) == 2
    assert sum(case.split is None for case in task.cases) == 4
    assert task.cases[0].mask is not None
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(task.cases[0].mask))).sum() == 2


def test_brats_without_flair_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "BraTS" / "a" / "a_seg.nii.gz", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(TrainError, match="expected one FLAIR image, found 0"):
        convert("bms", tmp_path / "BraTS", tmp_path / "bms")


# MedMNIST


def test_medmnist_keeps_the_official_split(ct: Path, tmp_path: Path) -> None:
    source = tmp_path / "adrenalmnist3d.npz"
    with np.load(ct / "downstream" / "adrenalmnist3d.npz") as archive:
        np.savez(source, **{name: values[::12] for name, values in archive.items()})
    manifest = convert("medmnist", source, tmp_path / "adrenal")
    assert {row["intensity"] for row in read_rows(manifest)} == {"unit"}
    task = load_task(manifest)
    counts = [
        sum(c.split == split for c in task.cases) for split in ("train", "validation", "test")
    ]
    assert (counts, task.classes) == ([99, 9, 25], ("0", "1"))
    with np.load(source) as archive:
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(task.cases[-1].image)))
        np.testing.assert_array_equal(image, archive["test_images"][-1])
        assert task.cases[-1].label == int(archive["test_labels"][-1, 0])


@pytest.mark.parametrize("name", ["cut.npz", "array.npy"])
def test_a_damaged_file_of_medmnist_is_refused(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "whole.npz", train_images=np.zeros((4, 28, 28, 28), np.uint8))
    np.save(tmp_path / "array.npy", np.zeros(4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    with pytest.raises(TrainError, match="not a file of MedMNIST"):
        convert("medmnist", tmp_path / name, tmp_path / "out")


# All


@pytest.mark.parametrize("kind", ["ncc", "ncs", "lcs", "bms", "medmnist"])
def test_a_missing_or_empty_download_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "missing", tmp_path / "empty"):
        done = CliRunner().invoke(main, ["task", kind, str(source), str(tmp_path / "out")])
        assert done.exit_code == 1
        assert done.stderr.startswith(f"Error: {source}:")
        assert len(done.stderr.splitlines()) == 1


def test_an_existing_task_is_not_replaced(luna: Path, tmp_path: Path) -> None:
    convert("ncc", luna, tmp_path / "ncc")
    with pytest.raises(TrainError, match="already exists"):
        convert("ncc", luna, tmp_path / "ncc")
