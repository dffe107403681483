"""The plan of a store as data: classes, and a row for every crop that will be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.place import Floats, Geometry, Scans
from pipeline.seeds import SCALES


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPlan:
    """One class and its members, nearest to the reference first."""

    reference: int
    """Row of the scan in which the class was drawn."""
    centre: Floats
    """(3,) centre of the base crop in frame units."""
    neighbour: NDArray[np.intp]
    """Rows of the training members."""
    distance: NDArray[np.float32]
    validation_neighbour: NDArray[np.intp]
    """Rows of the validation members."""
    validation_distance: NDArray[np.float32]

    @property
    def members(self) -> NDArray[np.intp]:
        """Rows of all members."""
        return np.concatenate([self.neighbour, self.validation_neighbour])


def class_tables(classes: list[ClassPlan], config: PrepareConfig) -> dict[str, NDArray[Any]]:
    """The tables of group `classes`, by name."""

    def pad(values: list[NDArray[Any]], width: int, fill: float, dtype: str) -> NDArray[Any]:
        table = np.full((len(values), width), fill, dtype)
        for row, line in zip(table, values, strict=True):
            row[: len(line)] = line
        return table

    k, validation_k = config.neighbours, config.validation_neighbours
    return {
        "reference": np.array([c.reference for c in classes], np.int32),
        "centre": np.array([c.centre for c in classes], np.float64),
        "neighbour": pad([c.neighbour for c in classes], k, -1, "int32"),
        "distance": pad([c.distance for c in classes], k, np.nan, "float32"),
        "validation_neighbour": pad(
            [c.validation_neighbour for c in classes], validation_k, -1, "int32"
        ),
        "validation_distance": pad(
            [c.validation_distance for c in classes], validation_k, np.nan, "float32"
        ),
    }


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
        members = plan.neighbour if split == "train" else plan.validation_neighbour
        rng = np.random.default_rng([config.seed, SCALES, number])
        side = rng.integers(*config.side_steps, size=(len(members), 2))
        shift = rng.integers(*config.shift_steps, size=(len(members), 2, 2))
        centre = geometry.centre_mm(plan.centre, members)
        step = geometry.step_mm[members]
        for level in range(num_scales):
            size, middle = geometry.extent_mm[members].copy(), centre.copy()
            if level:
                size[:, 1:] = side[:, level - 1, None] * step[:, 1:]
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
