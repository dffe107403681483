"""How well several embeddings place scans of similar anatomy beside each other.

    python -m benchmarks.neighbours regions STORE PATTERN=REGION ... [--seeds 10]
    python -m benchmarks.neighbours phantoms STORE PHANTOM_ARCHIVE [--seeds 10]

`regions`: for how many scans is the nearest other scan of the same body region, and the share of
triples (scan, same region, other region) in the right order. File names are looked up in the
private catalogue; the first PATTERN found in a name gives its region.
`phantoms`: mean distance in mm between points of a scan and those at the same frame coordinates of
its neighbours, in the scan's anatomy: for the nearest scan, and for the nearest seven.

The autoencoder is trained anew for each seed, which also draws the validation patients. Its
embedding and its parts are compared with PCA of the thumbnails, their pixels, untrained networks,
and the likeness of slices that `semgen match` uses. Mean over seeds, with the range in brackets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.archive.lookup import read_sources
from pipeline.autoencoder import Autoencoder, new_autoencoder
from pipeline.config import PrepareConfig
from pipeline.match import describe_scan
from pipeline.phantom.patients import draw_phantom
from pipeline.splits import split_patients
from pipeline.stages.embed import encode_scans, make_embeddings, set_centre
from pipeline.training import train_autoencoder
from store import PatchStore
from store.settings import build

PCA_COMPONENTS = (4, 16)
NUM_NEAREST = 7
_FRAME_POINTS = np.stack(
    np.meshgrid(np.linspace(0.1, 0.9, 5), *[(0.3, 0.5, 0.7)] * 2, indexing="ij"), axis=-1
).reshape(-1, 3)

Measure = Callable[[np.ndarray], tuple[float, float]]
"""Two figures of (N, N) distances, infinite on the diagonal."""


def compare(store: PatchStore, num_seeds: int, measure: Measure) -> dict[str, np.ndarray]:
    """(seeds, 2) figures of each way to compare scans, by name."""
    config = build(PrepareConfig, store.config)
    torch.set_num_threads(config.autoencoder.threads)
    figures: dict[str, list[tuple[float, float]]] = {}
    for seed in range(num_seeds):
        for name, apart in learned(store, replace(config, seed=seed)):
            figures.setdefault(name, []).append(measure(apart))
    figures |= {name: [measure(apart)] for name, apart in without_training(store, config)}
    return {name: np.array(rows) for name, rows in figures.items()}


def learned(store: PatchStore, config: PrepareConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Distances by the autoencoder of one seed, and by the same network untrained."""
    patient, num = store.scans.patient, len(store.scans.id)
    _, split = split_patients(
        scan=np.arange(num), patient=patient, wanted_split=np.full(num, -1), config=config
    )
    with tempfile.TemporaryDirectory() as folder:
        trained, _ = train_autoencoder(
            store.thumbnails.read,
            train=np.flatnonzero(split == 0),
            validation=np.flatnonzero(split == 1),
            config=config.autoencoder,
            seed=config.seed,
            checkpoint=Path(folder) / "checkpoint",
        )
    latent, embedding = embed(store, trained, split == 0)
    yield "autoencoder", distances(embedding)
    yield "  without size", distances(embedding[:, : trained.latent])
    yield "  latent vector", distances(latent)
    untrained = new_autoencoder(config.autoencoder, config.seed)
    latent, embedding = embed(store, untrained, split == 0)
    yield "untrained", distances(embedding)
    yield "  latent vector ", distances(latent)


def embed(
    store: PatchStore, model: Autoencoder, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Latent vectors and embeddings, as `prepare` makes them."""
    latent = encode_scans(model, store.thumbnails.read, len(train))
    set_centre(model, latent, train)
    return latent, make_embeddings(latent, model, store.scans.frame_mm)


def without_training(store: PatchStore, config: PrepareConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Distances that depend on no seed."""
    num = len(store.scans.id)
    read = store.thumbnails.read
    images = np.stack([read([row])[0] for row in range(num)])
    pixels = images.reshape(num, 16, 4, 32, 4, 32, 4).mean(axis=(2, 4, 6)).reshape(num, -1) / 255
    centred = pixels - pixels.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    for k in PCA_COMPONENTS:
        yield f"PCA {k}", distances(left[:, :k] * values[:k])
    yield "pixels", distances(pixels)
    size = np.log(np.diff(store.scans.frame_mm[:, :, 1:], axis=1)[:, 0])
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    yield "  unit, size", distances(np.concatenate([unit, size], axis=1))
    slices = [describe_slices(store, config, image, row) for row, image in enumerate(images)]
    yield "slices", np.array([[1 - likeness(a, b) for b in slices] for a in slices]) + infinite(num)


def describe_slices(
    store: PatchStore, config: PrepareConfig, image: np.ndarray, row: int
) -> np.ndarray:
    """(n, cells) features of a scan's slices."""
    half = store.scans.spacing_mm[row] / 2
    edges_mm = np.stack([-half, store.scans.size[row] * 2 * half - half])
    box_mm = store.scans.frame_mm[row]
    return describe_scan(image, box_mm=box_mm, edges_mm=edges_mm, window_hu=config.window_hu).slices


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Sum of the likeness of slices at the best shift along z, relative to the scans' lengths."""
    alike = one @ other.T / one.shape[1]
    shifts = range(1 - len(one), len(other))
    return max(np.trace(alike, shift) for shift in shifts) / np.sqrt(len(one) * len(other))


def distances(embedding: np.ndarray) -> np.ndarray:
    """(N, N) L2, infinite on the diagonal."""
    embedding = embedding.astype(np.float64)
    apart = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1)
    return apart + infinite(len(apart))


def infinite(num: int) -> np.ndarray:
    """(num, num): infinite on the diagonal, else 0."""
    return np.where(np.eye(num, dtype=bool), np.inf, 0)


def regions(store: PatchStore, patterns: list[str], num_seeds: int) -> None:
    """Print the table of `regions`."""
    pairs = [p.split("=") for p in patterns]
    sources = read_sources(store.path)
    region = np.array(
        [next(r for p, r in pairs if p in sources[i]) for i in range(len(store.scans.id))]
    )
    same = (region[:, None] == region[None]) & ~np.eye(len(region), dtype=bool)
    other = region[:, None] != region[None]

    def measure(apart: np.ndarray) -> tuple[float, float]:
        hits = region[apart.argmin(axis=1)] == region
        order = [
            (apart[i, same[i]][:, None] < apart[i, other[i]]).mean() for i in range(len(region))
        ]
        return float(hits.sum()), float(np.mean(order))

    counts = ", ".join(f"{(region == r).sum()} {r}" for r in np.unique(region))
    print(f"{len(region)} scans: {counts}")
    show(compare(store, num_seeds, measure), f"nearest in region, of {len(region)}", "right order")


def phantoms(store: PatchStore, archive: Path, num_seeds: int) -> None:
    """Print the table of `phantoms`."""
    error = anatomy_errors(store, archive)

    def measure(apart: np.ndarray) -> tuple[float, float]:
        nearest = np.argsort(apart, axis=1, kind="stable")
        errors = np.take_along_axis(error, nearest, axis=1)
        return float(errors[:, 0].mean()), float(errors[:, :NUM_NEAREST].mean())

    figures = compare(store, num_seeds, measure)
    figures["best possible"] = np.array([measure(error + infinite(len(error)))])
    print(f"{len(error)} phantoms, frame {store.config['frame']}; any other scan is"
          f" {error.sum() / (error.size - len(error)):.1f} mm away")  # fmt: skip
    show(figures, "nearest, mm", f"nearest {NUM_NEAREST}, mm")


def anatomy_errors(store: PatchStore, archive: Path) -> np.ndarray:
    """(N, N) mm in scan j between frame coordinates and the anatomy that scan i has there."""
    truth = json.loads((archive / "landmarks.json").read_text())
    sources = read_sources(store.path)
    names = sorted(truth["patients"])

    def phantom_of(row: int):
        path = Path(sources[row])
        name = path.name if path.name in truth["patients"] else path.parent.name
        return draw_phantom(
            truth["seed"], names.index(name), matrix=truth["matrix"], varied=truth["varied"]
        )

    patients = [phantom_of(row) for row in range(len(store.scans.id))]
    low, high = store.scans.frame_mm[:, :1], store.scans.frame_mm[:, 1:]
    points_mm = low + _FRAME_POINTS * (high - low)  # (N, points, 3)
    error = np.zeros((len(patients),) * 2)
    for i, patient in enumerate(patients):
        anatomy = patient.to_atlas(points_mm[i])
        for j, member in enumerate(patients):
            offset_mm = member.from_atlas(anatomy) - points_mm[j]
            error[i, j] = np.linalg.norm(offset_mm, axis=1).mean()
    np.fill_diagonal(error, 0)
    return error


def show(figures: dict[str, np.ndarray], *columns: str) -> None:
    """Print mean and range over seeds."""
    print(f"{'distance':16s} " + " ".join(f"{column:>28s}" for column in columns))
    for name, rows in figures.items():
        cells = []
        for values in rows.T:
            digits = 3 if values.max() <= 1 else 1
            span = f" ({values.min():.{digits}f} to {values.max():.{digits}f})"
            cells.append(f"{values.mean():.{digits}f}" + (span if len(values) > 1 else ""))
        print(f"{name:16s} " + " ".join(f"{cell:>28s}" for cell in cells), flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("regions", "phantoms"))
    parser.add_argument("store", type=PatchStore)
    parser.add_argument("rest", nargs="+", metavar="PATTERN=REGION or PHANTOM_ARCHIVE")
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    if given.kind == "regions":
        regions(given.store, given.rest, given.seeds)
    else:
        phantoms(given.store, Path(given.rest[0]), given.seeds)


if __name__ == "__main__":
    main()
