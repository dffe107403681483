"""Do similar scans stand beside each other, and does a coordinate land on the same anatomy.

    python benchmarks/neighbours.py regions STORE PATTERN=REGION ...
    python benchmarks/neighbours.py phantoms STORE PHANTOM_ARCHIVE

`regions`: for how many scans is the nearest other scan of the same body region. File names are
looked up in the private catalogue; the first PATTERN found in a name gives its region.
`phantoms`: the distance in mm between where a class's coordinate lands in a member and where the
reference's anatomy truly is in that member, for the store's frame, its members and random ones.
Both for the store's embedding, PCA of the thumbnails, and an untrained autoencoder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from pipeline.archive.lookup import read_sources
from pipeline.autoencoder import new_autoencoder
from pipeline.config import PrepareConfig
from pipeline.phantom.patients import draw_phantom
from pipeline.place import Geometry, Scans
from pipeline.stages.embed import embed_scans
from store import PatchStore
from store.settings import build

PCA_COMPONENTS = (4, 16, 64)


def embeddings(store: PatchStore) -> dict[str, np.ndarray]:
    """Embeddings (N, D) to compare, by name."""
    config = build(PrepareConfig, store.config)
    num = len(store.scans.id)
    read = store.thumbnails.read
    images = np.stack([read([row])[0] for row in range(num)]).astype(np.float32)
    blocks = images.reshape(num, 16, 4, 32, 4, 32, 4).mean(axis=(2, 4, 6)).reshape(num, -1) / 255
    blocks -= blocks.mean(axis=0)
    left, values, _ = np.linalg.svd(blocks, full_matrices=False)
    embeddings = {"autoencoder": np.asarray(store.scans.embedding)}
    for k in PCA_COMPONENTS:
        if k < num:
            embeddings[f"PCA {k}"] = left[:, :k] * values[:k]
    embeddings["PCA all"] = left * values
    for seed in range(3):
        embeddings[f"untrained {seed}"] = embed_scans(
            new_autoencoder(config.autoencoder, seed), read, num
        )
    return embeddings


def distances(embedding: np.ndarray) -> np.ndarray:
    """(N, N) L2, infinite on the diagonal."""
    embedding = embedding.astype(np.float64)
    apart = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    return apart


def regions(store: PatchStore, patterns: list[str]) -> None:
    pairs = [p.split("=") for p in patterns]
    sources = read_sources(store.path)
    region = np.array(
        [next(r for p, r in pairs if p in sources[i]) for i in range(len(store.scans.id))]
    )
    same = region[:, None] == region[None]
    print(
        f"{len(region)} scans: "
        + ", ".join(f"{(region == r).sum()} {r}" for r in np.unique(region))
    )
    print(f"{'embedding':14s} nearest in region   pairs in right order")
    for name, embedding in embeddings(store).items():
        apart = distances(embedding)
        nearest = apart.argmin(axis=1)
        hits = region[nearest] == region
        order = [
            (apart[i, same[i] & (np.arange(len(region)) != i)][:, None] < apart[i, ~same[i]]).mean()
            for i in range(len(region))
        ]
        wrong = " ".join(Path(sources[i]).name[:10] for i in np.flatnonzero(~hits))
        share = f"{hits.sum():3d} of {len(hits)} = {hits.mean():.0%}"
        print(f"{name:14s} {share}      {np.mean(order):.3f}      {wrong}")


def phantoms(store: PatchStore, archive: Path) -> None:
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
    config = build(PrepareConfig, store.config)
    scans = Scans(
        split=store.scans.split,
        spacing_mm=store.scans.spacing_mm,
        size=store.scans.size,
        frame_mm=store.scans.frame_mm,
        embedding=store.scans.embedding,
        thumbnail=lambda row: store.thumbnails.read([row])[0],
    )
    geometry = Geometry(scans, config)
    rng = np.random.default_rng(0)
    tables = {name: distances(e) for name, e in embeddings(store).items()}
    errors: dict[str, list[float]] = {name: [] for name in [*tables, "random", "best possible"]}
    for label in range(store.num_classes):
        centre = store.classes.centre[label]
        reference = int(store.classes.reference[label])
        eligible = geometry.eligible(centre, scans.split) & (scans.split == 0)
        eligible[reference] = False
        others = np.flatnonzero(eligible)
        k = min(config.neighbours - 1, len(others))
        place = geometry.centre_mm(centre)
        anatomy = patients[reference].to_atlas(place[None, reference])
        error = np.array(
            [np.linalg.norm(patients[i].from_atlas(anatomy)[0] - place[i]) for i in others]
        )
        for name, apart in tables.items():
            errors[name].append(error[np.argsort(apart[reference, others])[:k]].mean())
        errors["random"].append(error[rng.permutation(len(others))[:k]].mean())
        errors["best possible"].append(np.sort(error)[:k].mean())
    print(
        f"{len(patients)} phantoms, {store.num_classes} classes, {config.neighbours} members,"
        f" frame {config.frame}: mean distance in mm to the reference's anatomy, and by how much"
        " it exceeds the autoencoder's (pairs of classes, standard error)"
    )
    for name, values in errors.items():
        more = np.subtract(values, errors["autoencoder"])
        print(
            f"{name:14s} {np.mean(values):6.1f}  {more.mean():+6.2f}"
            f" +- {more.std(ddof=1) / np.sqrt(len(more)):.2f}"
        )


if __name__ == "__main__":
    kind, path, *rest = sys.argv[1:]
    opened = PatchStore(path)
    if kind == "regions":
        regions(opened, rest)
    else:
        phantoms(opened, Path(rest[0]))
