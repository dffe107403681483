"""Places of the same anatomy in two scans."""

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.archive.volume import Volume
from pipeline.config import PrepareConfig
from pipeline.crops import make_thumbnail
from pipeline.features import Features
from pipeline.frame import frame_box
from pipeline.match import describe_place, describe_scan, match_place
from pipeline.match_files import match_files
from pipeline.phantom.files import write_nifti
from pipeline.phantom.patients import Phantom, draw_phantom
from store.format import THUMBNAIL_SHAPE
from tests.support.command import assert_refused, run

SEED = 20


def describe(volume: Volume) -> Features:
    box = frame_box(volume, "body")
    thumbnail = make_thumbnail(volume, box, THUMBNAIL_SHAPE, PrepareConfig())
    return describe_scan(
        thumbnail, box_mm=box, edges_mm=volume.edges_mm, window_hu=(-1000.0, 1000.0)
    )


@cache
def scan(index: int, protocol: str) -> tuple[Phantom, Volume]:
    phantom = draw_phantom(SEED, index, matrix=96, protocol=protocol)
    hu = np.maximum(phantom.render(), -1024)
    return phantom, Volume(hu=hu.astype(np.int16), spacing_mm=phantom.spacing_mm)


def inside(phantom: Phantom, count: int) -> NDArray[np.float64]:
    """Places in the body, away from the ends of the scan, always the same."""
    low, high = describe(scan(phantom.index, phantom.protocol)[1]).box_mm
    rng = np.random.default_rng(phantom.index)
    return low + (high - low) * rng.uniform(0.3, 0.7, (count, 3))


def test_a_place_is_found_in_the_scan_itself_cut_and_shifted() -> None:
    phantom, volume = scan(0, "chest")
    z, y, x = 12, 2, 3
    part = Volume(hu=volume.hu[z:-6, y:, x:], spacing_mm=volume.spacing_mm)
    shift = np.array([z, y, x]) * volume.spacing_mm
    here, there = describe(volume), describe(part)
    for place in inside(phantom, 6):
        match = match_place(place, here, there)
        assert match is not None
        assert match.problem() is None
        assert np.linalg.norm(match.place_mm - (place - shift)) < 1.0


def test_places_in_another_patient_are_those_of_the_same_anatomy() -> None:
    """Median over the trusted ones; the truth is known from the phantoms' atlas."""
    errors, trusted = [], 0
    for one, other in ((0, 1), (1, 2), (2, 0)):
        (phantom, here), (target, there) = scan(one, "chest"), scan(other, "chest")
        described, others = describe(here), describe(there)
        for place in inside(phantom, 6):
            match = match_place(place, described, others)
            if match is None or match.problem():
                continue
            trusted += 1
            truth = target.from_atlas(phantom.to_atlas(place[None]))[0]
            errors.append(np.linalg.norm(match.place_mm - truth))
    assert trusted >= 9
    assert np.median(errors) < 6


def test_most_anatomy_that_the_other_scan_does_not_show_is_rejected() -> None:
    """Landmarks of the chest in abdomens; most that are accepted are near the end (note 12)."""
    rejected, absent = 0, 0
    for index in range(3):
        (phantom, chest), (other, abdomen) = scan(index, "chest"), scan(index, "abdomen")
        here, there = describe(chest), describe(abdomen)
        for name in sorted(phantom.landmarks().keys() - other.landmarks().keys()):
            match = match_place(np.array(phantom.landmarks()[name]), here, there)
            absent += 1
            rejected += match is None or match.problem() is not None
    assert absent >= 30
    assert rejected >= 0.8 * absent


def test_the_same_scans_give_the_same_match() -> None:
    phantom, volume = scan(0, "chest")
    other = scan(1, "chest")[1]
    place = inside(phantom, 1)[0]
    one, again = (match_place(place, describe(volume), describe(other)) for _ in range(2))
    assert one is not None
    assert again is not None
    assert (one.place_mm.tolist(), one.score) == (again.place_mm.tolist(), again.score)


def test_what_one_place_needs_of_a_scan_is_small_and_gives_the_same_match() -> None:
    phantom, volume = scan(0, "chest-abdomen")
    here, there = describe(volume), describe(scan(1, "chest-abdomen")[1])
    for place in inside(phantom, 4):
        data = pickle.dumps(describe_place(here, place))
        assert len(data) < 1e6
        match, again = (match_place(place, f, there) for f in (here, pickle.loads(data)))
        assert match is not None
        assert again is not None
        if match.problem() is None:
            assert match.place_mm.tolist() == again.place_mm.tolist()
            assert (match.score, match.cycle_mm) == (again.score, again.cycle_mm)


def test_a_weak_match_is_not_searched_back() -> None:
    phantom, volume = scan(0, "chest")
    here, there = describe(volume), describe(scan(1, "chest")[1])
    match = match_place(inside(phantom, 1)[0], here, there, min_score=1.1)
    assert match is not None
    assert np.isinf(match.cycle_mm)


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("scans")

    def file(index: int) -> Path:
        path = folder / f"{index}.nii.gz"
        if not path.exists():
            write_nifti(draw_phantom(SEED, index, matrix=96, protocol="chest"), path)
        return path

    return file


def test_the_command_prints_what_was_found(files: Callable[[int], Path], tmp_path: Path) -> None:
    marks = tmp_path / "marks.json"
    marks.write_text('{"middle": [150, 150, 200]}')
    picture = tmp_path / "both.png"
    done = run(
        "match", files(0), files(1), "--landmarks", marks, "--at", "100,150,200", "--json",
        "--picture", picture,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["name"] for one in found] == ["middle", "100,150,200"]
    assert found[0]["at_mm"] == [150, 150, 200]
    assert all(one["score"] <= 1 for one in found)
    with Image.open(picture) as image:
        assert image.height == 2 * 260


def test_no_position_is_wrong_usage(files: Callable[[int], Path]) -> None:
    done = run("match", files(0), files(1))
    assert done.exit_code == 2
    assert "give at least one position" in done.stderr


@pytest.mark.parametrize(
    ("content", "word"),
    [("[1, 2, 3]", "must be like"), ('{"a": [1, 2]}', "must be like"), ("{", "cannot be read")],
)
def test_wrong_landmarks_are_refused(
    files: Callable[[int], Path], tmp_path: Path, content: str, word: str
) -> None:
    (tmp_path / "marks.json").write_text(content)
    done = run("match", files(0), files(1), "--landmarks", tmp_path / "marks.json")
    assert_refused(done, "marks.json", word)


def test_places_and_paths_that_cannot_be_used_are_refused(
    files: Callable[[int], Path], tmp_path: Path
) -> None:
    assert_refused(run("match", files(0), files(1), "--at", "9999,0,0"), "is outside")
    assert_refused(run("match", files(0).parent, files(1), "--at", "1,1,1"), "must be one scan")
    (tmp_path / "no.nii").write_bytes(b"no image" * 100)
    assert_refused(run("match", files(0), tmp_path / "no.nii", "--at", "1,1,1"), "cannot be used")


def test_real_landmarks_are_found(ct: Path) -> None:
    """Median over the trusted ones of four chests; the body frame alone is 25 mm off."""
    marks = json.loads((ct / "landmarks.json").read_text())
    names = ["LIDC-IDRI-0001", "TCGA-34-2605", "CMB-CRC-MSB-01068", "4D-Lung-113_HM10395"]
    errors, total = [], 0
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        places = {k: v for k, v in marks[one].items() if k in marks[other] and k[-2:] != "_z"}
        total += len(places)
        scans = (ct / "archive" / f"{name}.nii.gz" for name in (one, other))
        for found in match_files(*scans, places):
            if found.problem is None:
                errors.append(np.linalg.norm(np.subtract(found.place_mm, marks[other][found.name])))
    assert len(errors) >= 0.6 * total
    assert np.median(errors) < 8
