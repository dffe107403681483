"""Ask a run's best weights about the crops of its store: confusion of classes, features.

The result is kept in RUN/report.npz until the weights or the store change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from store import PatchStore
from store.atomic import replace_file
from store.format import SPLITS
from store.progress import SILENT, Advance, Progress
from store.quality import describe_crops, load_quality
from store.report.pictures import Grey, encode_tiles, fit, slices, to_grey
from trainer.checkpoint import BEST, LAST, load_best
from trainer.config import suggest_batch_size
from trainer.data.dataset import PatchDataset
from trainer.data.plan import thin
from trainer.device import pick_device, set_precision
from trainer.nets.pretraining import PretrainingNet
from trainer.nets.registry import build_net
from trainer.pretexts import PRETEXTS
from trainer.ranks import Ranks
from trainer.report import classes
from trainer.weights import Weights, copy_tensors, describe_net, parse_checkpoint

CACHE: Final = "report.npz"
_VERSION = 1
_VALIDATED, _MAPPED = 20_000, 1000
"""Validation crops that are classified, and crops of each split on the map, at most."""
CROP_TILE, CLASS_TILE, CLASS_TILES, COLUMNS = 48, 64, 2, 40
"""Sides of pictures in pixels; pictures of a class (axial, coronal); crops in a row of a sheet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the page shows of classes and features."""

    facts: dict[str, Any]
    """As JSON."""
    crops: bytes
    """Pictures of the crops on the map, one WebP."""
    classes: bytes
    """Pictures of the classes."""


class NotMeasured(Exception):
    """Why there is nothing to show, in words for the page: no path, no name."""


def measure(
    run: Path,
    stores: Sequence[PatchStore],
    *,
    device: str = "auto",
    progress: Progress = SILENT,
) -> Measured:
    """Confusion and features of a pretraining run's best weights; kept beside them.

    stores
        The run's is found by its fingerprint.

    Raises NotMeasured where the weights, the net or the store are missing; TrainError and
    StoreError where they cannot be read.
    """
    if not any((run / name).exists() for name in (BEST, LAST)):
        raise NotMeasured("the run has no checkpoint yet")
    file, content = load_best(run)
    if content.get("own_net") or content.get("own_pretext"):
        raise NotMeasured("its net or pretext task is one's own, which only its own code can build")
    fingerprint = content["fingerprint"]
    key = {"version": _VERSION, "fingerprint": fingerprint, "weights": _digest(file)}
    if kept := _read_cache(run / CACHE, key):
        return kept
    store = next((store for store in stores if store.fingerprint == fingerprint), None)
    if store is None:
        raise NotMeasured(
            "this needs the store that the run was trained on; make this page again with"
            " --store STORE"
        )
    found = _measure(parse_checkpoint(file, content, "encoder"), content, store, device, progress)
    with contextlib.suppress(OSError), replace_file(run / CACHE) as partial:  # or a read-only run
        np.savez(
            partial,
            key=np.array(json.dumps(key)),
            facts=np.array(json.dumps(found.facts)),
            crops=np.frombuffer(found.crops, np.uint8),
            classes=np.frombuffer(found.classes, np.uint8),
        )
    return found


def _read_cache(file: Path, key: dict[str, Any]) -> Measured | None:
    with contextlib.suppress(OSError, ValueError, KeyError), np.load(file) as kept:
        if json.loads(str(kept["key"])) == key:
            return Measured(
                facts=json.loads(str(kept["facts"])),
                crops=kept["crops"].tobytes(),
                classes=kept["classes"].tobytes(),
            )
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _measure(
    weights: Weights, content: dict[str, Any], store: PatchStore, device: str, progress: Progress
) -> Measured:
    quality = load_quality(store, progress=progress)
    config, chosen = content["config"], pick_device(device, Ranks())
    net = _build_net(weights, config).to(chosen).eval()
    set_precision("fp32")
    parts, pictures, counts = [], [], np.zeros((store.num_classes,) * 2, np.int64)
    sets = {name: _choose(store, name, config) for name in SPLITS}
    total = sum(len(rows) for rows, _ in sets.values())
    with progress.stage("features", total, "crops") as advance:
        for name, (rows, mapped) in sets.items():
            dataset = _open(store, name, rows, config, chosen)
            part = _encode(net, dataset, mapped, advance)
            if name == "validation" and net.num_classes is not None:
                np.add.at(counts, (part.labels, part.predicted), 1)
            pictures += part.tiles
            parts.append(part)
    tiles = [tile for label in range(store.num_classes) for tile in _class_tiles(store, label)]
    facts = {
        "numClasses": store.num_classes,
        "consistency": [round(one.consistency, 4) for one in quality],
        "step": content["progress"]["step"],
        "extent": _aspect(store),
        **_describe(parts, counts, store, classified=net.num_classes is not None),
    }
    blank = np.zeros((CROP_TILE, CROP_TILE), np.uint8)
    return Measured(
        facts=facts,
        crops=encode_tiles(pictures or [blank], COLUMNS),
        classes=encode_tiles(tiles, CLASS_TILES * 10),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """One split, encoded. `labels` and `predicted` are of all its rows, the rest of some."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    mapped: NDArray[np.int64]
    """Rows of the split on the map."""
    mapped_predicted: NDArray[np.int64]
    features: NDArray[np.float32]
    plain: NDArray[np.float32]
    """Features of the crops themselves, without a net, to compare with."""
    tiles: list[Grey]


def _build_net(weights: Weights, config: dict[str, Any]) -> PretrainingNet:
    """Encoder and classification head."""
    kind, width = describe_net("the run", weights)
    head = weights.tensors.get("clc_out.fc1.weight")
    net = build_net(
        kind,
        width=width,
        num_classes=None if head is None else len(head),
        decoder=False,
        parts_per_axis=PRETEXTS[config["pretext"]].parts_per_axis,
    )
    prefixes = (*weights.keys.encoder, "clc_out.")
    copy_tensors(net, weights.tensors, "the run", prefixes=prefixes)
    return net


def _choose(
    store: PatchStore, split: str, config: dict[str, Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of base crops to encode, and those of them on the map: all classes about equally."""
    rows = store.split(split)
    used = (rows.scale == 0) & ~np.isin(rows.label, config.get("excluded_classes") or [])
    if config.get("classes") is not None:
        used &= np.isin(rows.label, config["classes"])
    base = np.flatnonzero(used).astype(np.int64)
    mapped = base[classes.spread(rows.label[base], _MAPPED)]
    return (thin(base, _VALIDATED) if split == "validation" else mapped), mapped


def _open(
    store: PatchStore,
    split: str,
    rows: NDArray[np.int64],
    config: dict[str, Any],
    device: torch.device,
) -> PatchDataset:
    return PatchDataset(
        store,
        split,
        batch_size=suggest_batch_size(store.crop_shape),
        rows=rows,
        excluded_classes=(),
        excluded_members=config.get("excluded_members") or (),
        normalise=config.get("normalise") or "window",
        shuffle=False,
        cache="none",
        device=device,
        skip_corrupt=True,
    )


@torch.no_grad()
def _encode(
    net: PretrainingNet, dataset: PatchDataset, mapped: NDArray[np.int64], advance: Advance
) -> _Part:
    """Encode all crops of `dataset`; those of the rows `mapped` (n,) also for the map."""
    labels, predicted, rows, chosen, features, plain = [], [], [], [], [], []
    tiles: list[Grey] = []
    for batch in dataset.batches(0):
        images = batch.images()  # (n, 1, Z, Y, X)
        if batch.zscores is not None:
            images = batch.zscores.apply(images)
        found, logits = net.describe(images)
        of_batch = batch.labels.cpu().numpy()
        guess = of_batch if logits is None else logits.argmax(1).cpu().numpy()
        shown = np.isin(batch.rows, mapped)
        crops = batch.crops[:, 0].cpu().numpy()[shown]  # (n, Z, Y, X) HU
        labels.append(of_batch)
        predicted.append(guess)
        rows.append(batch.rows[shown])
        chosen.append(guess[shown])
        features.append(found.float().cpu().numpy()[shown])
        plain.append(describe_crops(crops))
        tiles += [fit(to_grey(crop[len(crop) // 2]), CROP_TILE) for crop in crops]
        advance(len(batch))
    if not labels:
        none, blank = np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
        return _Part(none, none, none, none, blank, blank, [])
    return _Part(
        np.concatenate(labels),
        np.concatenate(predicted),
        np.concatenate(rows),
        np.concatenate(chosen),
        np.concatenate(features),
        np.concatenate(plain),
        tiles,
    )


def _describe(
    parts: list[_Part], counts: classes.Counts, store: PatchStore, *, classified: bool
) -> dict[str, Any]:
    """Numbers of the page: confusion, order of the classes, map, nearest neighbours."""
    train, validation = parts
    labels = [store.split(name).label[part.mapped].astype(np.int64)
              for name, part in zip(SPLITS, parts, strict=True)]  # fmt: skip
    patients = [store.scans.patient[store.split(name).scan[part.mapped]].astype(np.int64)
                for name, part in zip(SPLITS, parts, strict=True)]  # fmt: skip
    known = [part for part in parts if len(part.mapped)]
    if not known:
        raise NotMeasured("the store has no base crops of the classes that the run uses")
    centre = known[0].features.mean(0)
    features = [classes.normalise(part.features, centre) if len(part.mapped) else None
                for part in parts]  # fmt: skip
    together = np.concatenate([found for found in features if found is not None])
    at, explained = classes.project(together)
    pixels = np.concatenate([part.mapped_predicted for part in parts])
    order = classes.sort_classes(counts, together, np.concatenate(labels))
    nearest = None
    if features[0] is not None and features[1] is not None:
        others = (labels[0], patients[0])
        by_net = classes.nearest_class(features[0], *others, features[1], patients[1])
        by_crop = classes.nearest_class(train.plain, *others, validation.plain, patients[1])
        nearest = {
            "neighbours": classes.NEIGHBOURS,
            "accuracy": round(float((by_net == labels[1]).mean()), 4),
            "crops": round(float((by_crop == labels[1]).mean()), 4),
            "train": len(train.mapped),
            "validation": len(validation.mapped),
            "patients": len(np.unique(patients[1])),
            "classes": len(np.unique(labels[0])),
        }
    of_class = counts.sum(1)
    return {
        "order": order,
        "nearest": nearest,
        "explained": explained,
        "points": {
            "at": at.round(3).tolist(),
            "label": np.concatenate(labels).tolist(),
            "split": np.repeat((0, 1), [len(part.mapped) for part in parts]).tolist(),
            "predicted": pixels.tolist() if classified else None,
        },
        "confusion": {
            "cells": [[int(i), int(j), int(counts[i, j])] for i, j in np.argwhere(counts)],
            "crops": int(of_class.sum()),
            "patients": len(np.unique(patients[1])),
            "accuracy": round(float(counts.trace() / of_class.sum()), 4),
            "pairs": classes.find_pairs(counts),
        } if classified and of_class.sum() else None,
    }  # fmt: skip


def _class_tiles(store: PatchStore, label: int) -> list[Grey]:
    """The middle axial and coronal slice of a class's reference."""
    split, reference = store.train, int(store.classes.reference[label])
    rows = np.flatnonzero((split.label == label) & (split.scale == 0))
    if not len(rows):
        return [np.zeros((CLASS_TILE, CLASS_TILE), np.uint8)] * CLASS_TILES
    own = rows[split.scan[rows] == reference]
    crop = split.read([int((own if len(own) else rows)[0])])[0]
    return [fit(tile, CLASS_TILE) for tile in slices(crop, {"axial": 1, "coronal": 1})]


def _aspect(store: PatchStore) -> list[float]:
    """Sides of a base crop, z, y, x, in mm; of one crop where they differ between scans."""
    rows = np.flatnonzero(store.train.scale == 0)[:1]
    return [float(side) for side in store.train.extent_mm[rows].round(2).ravel()] or [1.0] * 3
