"""Stage discover: find the classes, and plan every crop of the store before one is cut.

Section 2.1 of the paper: a random reference scan, its nearest neighbours, one random but fixed
coordinate; the class is the pseudo-label. In addition, a member must contain the whole crop, and no
scan has base crops of two classes that overlap more than the settings allow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.config import PrepareConfig
from pipeline.content import has_content
from pipeline.neighbours import Neighbours
from pipeline.place import Geometry, Scans
from pipeline.plan import ClassPlan, class_tables, row_tables
from pipeline.preflight import PrepareError
from pipeline.seeds import COORDINATE, REFERENCES
from store.format import SPLITS
from store.progress import Advance, Progress
from store.reader import PatchStore
from store.writer import StoreWriter

_ROUNDING_MM = 1e-6


def write_plan(writer: StoreWriter, config: PrepareConfig, progress: Progress) -> None:
    """Run the stage: write the tables of classes and rows, and lay out the arrays of crops.

    Raises PrepareError when no class is found.
    """
    if "discover" in writer.stages:
        return
    store = PatchStore(writer.path, allow_building=True)
    scans = _load_scans(store, embedding=store.scans.embedding)
    with progress.stage("discover", config.classes, "classes") as advance:
        classes = discover(scans, config, advance=advance)
        if not classes:
            raise PrepareError(
                f"no class found in {len(scans)} scans: no position lies inside enough scans with a"
                f" crop of {config.shape} voxels at {config.spacing_mm} mm and enough content;"
                f" delete {writer.path} and try smaller crops or other tissue limits"
            )
        for name, values in class_tables(classes, config).items():
            writer.write_table(f"classes/{name}", values)
        for split in SPLITS:
            rows = row_tables(classes, scans, config, split)
            for name, values in rows.items():
                writer.write_table(f"{split}/{name}", values)
            writer.create_sharded(
                f"{split}/patch",
                shape=(len(rows["label"]), *config.shape),
                dtype="int16",
                rows_per_shard=config.rows_per_shard,
            )
    writer.finish_stage("discover", {"classes": len(classes)})


def _load_scans(store: PatchStore, *, embedding: NDArray[np.float32]) -> Scans:
    thumbnails = store.thumbnails
    return Scans(
        split=store.scans.split,
        spacing_mm=store.scans.spacing_mm,
        size=store.scans.size,
        frame_mm=store.scans.frame_mm,
        embedding=embedding,
        thumbnail=lambda row: np.asarray(thumbnails.read([row])[0]),
    )


def discover(
    scans: Scans, config: PrepareConfig, *, advance: Advance = lambda _: None
) -> list[ClassPlan]:
    """Find up to `config.classes` classes; fewer when a full round over the references adds none.

    References are drawn without replacement; when all were used, a new round begins, so that
    several coordinates of one reference may become classes. `advance` counts classes.
    """
    search = _Search(scans, config)
    classes: list[ClassPlan] = []
    turn = 0
    while len(classes) < config.classes:
        before = len(classes)
        order = np.random.default_rng([config.seed, REFERENCES, turn])
        for reference in order.permutation(search.train).tolist():
            rng = np.random.default_rng([config.seed, COORDINATE, turn, reference])
            plan = search.find_class(reference, rng, classes)
            if plan is not None:
                classes.append(plan)
                advance(1)
            if len(classes) == config.classes:
                break
        if len(classes) == before:
            break
        turn += 1
    return classes


class _Search:
    """Tries coordinates of a reference until one makes a class."""

    def __init__(self, scans: Scans, config: PrepareConfig) -> None:
        self.scans, self.config = scans, config
        self.geometry = Geometry(scans, config)
        self.train, validation = (np.flatnonzero(scans.split == number) for number in (0, 1))
        self.min_members = min_members(config, len(self.train))
        self.index = Neighbours(scans.embedding, self.train, config.index)
        self.validation_index = Neighbours(scans.embedding, validation, config.index)

    def find_class(
        self, reference: int, rng: np.random.Generator, others: list[ClassPlan]
    ) -> ClassPlan | None:
        """A class drawn in this reference that is compatible with the others, or None."""
        config, geometry = self.config, self.geometry
        thumbnail = self.scans.thumbnail(reference)
        for _ in range(config.tries):
            centre = geometry.draw_centre(reference, rng)
            if centre is None:
                return None
            if not has_content(
                thumbnail,
                self.scans.frame_mm[reference],
                geometry.centre_mm(centre, reference),
                geometry.step_mm[reference],
                config,
            ):
                continue
            eligible = geometry.eligible(centre, self.scans.split)
            neighbour, distance = self.index.nearest(reference, config.neighbours, eligible)
            if len(neighbour) < self.min_members:
                continue
            validation_neighbour, validation_distance = self.validation_index.nearest(
                reference, config.validation_neighbours, eligible
            )
            plan = ClassPlan(
                reference=reference,
                centre=centre,
                neighbour=neighbour,
                distance=distance,
                validation_neighbour=validation_neighbour,
                validation_distance=validation_distance,
            )
            if not any(_clash(geometry, plan, other) for other in others):
                return plan
        return None


def _clash(geometry: Geometry, one: ClassPlan, other: ClassPlan) -> bool:
    """Whether base crops of both classes would be too close to each other in some scan."""
    if geometry.is_far(one.centre, other.centre):
        return False
    shared = np.intersect1d(one.members, other.members)
    return geometry.is_too_close(one.centre, other.centre, shared)


def min_members(config: PrepareConfig, num_train: int) -> int:
    """Minimum number of training members of a class, its reference included."""
    return max(2, round(config.min_member_share * min(config.neighbours, num_train)))


def check_crops_fit(store: PatchStore, config: PrepareConfig) -> None:
    """PrepareError when the surveyed scans are too few or too small for any class.

    Needs no embeddings, so it is checked before the autoencoder is trained.
    """
    scans = _load_scans(store, embedding=np.empty((len(store.scans.id), 0), np.float32))
    geometry = Geometry(scans, config)
    train = np.flatnonzero(scans.split == 0)
    least = min_members(config, len(train))
    if len(train) < least:
        raise PrepareError(
            f"{store.path}: {len(train)} of {len(scans)} scans are for training, and a class"
            f" needs {least}; delete the store, then add scans of other patients, or use fewer for"
            " validation (validation_fraction)"
        )
    needed_mm = 2 * geometry.full_reach * geometry.step_mm[train]
    fits = train[(needed_mm <= geometry.last_mm[train] + _ROUNDING_MM).all(axis=1)]
    rng = np.random.default_rng(0)
    if len(fits) < least or all(geometry.draw_centre(row, rng) is None for row in fits.tolist()):
        size_mm = np.median(needed_mm, axis=0)
        scan_mm = np.median(geometry.last_mm[train], axis=0)
        border = " and border" if any(config.border) else ""
        raise PrepareError(
            f"{store.path}: crops are too large: crop with its larger scales{border}"
            f" {_mm(size_mm)}, scan {_mm(scan_mm)} (z, y, x; medians). They fit in {len(fits)} of"
            f" {len(train)} training scans, and a class needs {least}. Delete the"
            " store, then set a smaller shape, spacing_mm, side_steps or shift_steps, or scales = 1"
        )


def _mm(size: NDArray[np.float64]) -> str:
    return " x ".join(f"{length:.0f}" for length in size) + " mm"
