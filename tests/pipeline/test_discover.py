"""The plan: which scans are alike, where classes lie in them, every crop inside its scan."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import PrepareConfig, load_config
from pipeline.content import Content, ContentOfScan
from pipeline.place import Scans
from pipeline.plan import (
    ClassPlan,
    PlannedMembers,
    class_tables,
    min_members,
    most_members,
    row_tables,
)
from pipeline.stages.discover import Discovery, discover
from pipeline.stages.placing import Draft, Found
from store.format import SPLITS

NUM_TRAIN, NUM_VALIDATION = 24, 8
NUM_SCANS = NUM_TRAIN + NUM_VALIDATION
SOFT = 128  # of a thumbnail: about 0 HU
BASE = PrepareConfig(
    classes=12, neighbours=8, validation_neighbours=3, shape=(16, 32, 32), spacing_mm=(3, 2, 2),
    side_steps=(25, 40), shift_steps=(-5, 5), seed=3, place="frame", max_member_share=1,
    min_member_share=0.5,
)  # fmt: skip
NATIVE = dataclasses.replace(BASE, frame="voxel", spacing_mm="native", separation_steps=4.0)
CONFIGS = {
    "body": BASE,
    "crowded": dataclasses.replace(BASE, classes=60, max_overlap=0.1, tries=20),
    "base crop only": dataclasses.replace(BASE, scales=1),
    "not square": dataclasses.replace(BASE, shape=(16, 24, 48), side_steps=(19, 30)),
    "voxel": NATIVE,
    "voxel in mm": dataclasses.replace(BASE, frame="voxel"),
    "separated": dataclasses.replace(
        BASE, separation_steps=9.0, max_overlap=1.0, classes=30, tries=20
    ),
}


def make_scans(*, scale: float = 1.0) -> Scans:
    """Scans of many sizes, the frame boxes somewhere in them."""
    rng = np.random.default_rng(0)
    spacing_mm = rng.uniform([1.5, 1.2, 1.2], [4, 2.5, 2.5], (NUM_SCANS, 3))
    size = scale * rng.uniform([120, 160, 160], [320, 380, 380], (NUM_SCANS, 3)) / spacing_mm
    size = size.astype(np.int32)
    edges_mm = np.stack([-0.5 * spacing_mm, (size - 0.5) * spacing_mm], axis=1)
    margin = rng.uniform(0, 0.1, (NUM_SCANS, 2, 3)) * (edges_mm[:, 1:] - edges_mm[:, :1])
    margin[:, :, 0] = 0
    split = np.zeros(NUM_SCANS, np.uint8)
    split[rng.permutation(NUM_SCANS)[:NUM_VALIDATION]] = 1
    return Scans(
        split=split,
        spacing_mm=spacing_mm,
        size=size,
        frame_mm=edges_mm + margin * np.array([1, -1])[:, None],
        embedding=rng.normal(size=(NUM_SCANS, 16)).astype(np.float32),
        thumbnail=lambda _: np.full((64, 128, 128), SOFT, np.uint8),
    )


SCANS = make_scans()
every_plan = pytest.mark.parametrize("name", CONFIGS)


@cache
def plan(name: str) -> list[ClassPlan]:
    return discover(SCANS, CONFIGS[name]).classes


def unit_mm(config: PrepareConfig, scan: int) -> NDArray[Any]:
    if config.frame == "voxel":
        return SCANS.spacing_mm[scan]
    return SCANS.frame_mm[scan, 1] - SCANS.frame_mm[scan, 0]


def place_mm(config: PrepareConfig, scan: int, centre: NDArray[Any]) -> NDArray[Any]:
    """Where a coordinate lies in a scan."""
    low = 0 if config.frame == "voxel" else SCANS.frame_mm[scan, 0]
    return low + centre * unit_mm(config, scan)


def step_mm(config: PrepareConfig, scan: int) -> NDArray[Any]:
    return np.array(
        SCANS.spacing_mm[scan] if config.spacing_mm == "native" else config.spacing_mm, float
    )


def lies_inside(scan: int, origin_mm: Any, extent_mm: Any, shape: Any) -> bool:
    """Whether all samples of a crop lie between the outermost voxels' centres."""
    first = origin_mm + extent_mm / np.array(shape) / 2
    last = origin_mm + extent_mm - extent_mm / np.array(shape) / 2
    end = (SCANS.size[scan] - 1) * SCANS.spacing_mm[scan]
    return bool((first >= -1e-6).all() and (last <= end + 1e-6).all())


def holds(config: PrepareConfig, scan: int, centre: NDArray[Any]) -> bool:
    """Whether a scan holds a class's base crop and, for training, the farthest drawn ones."""
    place, step = place_mm(config, scan, centre), step_mm(config, scan)
    base = step * config.shape
    boxes = [(place - base / 2, base)]
    if SCANS.split[scan] == 0 and config.scales > 1:
        farthest = max(-config.shift_steps[0], config.shift_steps[1] - 1)  # either way
        ends = (-farthest, farthest)
        largest = (config.side_steps[1] - 1) / min(config.shape[1:])
        side = step * (config.shape[0], largest * config.shape[1], largest * config.shape[2])
        boxes += [
            (place + step * (0, dy, dx) - side / 2, side) for dy, dx in product(ends, repeat=2)
        ]
    return all(lies_inside(scan, *box, config.shape) for box in boxes)


def nearest_slowly(config: PrepareConfig, found: ClassPlan, split: int, num: int) -> list[int]:
    offset = SCANS.embedding.astype(float) - SCANS.embedding[found.reference]
    distance = np.linalg.norm(offset, axis=1)
    rows = [
        scan
        for scan in range(NUM_SCANS)
        if SCANS.split[scan] == split and holds(config, scan, found.centre)
    ]
    return sorted(rows, key=lambda scan: (distance[scan], scan))[:num]


# Classes -----------------------------------------------------------------------------------------


@every_plan
def test_as_many_classes_are_found_as_are_wanted_or_fit(name: str) -> None:
    assert 8 <= len(plan(name)) <= CONFIGS[name].classes


@every_plan
def test_training_members_are_the_nearest_scans_that_contain_all_crops(name: str) -> None:
    config = CONFIGS[name]
    for found in plan(name):
        expected = nearest_slowly(config, found, 0, config.neighbours)
        assert found.train.scans.tolist() == expected


@every_plan
def test_validation_members_are_the_nearest_scans_that_contain_the_base_crop(name: str) -> None:
    config = CONFIGS[name]
    for found in plan(name):
        expected = nearest_slowly(config, found, 1, config.validation_neighbours)
        assert found.validation.scans.tolist() == expected


@pytest.mark.parametrize("name", ["body", "voxel", "voxel in mm"])
def test_a_reference_is_the_first_member_of_its_class(name: str) -> None:
    many = dataclasses.replace(
        CONFIGS[name], classes=40, tries=20, max_overlap=1.0, separation_steps=0
    )
    for seed in range(2):
        for found in discover(SCANS, dataclasses.replace(many, seed=seed)).classes:
            assert (found.train.scans[0], found.train.distance[0]) == (found.reference, 0)


@every_plan
def test_distances_are_euclidean_and_grow(name: str) -> None:
    for found in plan(name):
        offset = SCANS.embedding[found.train.scans] - SCANS.embedding[found.reference]
        np.testing.assert_allclose(found.train.distance, np.linalg.norm(offset, axis=1), rtol=1e-5)
        assert (np.diff(found.train.distance) >= 0).all()


@every_plan
def test_no_scan_is_a_member_twice(name: str) -> None:
    for found in plan(name):
        scans = scans_of(found)
        assert len(set(scans)) == len(scans)


def test_a_class_has_no_fewer_members_than_its_share() -> None:
    config = dataclasses.replace(BASE, min_member_share=0.9, neighbours=20)
    plans = discover(SCANS, config).classes
    assert plans
    assert min(len(found.train) for found in plans) >= 18
    assert min(len(found.train) for found in discover(SCANS, BASE).classes) < 18


def test_references_are_drawn_without_replacement_in_every_round() -> None:
    config = dataclasses.replace(
        BASE, classes=2 * NUM_TRAIN, max_overlap=1.0, scales=1, min_member_share=0, tries=1000
    )
    references = [found.reference for found in discover(SCANS, config).classes]
    train = np.flatnonzero(SCANS.split == 0).tolist()
    assert sorted(references[:NUM_TRAIN]) == train
    assert sorted(references[NUM_TRAIN:]) == train
    assert references[:NUM_TRAIN] != references[NUM_TRAIN:]


def test_no_class_is_found_where_no_scan_contains_a_crop() -> None:
    assert discover(make_scans(scale=0.15), BASE).classes == []


@every_plan
def test_the_base_crops_of_two_classes_overlap_no_more_than_allowed(name: str) -> None:
    config = CONFIGS[name]
    for one, other in combinations(plan(name), 2):
        for scan in set(scans_of(one)) & set(scans_of(other)):
            apart = np.abs(
                place_mm(config, scan, one.centre) - place_mm(config, scan, other.centre)
            )
            side = step_mm(config, scan) * config.shape
            overlap = np.prod(np.maximum(side - apart, 0)) / np.prod(side)
            assert overlap <= config.max_overlap + 1e-9


@every_plan
def test_the_centres_of_two_classes_are_separated_in_every_scan_of_both(name: str) -> None:
    config = CONFIGS[name]
    for one, other in combinations(plan(name), 2):
        for scan in set(scans_of(one)) & set(scans_of(other)):
            apart = np.abs((one.centre - other.centre) * unit_mm(config, scan))
            assert (apart / step_mm(config, scan)).max() >= config.separation_steps - 1e-9


def test_without_separation_some_centres_are_closer() -> None:
    free = dataclasses.replace(CONFIGS["separated"], separation_steps=0)
    apart = [
        np.abs(one.centre - other.centre)
        for one, other in combinations(discover(SCANS, free).classes, 2)
    ]
    unit_steps = unit_mm(BASE, 0) / step_mm(BASE, 0)
    assert min((a * unit_steps).max() for a in apart) < 9


# Purity ------------------------------------------------------------------------------------------


def assert_same_plan(one: list[ClassPlan], other: list[ClassPlan]) -> None:
    assert len(one) == len(other)
    for a, b in zip(map(dataclasses.asdict, one), map(dataclasses.asdict, other), strict=True):
        for split in SPLITS:
            for name, values in a.pop(split).items():
                np.testing.assert_array_equal(values, b[split][name])
            del b[split]
        np.testing.assert_array_equal(a.pop("centre"), b.pop("centre"))
        assert a == b


def test_the_plan_depends_on_its_inputs_alone() -> None:
    np.random.seed(5)  # noqa: NPY002 - what must not matter
    assert_same_plan(discover(make_scans(), BASE).classes, plan("body"))


def test_another_seed_is_another_plan() -> None:
    centres = [
        p.centre.tolist() for p in discover(SCANS, dataclasses.replace(BASE, seed=4)).classes
    ]
    assert centres[0] not in [p.centre.tolist() for p in plan("body")]


def test_more_classes_leave_the_first_ones_as_they_are() -> None:
    more = discover(SCANS, dataclasses.replace(BASE, classes=BASE.classes + 4)).classes
    assert_same_plan(more[: BASE.classes], plan("body"))


# Rows --------------------------------------------------------------------------------------------


@every_plan
@pytest.mark.parametrize("split", SPLITS)
def test_every_crop_of_every_row_lies_inside_its_scan(name: str, split: str) -> None:
    config = CONFIGS[name]
    rows = row_tables(plan(name), SCANS, config, split)
    for scan, origin, extent in zip(rows["scan"], rows["origin_mm"], rows["extent_mm"]):
        assert lies_inside(scan, origin, extent, config.shape)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_every_member_of_every_class_at_every_scale(split: str) -> None:
    rows = row_tables(plan("body"), SCANS, BASE, split)
    found = list(zip(*(rows[name].tolist() for name in ("scan", "label", "scale"))))
    expected = [
        (scan, label, scale)
        for label, one in enumerate(plan("body"))
        for scan in one.members(split).scans.tolist()
        for scale in (range(3) if split == "train" else [0])
    ]
    assert found == sorted(expected)


def test_the_base_crop_is_centred_on_the_class_in_each_scan() -> None:
    rows = row_tables(plan("body"), SCANS, BASE, "train")
    for row in np.flatnonzero(rows["scale"] == 0):
        scan, found = rows["scan"][row], plan("body")[rows["label"][row]]
        np.testing.assert_allclose(rows["extent_mm"][row], [48, 64, 64])
        centre = rows["origin_mm"][row] + rows["extent_mm"][row] / 2
        np.testing.assert_allclose(centre, place_mm(BASE, scan, found.centre))


def drawn_steps(config: PrepareConfig) -> tuple[NDArray[Any], NDArray[Any]]:
    """Side and shift (n, 2, 3) of drawn scales over their base crops, in base steps."""
    rows = row_tables(plan("body"), SCANS, config, "train")
    extent, origin = (rows[name].reshape(-1, 3, 3) for name in ("extent_mm", "origin_mm"))
    centre, step = origin + extent / 2, np.array([3, 2, 2])
    return extent[:, 1:] / step, (centre[:, 1:] - centre[:, :1]) / step


def test_drawn_scales_keep_the_extent_along_z() -> None:
    side, shift = drawn_steps(BASE)
    np.testing.assert_allclose(side[..., 0], 16)
    np.testing.assert_allclose(shift[..., 0], 0, atol=1e-9)


def test_drawn_sides_and_shifts_are_whole_steps_in_their_ranges_and_reach_their_ends() -> None:
    for drawn, (low, high) in zip(drawn_steps(BASE), ((25, 40), (-5, 5)), strict=True):
        steps = np.rint(drawn[..., 1:])
        np.testing.assert_allclose(drawn[..., 1:], steps, atol=1e-9)
        assert set(np.unique(steps)) == set(range(low, high))


def test_a_drawn_scale_is_square() -> None:
    side, _ = drawn_steps(BASE)
    np.testing.assert_allclose(side[..., 1], side[..., 2])


def test_the_two_drawn_scales_of_a_crop_differ() -> None:
    side, shift = drawn_steps(BASE)
    assert (np.abs(side[:, 0] - side[:, 1]) + np.abs(shift[:, 0] - shift[:, 1])).sum() > 0


def make_members(scans: list[int], distance: list[float]) -> PlannedMembers:
    score = np.linspace(1, 0.5, len(scans), dtype=np.float32)
    return PlannedMembers(
        scans=np.array(scans, np.intp),
        distance=np.array(distance, np.float32),
        place_mm=np.ones((len(scans), 3)),
        score=score,
        cycle_mm=1 - score,
    )


def test_missing_members_are_marked() -> None:
    found = ClassPlan(
        reference=4,
        centre=np.array([0.5, 0.5, 0.5]),
        body_share=0.9,
        train=make_members([4, 2], [0, 1.5]),
        validation=make_members([], []),
    )
    tables = class_tables([found], dataclasses.replace(BASE, neighbours=4))
    nan = np.nan
    assert tables["neighbour"].tolist() == [[4, 2, -1, -1]]
    np.testing.assert_array_equal(tables["distance"], np.float32([[0, 1.5, nan, nan]]))
    np.testing.assert_array_equal(tables["score"], np.float32([[1, 0.5, nan, nan]]))
    np.testing.assert_array_equal(tables["place_mm"][0, :, 0], [1, 1, nan, nan])
    assert tables["validation_neighbour"].tolist() == [[-1, -1, -1]]


# Places that were found by matching --------------------------------------------------------------


MATCHED = dataclasses.replace(BASE, place="match", max_member_share=0.5, neighbours=10)
"""Half of the 24 training scans may be members, so 12."""


class Matcher:
    """Finds the class's coordinate, moved by a few mm that depend on the scan; counts questions.

    In scan n, the match has the problem that `problems` names for n.
    """

    def __init__(self, problems: dict[int, str] | None = None) -> None:
        self.problems, self.asked = problems or {}, 0

    def __call__(self, drafts: Sequence[Draft], wanted: Sequence[NDArray[np.intp]]) -> list[Found]:
        return [self._match(draft, scans) for draft, scans in zip(drafts, wanted, strict=True)]

    def _match(self, draft: Draft, scans: NDArray[np.intp]) -> Found:
        self.asked += len(scans)
        assert draft.reference not in scans
        problem = np.array([self.problems.get(scan, "") for scan in scans.tolist()])
        place = np.array([moved_mm(scan, draft.centre) for scan in scans.tolist()]).reshape(-1, 3)
        place[problem == "crop does not fit"] = -5
        place[problem == "no overlap"] = np.nan
        score = np.where(problem == "weak match", 0.39, 0.4)
        score[problem == "no overlap"] = np.nan
        cycle = np.where(problem == "did not lead back", 10.1, 10)
        return Found(place, score, np.where(problem == "no overlap", np.nan, cycle))


def moved_mm(scan: int, centre: NDArray[Any]) -> NDArray[Any]:
    return place_mm(BASE, scan, centre) + np.array([scan % 5, scan % 3, -(scan % 4)])


def scans_of(found: ClassPlan) -> list[int]:
    return [*found.train.scans.tolist(), *found.validation.scans.tolist()]


def matched(problems: dict[int, str] | None = None, **settings: Any) -> Discovery:
    config = dataclasses.replace(MATCHED, **settings)
    return discover(SCANS, config, find=Matcher(problems))


def test_members_lie_where_they_were_found_and_the_reference_where_it_was_drawn() -> None:
    for found in matched().classes:
        assert found.train.scans[0] == found.reference
        assert found.train.score[0] == 1
        assert found.train.distance[0] == found.train.cycle_mm[0] == 0
        np.testing.assert_allclose(
            found.train.place_mm[0], place_mm(BASE, found.reference, found.centre)
        )
        for split in SPLITS:
            members = found.members(split)
            for scan, place, score in zip(members.scans, members.place_mm, members.score):
                if scan != found.reference:
                    np.testing.assert_allclose(place, moved_mm(int(scan), found.centre))
                    assert score == np.float32(0.4)


def test_rows_of_matched_classes_lie_inside_their_scans_and_do_not_overlap() -> None:
    found = matched().classes
    assert len(found) == MATCHED.classes
    for split in SPLITS:
        rows = row_tables(found, SCANS, MATCHED, split)
        for scan, origin, extent in zip(rows["scan"], rows["origin_mm"], rows["extent_mm"]):
            assert lies_inside(scan, origin, extent, MATCHED.shape)
    for one, other in combinations(found, 2):
        places = [
            dict(zip(scans_of(c), [*c.train.place_mm, *c.validation.place_mm], strict=True))
            for c in (one, other)
        ]
        for scan in places[0].keys() & places[1].keys():
            apart = np.abs(places[0][scan] - places[1][scan])
            side = np.array(MATCHED.spacing_mm) * MATCHED.shape
            assert np.prod(np.maximum(side - apart, 0)) / np.prod(side) <= 0.25 + 1e-9


def test_scans_without_a_trusted_match_are_no_members_and_are_counted() -> None:
    train = np.flatnonzero(SCANS.split == 0).tolist()
    names = ["no overlap", "weak match", "did not lead back", "crop does not fit"]
    problems = dict(zip(train[:16], names * 4))
    found = matched(problems, neighbours=20, max_member_share=1, min_member_share=0.2)
    assert found.classes
    for one in found.classes:
        assert not set(one.train.scans[1:].tolist()) & problems.keys()
    assert set(found.rejected) == set(names)


def test_the_nearest_scans_with_a_trusted_match_are_members() -> None:
    problems = dict.fromkeys(np.flatnonzero(SCANS.split == 0).tolist()[::3], "weak match")
    for found in matched(problems).classes:
        offset = SCANS.embedding.astype(float) - SCANS.embedding[found.reference]
        distance = np.linalg.norm(offset, axis=1)
        last = distance[found.train.scans].max()
        fits = [
            scan
            for scan in np.flatnonzero(SCANS.split == 0).tolist()
            if scan not in problems and matched_holds(scan, found.centre)
        ]
        expected = {scan for scan in fits if distance[scan] <= last} | {found.reference}
        assert set(found.train.scans.tolist()) == expected


def matched_holds(scan: int, centre: NDArray[Any]) -> bool:
    moved = (moved_mm(scan, centre) - SCANS.frame_mm[scan, 0]) / unit_mm(BASE, scan)
    return holds(BASE, scan, moved)


def test_no_more_scans_are_tried_than_the_setting_allows() -> None:
    train = np.flatnonzero(SCANS.split == 0).tolist()
    settings: dict[str, Any] = {
        "neighbours": 4, "candidates_per_member": 2, "validation_neighbours": 0, "classes": 5,
        "min_member_share": 0,
    }  # fmt: skip
    found = matched(dict.fromkeys(train, "weak match"), **settings)
    assert found.classes == []  # only the reference itself, and a class needs two
    assert found.redrawn["too few members"] >= 50
    matcher = Matcher(dict.fromkeys(train, "weak match"))
    discover(SCANS, dataclasses.replace(MATCHED, **settings), find=matcher)
    assert matcher.asked <= 7 * found.redrawn["too few members"]


def test_a_class_has_at_most_a_share_of_the_scans() -> None:
    split = np.repeat([0, 1], [49, 6]).astype(np.uint8)
    assert most_members(PrepareConfig(), split) == (25, 3)
    assert min_members(PrepareConfig(), split) == 6
    assert most_members(PrepareConfig(), np.zeros(1000, np.uint8)) == (200, 0)
    assert most_members(load_config(preset="paper"), split) == (49, 6)


def test_members_are_among_the_most_similar_share_of_the_scans() -> None:
    for found in matched(neighbours=100).classes:
        offset = SCANS.embedding.astype(float) - SCANS.embedding[found.reference]
        distance = np.linalg.norm(offset, axis=1)
        nearest = sorted(distance[SCANS.split == 0])[: NUM_TRAIN // 2]
        assert distance[scans_of(found)].max() <= max(nearest) + 1e-6


def test_the_same_matches_give_the_same_plan() -> None:
    assert_same_plan(matched().classes, matched().classes)


# The paper's settings ----------------------------------------------------------------------------


LUNG_IN_BODY = np.full((64, 128, 128), SOFT, np.uint8)
LUNG_IN_BODY[:, 8:-8, 8:-8] = 25


@pytest.fixture(scope="module")
def paper() -> tuple[Scans, PrepareConfig, list[ClassPlan]]:
    rng = np.random.default_rng(1)
    spacing_mm = rng.uniform([1, 0.6, 0.6], [3, 0.9, 0.9], (30, 3))
    size = rng.integers([110, 512, 512], [300, 513, 513], (30, 3)).astype(np.int32)
    scans = dataclasses.replace(
        SCANS,
        split=np.repeat([0, 1], [25, 5]).astype(np.uint8),
        spacing_mm=spacing_mm,
        size=size,
        frame_mm=np.stack([-0.5 * spacing_mm, (size - 0.5) * spacing_mm], axis=1),
        embedding=rng.normal(size=(30, 8)).astype(np.float32),
        thumbnail=lambda _: LUNG_IN_BODY,
    )
    config = load_config(preset="paper", overrides={"neighbours": 10})
    return scans, config, discover(scans, config).classes


def test_the_paper_preset_finds_its_44_classes(
    paper: tuple[Scans, PrepareConfig, list[ClassPlan]],
) -> None:
    assert len(paper[2]) == 44


def test_the_paper_preset_places_crops_on_voxels(
    paper: tuple[Scans, PrepareConfig, list[ClassPlan]],
) -> None:
    scans, config, plans = paper
    rows = row_tables(plans, scans, config, "train")
    base = rows["scale"] == 0
    spacing_mm = scans.spacing_mm[rows["scan"][base]]
    first_voxel = rows["origin_mm"][base] / spacing_mm + 0.5
    np.testing.assert_allclose(first_voxel, np.rint(first_voxel), atol=1e-6)
    sides = rows["extent_mm"][base] / spacing_mm
    np.testing.assert_allclose(sides, np.broadcast_to([32, 64, 64], sides.shape))


def test_the_paper_preset_keeps_references_off_the_scans_border(
    paper: tuple[Scans, PrepareConfig, list[ClassPlan]],
) -> None:
    scans, config, plans = paper
    for found in plans:
        first = found.centre - (np.array(config.shape) - 1) / 2
        assert (first >= np.array(config.border) - 1e-6).all()
        assert (first + config.shape <= scans.size[found.reference] - config.border + 1e-6).all()


# Content -----------------------------------------------------------------------------------------


BOX = np.array([[0.0, 0, 0], [256, 256, 256]])


def judge(
    thumbnail: NDArray[np.uint8],
    place: tuple[float, float, float],
    depth: int = 1,
    window_hu: tuple[int, int] = BASE.window_hu,
) -> Content:
    """The content of a crop of 48 x 64 x 64 mm in a box of 256 mm."""
    config = dataclasses.replace(BASE, tissue_depth=depth, window_hu=window_hu)
    return ContentOfScan(thumbnail, BOX, config).of_crop(np.array(place), np.array(BASE.spacing_mm))


def tissue_above(slice_number: int) -> NDArray[np.uint8]:
    """Air, and tissue of 0 HU from a slice of 4 mm on."""
    thumbnail = np.zeros((64, 128, 128), np.uint8)
    thumbnail[slice_number:] = SOFT
    return thumbnail


@pytest.mark.parametrize(
    ("place_z", "share"), [(60.0, 0.0), (104.0, 0.0), (128.0, 0.5), (152.5, 1.0), (200.0, 1.0)]
)
def test_the_share_of_tissue_and_body_in_a_crop(place_z: float, share: float) -> None:
    found = judge(tissue_above(32), (place_z, 128, 128))
    assert found.tissue == pytest.approx(share, abs=0.05)
    assert found.body == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "enough"),
    [
        ({"min_body": 0.6, "min_tissue": 0.4, "max_tissue": 0.4}, True),
        ({"min_body": 0.7}, False),
        ({"min_body": 0, "min_tissue": 0.5}, False),
        ({"min_body": 0, "max_tissue": 0.3}, False),
    ],
)
def test_body_and_tissue_must_be_within_their_limits(
    settings: dict[str, float], enough: bool
) -> None:
    config = dataclasses.replace(BASE, **settings)  # type: ignore[arg-type]
    assert Content(body=0.6, tissue=0.4).is_enough(config) is enough


def test_a_crop_of_air_beside_the_patient_is_never_enough() -> None:
    config = dataclasses.replace(BASE, min_body=0, min_tissue=0)
    assert not Content(body=0, tissue=0).is_enough(config)


def test_tissue_towards_the_head_counts_as_deep_as_the_settings_say() -> None:
    # the crop's last slice is 1.5 mm below its end: the slices above it are tissue, it is not
    assert judge(tissue_above(32), (103, 128, 128), depth=1).tissue == 0
    assert judge(tissue_above(32), (103, 128, 128), depth=3).tissue > 0.01


@pytest.mark.parametrize(
    ("centre_yx", "share"),
    [((128, 16), 0.75), ((128, 240), 0.75), ((16, 128), 0.75), ((0, 256), 0.25), ((32, 224), 1)],
)
def test_outside_the_frame_box_is_neither_body_nor_tissue(
    centre_yx: tuple[float, float], share: float
) -> None:
    found = judge(tissue_above(0), (128, *centre_yx))
    assert found.tissue == pytest.approx(share, abs=0.02)
    assert found.body == pytest.approx(share, abs=0.02)


def trunk(low_hu: int, high_hu: int) -> NDArray[np.uint8]:
    """A trunk of 160 x 220 mm with two lungs; a table of foam in a thin shell lies beneath it."""
    y, x = np.mgrid[:128, :128] * 2.0
    image = np.full((128, 128), -1000.0)
    image[((y - 100) / 80) ** 2 + ((x - 128) / 110) ** 2 < 1] = 30
    for middle in (80, 176):
        image[((y - 100) / 60) ** 2 + ((x - middle) / 40) ** 2 < 1] = -850
    image[(y >= 190) & (y < 230) & (x > 20) & (x < 236)] = 150
    image[(y >= 194) & (y < 226) & (x > 24) & (x < 232)] = -900
    share = np.clip((image - low_hu) / (high_hu - low_hu), 0, 1)
    return np.broadcast_to(np.rint(share * 255).astype(np.uint8), (64, 128, 128))


@pytest.mark.parametrize("window_hu", [(-1000, 1000), (-150, 250)])
def test_lungs_are_body_table_and_air_are_not(window_hu: tuple[int, int]) -> None:
    lung, table, beside = (
        judge(trunk(*window_hu), (128, *place), window_hu=window_hu).body
        for place in ((100, 80), (220, 128), (32, 32))
    )
    assert lung == 1
    assert table < 0.1
    assert beside < 0.25


def test_references_are_not_drawn_in_air() -> None:
    empty = dataclasses.replace(SCANS, thumbnail=lambda _: np.zeros((64, 128, 128), np.uint8))
    assert discover(empty, BASE).classes == []
