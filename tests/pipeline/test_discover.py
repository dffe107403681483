"""The plan: which scans are alike, where classes lie in them, every crop inside its scan."""

import dataclasses
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.config import PrepareConfig, load_config
from pipeline.content import has_content
from pipeline.place import Scans
from pipeline.plan import ClassPlan, class_tables, row_tables
from pipeline.stages.discover import discover
from store.format import SPLITS

NUM_TRAIN, NUM_VALIDATION = 24, 8
NUM_SCANS = NUM_TRAIN + NUM_VALIDATION
SOFT = 128  # of a thumbnail: about 0 HU
BASE = PrepareConfig(
    classes=12, neighbours=8, validation_neighbours=3, shape=(16, 32, 32), spacing_mm=(3, 2, 2),
    side_steps=(25, 40), shift_steps=(-5, 5), seed=3,
)  # fmt: skip
NATIVE = dataclasses.replace(BASE, frame="voxel", spacing_mm="native", separation_steps=4.0)
CONFIGS = {
    "body": BASE,
    "crowded": dataclasses.replace(BASE, classes=60, max_overlap=0.1, tries=20),
    "base crop only": dataclasses.replace(BASE, scales=1),
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
    return discover(SCANS, CONFIGS[name])


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
        side = step * (config.shape[0], config.side_steps[1] - 1, config.side_steps[1] - 1)
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
        assert found.neighbour.tolist() == expected


@every_plan
def test_validation_members_are_the_nearest_scans_that_contain_the_base_crop(name: str) -> None:
    config = CONFIGS[name]
    for found in plan(name):
        expected = nearest_slowly(config, found, 1, config.validation_neighbours)
        assert found.validation_neighbour.tolist() == expected


@pytest.mark.parametrize("name", ["body", "voxel", "voxel in mm"])
def test_a_reference_is_the_first_member_of_its_class(name: str) -> None:
    many = dataclasses.replace(
        CONFIGS[name], classes=40, tries=20, max_overlap=1.0, separation_steps=0
    )
    for seed in range(20):
        for found in discover(SCANS, dataclasses.replace(many, seed=seed)):
            assert (found.neighbour[0], found.distance[0]) == (found.reference, 0)


@every_plan
def test_distances_are_euclidean_and_grow(name: str) -> None:
    for found in plan(name):
        offset = SCANS.embedding[found.neighbour] - SCANS.embedding[found.reference]
        np.testing.assert_allclose(found.distance, np.linalg.norm(offset, axis=1), rtol=1e-5)
        assert (np.diff(found.distance) >= 0).all()


@every_plan
def test_no_scan_is_a_member_twice(name: str) -> None:
    for found in plan(name):
        assert len(set(found.members.tolist())) == len(found.members)


def test_a_class_has_no_fewer_members_than_its_share() -> None:
    config = dataclasses.replace(BASE, min_member_share=0.9, neighbours=20)
    plans = discover(SCANS, config)
    assert plans
    assert min(len(found.neighbour) for found in plans) >= 18
    assert min(len(found.neighbour) for found in discover(SCANS, BASE)) < 18


def test_references_are_drawn_without_replacement_in_every_round() -> None:
    config = dataclasses.replace(
        BASE, classes=2 * NUM_TRAIN, max_overlap=1.0, scales=1, min_member_share=0, tries=1000
    )
    references = [found.reference for found in discover(SCANS, config)]
    train = np.flatnonzero(SCANS.split == 0).tolist()
    assert sorted(references[:NUM_TRAIN]) == train
    assert sorted(references[NUM_TRAIN:]) == train
    assert references[:NUM_TRAIN] != references[NUM_TRAIN:]


def test_no_class_is_found_where_no_scan_contains_a_crop() -> None:
    assert discover(make_scans(scale=0.15), BASE) == []


@every_plan
def test_the_base_crops_of_two_classes_overlap_no_more_than_allowed(name: str) -> None:
    config = CONFIGS[name]
    for one, other in combinations(plan(name), 2):
        for scan in set(one.members.tolist()) & set(other.members.tolist()):
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
        for scan in set(one.members.tolist()) & set(other.members.tolist()):
            apart = np.abs((one.centre - other.centre) * unit_mm(config, scan))
            assert (apart / step_mm(config, scan)).max() >= config.separation_steps - 1e-9


def test_without_separation_some_centres_are_closer() -> None:
    free = dataclasses.replace(CONFIGS["separated"], separation_steps=0)
    apart = [
        np.abs(one.centre - other.centre) for one, other in combinations(discover(SCANS, free), 2)
    ]
    unit_steps = unit_mm(BASE, 0) / step_mm(BASE, 0)
    assert min((a * unit_steps).max() for a in apart) < 9


# Purity ------------------------------------------------------------------------------------------


def assert_same_plan(one: list[ClassPlan], other: list[ClassPlan]) -> None:
    for a, b in zip(one, other, strict=True):
        for field in dataclasses.fields(ClassPlan):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_the_plan_depends_on_its_inputs_alone() -> None:
    np.random.seed(5)  # noqa: NPY002 - what must not matter
    assert_same_plan(discover(make_scans(), BASE), plan("body"))


def test_another_seed_is_another_plan() -> None:
    centres = [p.centre.tolist() for p in discover(SCANS, dataclasses.replace(BASE, seed=4))]
    assert centres[0] not in [p.centre.tolist() for p in plan("body")]


def test_more_classes_leave_the_first_ones_as_they_are() -> None:
    more = discover(SCANS, dataclasses.replace(BASE, classes=BASE.classes + 4))
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
        for scan in (one.neighbour if split == "train" else one.validation_neighbour).tolist()
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


def test_missing_members_are_marked() -> None:
    found = ClassPlan(
        reference=4,
        centre=np.array([0.5, 0.5, 0.5]),
        neighbour=np.array([4, 2]),
        distance=np.array([0, 1.5], np.float32),
        validation_neighbour=np.array([], np.intp),
        validation_distance=np.array([], np.float32),
    )
    tables = class_tables([found], dataclasses.replace(BASE, neighbours=4))
    assert tables["neighbour"].tolist() == [[4, 2, -1, -1]]
    np.testing.assert_array_equal(tables["distance"], np.float32([[0, 1.5, np.nan, np.nan]]))
    assert tables["validation_neighbour"].tolist() == [[-1, -1, -1]]


# The paper's settings ----------------------------------------------------------------------------


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
        thumbnail=lambda _: np.full((64, 128, 128), 25, np.uint8),  # lung
    )
    config = load_config(preset="paper", overrides={"neighbours": 10})
    return scans, config, discover(scans, config)


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


# Tissue ------------------------------------------------------------------------------------------


BOX = np.array([[0.0, 0, 0], [256, 256, 256]])


def judge(*, place_z: float, **settings: float) -> bool:
    """Judge a crop of 48 x 64 x 64 mm: air below z = 128 mm, tissue of 0 HU from there."""
    thumbnail = np.zeros((64, 128, 128), np.uint8)
    thumbnail[32:] = SOFT
    config = dataclasses.replace(BASE, **{"min_content": 0, **settings})
    place = np.array([place_z, 128, 128])
    return has_content(thumbnail, BOX, place, np.array(BASE.spacing_mm), config)


@pytest.mark.parametrize(
    ("place_z", "share"), [(60.0, 0.0), (104.0, 0.0), (128.0, 0.5), (152.5, 1.0), (200.0, 1.0)]
)
def test_the_share_of_tissue_in_a_crop_is_within_its_limits(place_z: float, share: float) -> None:
    assert judge(place_z=place_z, min_tissue=max(share - 0.1, 0), max_tissue=min(share + 0.1, 1))
    if share < 0.9:
        assert not judge(place_z=place_z, min_tissue=share + 0.1)
    if share > 0.1:
        assert not judge(place_z=place_z, max_tissue=share - 0.1)


def test_a_crop_of_mostly_air_is_no_reference() -> None:
    assert judge(place_z=150, min_content=0.75)
    assert not judge(place_z=120, min_content=0.75)


def test_tissue_towards_the_head_counts_as_deep_as_the_settings_say() -> None:
    # the crop's last slice is 1.5 mm below its end: the slices above it are tissue, it is not
    assert not judge(place_z=103, min_tissue=0.01, tissue_depth=1)
    assert judge(place_z=103, min_tissue=0.01, tissue_depth=3)


def judge_beside(centre_yx: tuple[float, float], **settings: float) -> bool:
    """Judge a crop of 48 x 64 x 64 mm in a box of 256 mm that is tissue up to its edges."""
    thumbnail = np.full((64, 128, 128), SOFT, np.uint8)
    config = dataclasses.replace(BASE, **{"min_content": 0, **settings})
    place = np.array([128, *centre_yx])
    return has_content(thumbnail, BOX, place, np.array(BASE.spacing_mm), config)


@pytest.mark.parametrize(
    ("centre_yx", "share"),
    [
        ((128, 16), 0.75),
        ((128, 240), 0.75),
        ((16, 128), 0.75),
        ((240, 128), 0.75),
        ((0, 256), 0.25),
    ],
)
def test_outside_the_frame_box_is_no_content(centre_yx: tuple[float, float], share: float) -> None:
    assert judge_beside(centre_yx, min_content=share - 0.05)
    assert not judge_beside(centre_yx, min_content=share + 0.05)


def test_outside_the_frame_box_is_no_tissue() -> None:
    assert judge_beside((128, 0), min_tissue=0.45, max_tissue=0.55)


def test_a_crop_up_to_the_edges_of_the_frame_box_is_all_content() -> None:
    assert judge_beside((32, 224), min_content=1, min_tissue=1)


def test_references_are_not_drawn_in_air() -> None:
    empty = dataclasses.replace(SCANS, thumbnail=lambda _: np.zeros((64, 128, 128), np.uint8))
    assert discover(empty, BASE) == []
