"""The plan of a store as data: classes, and a row for every crop that will be cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.place import Floats, Geometry, Scans
from pipeline.seeds import SCALES


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMembers:
    """The n members of a class in one split, nearest to the reference first."""

    scans: NDArray[np.intp]
    """(n,) rows of the scans."""
    distance: NDArray[np.float32]
    """(n,) L2 distance of the embedding to the reference's."""
    place_mm: Floats
    """(n, 3) centre of the base crop in the scan."""
    score: NDArray[np.float32]
    """(n,) of the match; nan where the frame gave the place."""
    cycle_mm: NDArray[np.float32]
    """(n,) distance from the reference's place after matching there and back; nan as above."""

    def __len__(self) -> int:
        return len(self.scans)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPlan:
    """One class and its members."""

    reference: int
    """Row of the scan in which the class was drawn."""
    centre: Floats
    """(3,) centre of the base crop in frame units."""
    body_share: float
    """Share of the reference's base crop that is body."""
    train: PlannedMembers
    """The reference is the first."""
    validation: PlannedMembers

    def members(self, split: str) -> PlannedMembers:
        return self.train if split == "train" else self.validation


def class_tables(classes: list[ClassPlan], config: PrepareConfig) -> dict[str, NDArray[Any]]:
    """The tables of group `classes`, by name."""
    tables: dict[str, NDArray[Any]] = {
        "reference": np.array([c.reference for c in classes], np.int32),
        "centre": np.array([c.centre for c in classes], np.float64),
        "body_share": np.array([c.body_share for c in classes], np.float32),
    }
    for split, prefix, most in (
        ("train", "", config.neighbours),
        ("validation", "validation_", config.validation_neighbours),
    ):
        members = [plan.members(split) for plan in classes]
        tables |= {
            f"{prefix}neighbour": _pad([m.scans.astype(np.int32) for m in members], most, -1),
            f"{prefix}distance": _pad([m.distance for m in members], most, np.nan),
            f"{prefix}place_mm": _pad([m.place_mm for m in members], most, np.nan),
            f"{prefix}score": _pad([m.score for m in members], most, np.nan),
            f"{prefix}cycle_mm": _pad([m.cycle_mm for m in members], most, np.nan),
        }
    return tables


def _pad(values: list[NDArray[Any]], length: int, fill: float) -> NDArray[Any]:
    """Arrays (n, ...) of different n as one of (len(values), length, ...)."""
    table = np.full((len(values), length, *values[0].shape[1:]), fill, values[0].dtype)
    for row, value in zip(table, values, strict=True):
        row[: len(value)] = value
    return table


def row_tables(
    classes: list[ClassPlan], scans: Scans, config: PrepareConfig, split: str
) -> dict[str, NDArray[Any]]:
    """The tables of group `train` or `validation`, rows in order of scan, class, scale.

    The rows of one scan follow each other, so that a scan is read once for all its crops.
    """
    geometry = Geometry(scans, config)
    num_scales = config.scales if split == "train" else 1
    label, scan, scale, origin, extent = [], [], [], [], []
    for number, plan in enumerate(classes):
        members, centre = plan.members(split).scans, plan.members(split).place_mm
        rng = np.random.default_rng([config.seed, SCALES, number])
        side = rng.integers(*config.side_steps, size=(len(members), 2))
        shift = rng.integers(*config.shift_steps, size=(len(members), 2, 2))
        step = geometry.step_mm[members]
        for level in range(num_scales):
            size, middle = geometry.extent_mm[members].copy(), centre.copy()
            if level:
                size[:, 1:] = side[:, level - 1, None] * geometry.proportion * step[:, 1:]
                middle[:, 1:] += shift[:, level - 1] * step[:, 1:]
            label.append(np.full(len(members), number, np.int32))
            scan.append(members.astype(np.int32))
            scale.append(np.full(len(members), level, np.uint8))
            origin.append(middle - size / 2)
            extent.append(size)
    assert label  # of at least one class
    tables: dict[str, NDArray[Any]] = {
        "label": np.concatenate(label),
        "scan": np.concatenate(scan),
        "scale": np.concatenate(scale),
        "origin_mm": np.concatenate(origin),
        "extent_mm": np.concatenate(extent),
    }
    order = np.lexsort((tables["scale"], tables["label"], tables["scan"]))
    return {name: values[order] for name, values in tables.items()}


class Most(NamedTuple):
    """Maximum number of members of a class."""

    train: int
    validation: int


def most_members(config: PrepareConfig, split: NDArray[np.uint8]) -> Most:
    """Maximum numbers of members in scans of the given splits (N,)."""
    share = config.max_member_share
    num_train, num_validation = (int((split == number).sum()) for number in (0, 1))
    return Most(
        train=min(config.neighbours, max(2, math.ceil(share * num_train))),
        validation=min(config.validation_neighbours, math.ceil(share * num_validation)),
    )


def min_members(config: PrepareConfig, split: NDArray[np.uint8]) -> int:
    """Minimum number of training members of a class, its reference included."""
    most = min(most_members(config, split).train, int((split == 0).sum()))
    return max(2, round(config.min_member_share * most))
