"""How good are frozen features? Nearest neighbours and a linear probe, without fine-tuning.

    export OMP_NUM_THREADS=1
    python -m benchmarks.probe STORE --runs RUN ... [--seeds 5] [--out FILE.md]
        [--scans FOLDER ... --regions PATTERN=REGION ... [--no-side REGION ...]] [--adrenal FILE]

Features are means over space of an encoder's last level. From those of crops with known labels,
the five nearest crops by cosine similarity (kNN) and logistic regression (linear) predict the
labels of others. Tasks:

class       the class of a base crop of the store's validation split, from those of its training
            split. These labels are the store's own, and starts with classes were trained on them.
region      the body region of random crops of real scans. The first PATTERN found in a file's
            path gives the region of all its crops; files without any are left out.
side        whether the centre of such a crop is left or right of the middle of the body. Not for
            regions of --no-side, whose scans do not show the complete width of a body, and not
            within a tenth of the width from the middle.
adrenal     the shape of an adrenal gland: AdrenalMNIST3D, tested on its official test split.

RUN is a folder of `semgen pretrain`, or a file with weights. Its name is that of the start; several
of one name are its seeds, and their mean score counts. "scratch" is the same net with random
weights. The batch norms of all nets have measured the crops of the store. "voxels" are means of
4 x 4 x 4 voxels, without a net.

No patient is on both sides of a prediction. Real scans, each of which counts as a patient, are
tested in five folds. Those that any RUN was trained on are not tested: their crops and labels only
help to predict others. Scans of the store's validation split count as unseen, because they can only
have chosen the step of the best weights.

Intervals are the middle 95 % of 2,000 bootstrap samples of the tested patients, with nets and
predictions as they are; how much nets differ is shown by the range over seeds. A gain is the
difference to scratch in the same samples.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.probe_scores import PROBES, cross_validate, deal_folds, interval, resample, score
from benchmarks.proof_tables import markdown_table
from pipeline.config import PrepareConfig
from pipeline.content import ContentOfScan
from pipeline.crops import cut_crop, make_thumbnail
from pipeline.frame import frame_box
from pipeline.match_files import read_scan
from pipeline.place import crop_step_mm
from store import PatchStore
from store.format import THUMBNAIL_SHAPE
from store.scans import scan_name
from store.settings import build
from trainer import load_encoder, read_weights
from trainer.nets.pretraining import seeded_weights
from trainer.nets.registry import build_encoder, channels_last
from trainer.report.classes import spread
from trainer.weights import Weights, describe_net

SCRATCH: Final = "scratch"
FOLDS, SAMPLES = 5, 2000
_MOST_CROPS = 1000
"""Crops of a split for the task "class", at most; all classes about equally."""
_MIN_BODY, _TRIES = 0.3, 200
"""Least share of body in a random crop, and places tried for each crop."""
_PLACES: Final = 1905
"""Role of the generator that draws places."""
_MIDDLE = 0.1
"""Share of the body's width, to either side of its middle, where a crop has no side."""
_CELL, _BATCH, _FACTOR = 4, 32, 32
"""Side of the cells of "voxels"; crops at once; sides of images become multiples of this."""

Encode = Callable[[Tensor], Tensor]
"""Features (n, d) of images (n, 1, Z, Y, X) in [0, 1]."""
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    """Images, to be encoded once."""

    voxels: NDArray[Any]
    """(n, Z, Y, X), integers."""
    window: tuple[float, float]
    """What is mapped to 0 and 1."""

    def images(self) -> Iterator[Tensor]:
        """Batches (n, 1, Z, Y, X) float32 in [0, 1]."""
        low, high = self.window
        for start in range(0, len(self.voxels), _BATCH):
            batch = torch.from_numpy(self.voxels[start : start + _BATCH].astype(np.float32))
            yield ((batch[:, None] - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is predicted, of which crops."""

    name: str
    crops: Crops
    used: Ints
    """(n,) rows of `crops`; the other arrays belong to these."""
    labels: Ints
    patients: Ints
    folds: Ints
    """The fold in which a crop is tested; -1: never."""

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


# Tasks


def class_task(store: PatchStore) -> Task:
    """Pseudo-labels of the validation split."""
    voxels, labels, patients, folds = [], [], [], []
    for fold, split in ((-1, store.train), (0, store.validation)):
        base = np.flatnonzero(split.scale == 0)
        rows = base[spread(split.label[base], _MOST_CROPS)]
        voxels.append(split.read(rows))
        labels.append(split.label[rows])
        patients.append(store.scans.patient[split.scan[rows]])
        folds.append(np.full(len(rows), fold))
    crops = Crops(voxels=np.concatenate(voxels), window=store.window_hu)
    return Task(
        name="class",
        crops=crops,
        used=np.arange(len(crops.voxels)),
        labels=np.concatenate(labels).astype(np.int64),
        patients=np.concatenate(patients).astype(np.int64),
        folds=np.concatenate(folds),
    )


def scan_tasks(
    scans: Sequence[Path],
    regions: Sequence[tuple[str, str]],
    no_side: Collection[str],
    config: PrepareConfig,
    seen: Collection[str],
    num_crops: int,
) -> Iterator[Task]:
    """Region and side of random crops.

    scans
        Folders of scans, each a file or a folder.
    regions
        Pattern and region.
    config
        Of the store: spacing, shape and window of the crops.
    seen
        Ids of the scans that a net was trained on.
    """
    names = sorted({region for _, region in regions})
    found = [
        (file, next((names.index(name) for pattern, name in regions if pattern in str(file)), -1))
        for folder in scans
        for file in sorted(folder.iterdir())
    ]
    voxels, region, side, patient, tested = [], [], [], [], []
    for number, (file, of_file) in enumerate(found):
        if of_file < 0:
            continue
        scan, drawn = draw_crops(file, config, num_crops, number)
        for crop, across in drawn:
            voxels.append(crop)
            region.append(of_file)
            has_side = names[of_file] not in no_side and abs(across - 0.5) >= _MIDDLE
            side.append(int(across > 0.5) if has_side else -1)
            patient.append(number)
            tested.append(scan not in seen)
    if not voxels:
        raise SystemExit("no crops: no path of a scan has a PATTERN, or all scans are too small")
    patients = np.array(patient)
    crops = Crops(voxels=np.stack(voxels), window=config.window_hu)
    for task, labels in (("region", np.array(region)), ("side", np.array(side))):
        used = np.flatnonzero(labels >= 0)
        folds = np.full(len(labels), -1)
        asked = used[np.array(tested)[used]]
        if len(asked):
            folds[asked] = deal_folds(patients[asked], labels[asked], FOLDS)
            yield Task(
                name=task, crops=crops, used=used, labels=labels[used], patients=patients[used],
                folds=folds[used],
            )  # fmt: skip


def draw_crops(
    file: Path, config: PrepareConfig, num: int, number: int
) -> tuple[str, list[tuple[NDArray[np.int16], float]]]:
    """A scan's id, and crops at random places of its body; fewer than `num` where few places fit.

    Each has its voxels, and where its centre is across the body: 0 on the right, 1 on the left.

    number
        Of the scan: its seed.
    """
    volume, rng = read_scan(file), np.random.default_rng([_PLACES, number])
    box = frame_box(volume, "body")
    wide = replace(config, window_hu=PrepareConfig().window_hu)  # in which air differs from fat
    content = ContentOfScan(make_thumbnail(volume, box, THUMBNAIL_SHAPE, wide), box, wide)
    spacing = np.array(volume.spacing_mm)
    step = crop_step_mm(config, spacing)
    extent = step * config.shape
    reach, last = (extent - step) / 2, (np.array(volume.hu.shape) - 1) * spacing
    low, high = np.maximum(box[0], reach), np.minimum(box[1], last - reach)
    centres = rng.uniform(low, np.maximum(low, high), (_TRIES * num, 3))
    shown = (c for c in centres if content.of_crop(c, step).body >= _MIN_BODY)
    drawn = []
    for centre in itertools.islice(shown, num if (low < high).all() else 0):
        crop = cut_crop(
            volume, origin_mm=centre - extent / 2, extent_mm=extent, shape=config.shape,
            window_hu=config.window_hu,
        )  # fmt: skip
        drawn.append((crop, float((centre - box[0])[2] / (box[1] - box[0])[2])))
    return scan_name(volume.scan_id()), drawn


def adrenal_task(file: Path) -> Task:
    """AdrenalMNIST3D with its official split; each image counts as a patient."""
    with np.load(file) as archive:
        arrays = dict(archive)
    images, labels = (
        np.concatenate([arrays[f"{split}_{what}"] for split in ("train", "val", "test")])
        for what in ("images", "labels")
    )
    spare = [-side % _FACTOR for side in images.shape[1:]]
    padded = np.pad(images, [(0, 0), *((pad // 2, pad - pad // 2) for pad in spare)])
    folds = np.full(len(images), -1)
    folds[-len(arrays["test_images"]) :] = 0
    return Task(
        name="adrenal",
        crops=Crops(voxels=padded, window=(0, float(images.max()))),
        used=np.arange(len(images)),
        labels=labels.reshape(-1).astype(np.int64),
        patients=np.arange(len(images)),
        folds=folds,
    )


# Starts


def make_starts(
    runs: Sequence[Path], weights: Sequence[Weights], seeds: int, crops: Crops
) -> dict[str, list[Encode]]:
    """The nets of each start: one, or one for each seed.

    crops
        Of the store, for the batch norms of all nets.
    """
    mixed = replace(crops, voxels=np.random.default_rng(0).permutation(crops.voxels))
    kinds = {describe_net(run, one) for run, one in zip(runs, weights, strict=True)}
    if len(kinds) != 1:
        raise SystemExit(f"--runs must be of one net and width; these are {sorted(kinds)}")
    kind, width = kinds.pop()
    random: list[nn.Module] = []
    for seed in range(seeds):
        with seeded_weights(seed):
            random.append(channels_last(build_encoder(kind, width)))
    nets: dict[str, list[nn.Module]] = {SCRATCH: random}
    for run in runs:
        nets.setdefault(run.name, []).append(load_encoder(run))
    starts: dict[str, list[Encode]] = {"voxels": [mean_of_cells]}
    for start, of_start in nets.items():
        starts[start] = [pool(measure_norms(net, mixed)) for net in of_start]
    return starts


def measure_norms(net: nn.Module, crops: Crops) -> nn.Module:
    """The net in eval mode; its batch norms have the mean and variance of these crops."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for images in crops.images():
            net.train()(images)
    return net.eval()


def pool(net: nn.Module) -> Encode:
    return lambda images: net(images).mean(dim=(2, 3, 4))


def mean_of_cells(images: Tensor) -> Tensor:
    return nn.functional.avg_pool3d(images, _CELL).flatten(1)


@torch.no_grad()
def encode(net: Encode, crops: Crops) -> NDArray[np.float32]:
    """(n, d) features."""
    return np.concatenate([net(images).numpy() for images in crops.images()])


def check_input(run: Path, weights: Weights, store: PatchStore) -> None:
    """The nets must have been trained on crops as the store's."""
    window, normalise = (weights.metadata.get(name) for name in ("window_hu", "normalise"))
    if (normalise or "window") != "window":
        raise SystemExit(f"{run}: was trained on z-scores; this benchmark knows windows only")
    if window is not None and tuple(window) != store.window_hu:
        raise SystemExit(f"{run}: was trained on HU {window}, the store has {store.window_hu}")


def find_seen(store: PatchStore, weights: Sequence[Weights]) -> set[str]:
    """Ids of the scans that any of the weights were trained on."""
    used = {scan for one in weights for scan in one.metadata.get("scans") or ()}
    return used - {scan_name(scan) for scan in store.scans.id[store.scans.split == 1]}


# Tables


def probe(task: Task, features: dict[str, list[NDArray[np.float32]]]) -> str:
    """The table of a task, as Markdown.

    features
        By start, of each of its nets.
    """
    asked = task.folds >= 0
    weights, truth = resample(task.patients[asked], SAMPLES), task.labels[asked]
    known = (task.labels, task.patients, task.folds, task.num_classes)
    rows: dict[str, list[str]] = {start: [] for start in features}
    for name in PROBES:
        samples = {
            start: np.stack([
                score(truth, cross_validate(name, found[task.used], *known), weights)
                for found in nets
            ])
            for start, nets in features.items()
        }  # fmt: skip
        scratch = samples[SCRATCH].mean(0)
        for start, found in samples.items():
            of_seeds = found[:, 0]
            seeds = f"; seeds {percent(of_seeds.min())} to {percent(of_seeds.max())}"
            rows[start] += [
                with_interval(found.mean(0)) + (seeds if len(found) > 1 else ""),
                "" if start == SCRATCH else with_interval(found.mean(0) - scratch, "+"),
            ]
    header = [f"{name}{what}" for name in PROBES for what in ("", ", gain")]
    tested = len(np.unique(task.patients[asked]))
    measure = (
        "AUC, chance 50" if task.num_classes == 2
        else f"balanced accuracy of {task.num_classes}, chance {percent(1 / task.num_classes)}"
    )  # fmt: skip
    return (
        f"**{task.name}**: {measure}; {asked.sum()} crops of {tested} patients tested, of"
        f" {len(asked)} crops of {len(np.unique(task.patients))}\n\n"
        + markdown_table(["start", *header], [[start, *cells] for start, cells in rows.items()])
    )


def percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}"


def with_interval(samples: NDArray[np.float64], sign: str = "") -> str:
    low, high = interval(samples)
    return f"{percent(samples[0], sign)} ({percent(low, sign)} to {percent(high, sign)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=PatchStore)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=5, help="of scratch")
    parser.add_argument("--scans", type=Path, nargs="*", default=[])
    parser.add_argument("--regions", nargs="*", default=[], metavar="PATTERN=REGION")
    parser.add_argument("--no-side", nargs="*", default=[], metavar="REGION")
    parser.add_argument("--crops", type=int, default=40, help="random crops of a scan")
    parser.add_argument("--adrenal", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    store: PatchStore = given.store
    weights = [read_weights(run, part="encoder") for run in given.runs]
    for run, one in zip(given.runs, weights, strict=True):
        check_input(run, one, store)
    tasks = [class_task(store)]
    if given.scans:
        regions = [(p, r) for p, _, r in (words.partition("=") for words in given.regions)]
        config, seen = build(PrepareConfig, store.config), find_seen(store, weights)
        tasks += scan_tasks(given.scans, regions, given.no_side, config, seen, given.crops)
    if given.adrenal:
        tasks.append(adrenal_task(given.adrenal))
    starts = make_starts(given.runs, weights, given.seeds, tasks[0].crops)
    kept: dict[Crops, dict[str, list[NDArray[np.float32]]]] = {}
    blocks = []
    for task in tasks:
        if task.crops not in kept:
            kept[task.crops] = {
                start: [encode(net, task.crops) for net in nets] for start, nets in starts.items()
            }
        blocks.append(probe(task, kept[task.crops]))
        print(blocks[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(blocks))


if __name__ == "__main__":
    main()
