"""Public data sets: a tiny copy of each download's layout, whole and half."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from click.testing import CliRunner

from cli import main
from pipeline.phantom import write_archive
from trainer import TrainError
from trainer.finetuning import FinetuneConfig, finetune, load_task
from trainer.finetuning.prepared import Grid, prepare_cases
from trainer.finetuning.public import convert


def write(file: Path, values: np.ndarray, *, origin: tuple[float, ...] = (0, 0, 0)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(values)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(file))


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


# LUNA16


@pytest.fixture
def luna(tmp_path: Path) -> Path:
    """One scan a subset, of noise but for a bright voxel where its nodule is."""
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


def test_ncc_deals_subsets_as_published(luna: Path, tmp_path: Path) -> None:
    task = load_task(convert("ncc", luna, tmp_path / "ncc", negatives=0))
    assert (task.classes, task.segments, len(task.cases)) == (("0", "1"), False, 60)
    split = {case.patient: case.split for case in task.cases}
    assert [split[f"1.3.6.{n}"] for n in range(10)] == (
        ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    )


def test_ncc_keeps_some_negatives_for_each_nodule(luna: Path, tmp_path: Path) -> None:
    rows = read_rows(convert("ncc", luna, tmp_path / "ncc", negatives=2))
    for split, nodules in (("train", 5), ("validation", 2), ("test", 3)):
        labels = [row["label"] for row in rows if row["split"] == split]
        assert (labels.count("1"), labels.count("0")) == (nodules, 2 * nodules)


def test_a_candidate_is_in_the_middle_of_its_crop(luna: Path, tmp_path: Path) -> None:
    task = load_task(convert("ncc", luna, tmp_path / "ncc", negatives=1))
    grid = Grid(spacing_mm=None, shape=(9, 17, 17), is_ct=True, window_hu=(-1000.0, 1000.0))
    for prepared in prepare_cases(task, grid, tmp_path / "cases"):
        image = np.array(prepared.image)
        assert image.shape == (9, 17, 17)
        bright = np.argwhere(image > 0.9).tolist()
        assert (bright == [[4, 8, 8]]) == (prepared.case.label == 1) or prepared.case.label == 0


def test_ncc_trains(luna: Path, tmp_path: Path) -> None:
    manifest = convert("ncc", luna, tmp_path / "ncc", negatives=2)
    config = FinetuneConfig(width=2, shape=(8, 16, 16), batch_size=8, steps=3, device="cpu")
    assert finetune(manifest, tmp_path / "run", config).num_test == 9


def test_a_half_downloaded_luna16_is_told(luna: Path, tmp_path: Path) -> None:
    (luna / "subset3" / "1.3.6.3.raw").unlink()
    with pytest.raises(TrainError, match=r"1\.3\.6\.3\.mhd: its \.raw is missing"):
        convert("ncc", luna, tmp_path / "a")
    shutil.rmtree(luna / "subset3")
    with pytest.raises(TrainError, match="subset3 is missing or empty; LUNA16 has ten"):
        convert("ncc", luna, tmp_path / "b")
    (luna / "candidates_V2.csv").unlink()
    with pytest.raises(TrainError, match=r"has no candidates_V2\.csv"):
        convert("ncc", luna, tmp_path / "c")


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


@pytest.fixture
def lidc(tmp_path: Path) -> Path:
    """One patient; three readers mark a nodule, one of them larger, and one a dot."""
    made = tmp_path / "phantoms"
    write_archive(made, patients=1, format="dicom", seed=3, matrix=64)
    series = next(path.parent for path in made.rglob("*.dcm"))
    folder = tmp_path / "LIDC-IDRI" / "LIDC-IDRI-0001" / "study" / "series"
    shutil.copytree(series, folder)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    heights = [image.TransformIndexToPhysicalPoint((0, 0, k))[2] for k in (8, 9, 10)]
    small = "".join(square(z, 20, 26) for z in heights)
    large = "".join(square(z, 20, 30) for z in heights)
    dot = ROI.format(z=heights[0], inclusion="TRUE", edges=EDGE.format(x=50, y=50))
    sessions = "".join(
        SESSION.format(nodules=NODULE.format(name=name, rois=rois))
        for name, rois in (("a", small), ("b", small), ("c", large), ("dot", dot))
    )
    (folder / "069.xml").write_text(XML.format(sessions=sessions))
    return tmp_path / "LIDC-IDRI"


def test_ncs_takes_what_half_of_the_readers_agree_on(lidc: Path, tmp_path: Path) -> None:
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


def test_lidc_without_its_images_is_told(lidc: Path, tmp_path: Path) -> None:
    for file in lidc.rglob("*.dcm"):
        file.unlink()
    with pytest.raises(TrainError, match=r"069\.xml: no DICOM files beside it"):
        convert("ncs", lidc, tmp_path / "ncs")


# LiTS, BraTS


def test_lcs_deals_volumes_as_published(tmp_path: Path) -> None:
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


def test_a_half_downloaded_lits_is_told(tmp_path: Path) -> None:
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
def test_bms_takes_flair_and_the_whole_tumour(tmp_path: Path, flair: str, mask: str) -> None:
    for number in range(6):
        case = f"Brats_{number}"
        folder = tmp_path / "BraTS" / "HGG" / case
        write(folder / flair.format(case), np.zeros((4, 8, 8), np.int16))
        labels = np.zeros((4, 8, 8), np.uint8)
        labels[1, 1, 1], labels[1, 1, 2] = 4, 2
        write(folder / mask.format(case), labels)
    task = load_task(convert("bms", tmp_path / "BraTS", tmp_path / "bms"))
    assert sum(case.split == "test" for case in task.cases) == 2
    assert sum(case.split is None for case in task.cases) == 4
    assert task.cases[0].mask is not None
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(task.cases[0].mask))).sum() == 2


def test_brats_without_flair_is_told(tmp_path: Path) -> None:
    write(tmp_path / "BraTS" / "a" / "a_seg.nii.gz", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(TrainError, match="expected one FLAIR image, found 0"):
        convert("bms", tmp_path / "BraTS", tmp_path / "bms")


# MedMNIST


def test_medmnist_keeps_the_official_split(ct: Path, tmp_path: Path) -> None:
    source = ct / "downstream" / "adrenalmnist3d.npz"
    task = load_task(convert("medmnist", source, tmp_path / "adrenal"))
    counts = [
        sum(c.split == split for c in task.cases) for split in ("train", "validation", "test")
    ]
    assert (counts, task.classes) == ([1188, 98, 298], ("0", "1"))
    with np.load(source) as archive:
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(task.cases[-1].image)))
        np.testing.assert_array_equal(image, archive["test_images"][-1])
        assert task.cases[-1].label == int(archive["test_labels"][-1, 0])


# All


@pytest.mark.parametrize("kind", ["ncc", "ncs", "lcs", "bms", "medmnist"])
def test_nothing_at_all_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "missing", tmp_path / "empty"):
        done = CliRunner().invoke(main, ["task", kind, str(source), str(tmp_path / "out")])
        assert done.exit_code == 1
        assert done.stderr.startswith(f"Error: {source}:")
        assert len(done.stderr.splitlines()) == 1


def test_a_task_that_is_there_is_kept(luna: Path, tmp_path: Path) -> None:
    convert("ncc", luna, tmp_path / "ncc")
    with pytest.raises(TrainError, match="is there already"):
        convert("ncc", luna, tmp_path / "ncc")
