"""Stage embed: train the autoencoder on a store's thumbnails, and embed every scan.

An embedding has two parts. The latent vector, less its mean over the training scans and divided by
its length, tells what the scan shows: the direction depends less on the training than the length
does. Two numbers tell the size of the body, which the thumbnail of a frame box does not show.

One process and a fixed number of threads, so that weights and embeddings are the same bytes for
any number of workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.autoencoder import (
    Autoencoder,
    Thumbnails,
    load_autoencoder,
    reduced_loader,
    save_autoencoder,
)
from pipeline.config import BODY_SIZES, PrepareConfig
from pipeline.training import num_torch_threads, steps_done, train_autoencoder
from store.format import AUTOENCODER_FILE
from store.progress import Advance, Progress
from store.reader import PatchStore
from store.sharded import ShardedReader
from store.writer import StoreWriter

_TYPICAL_MM = 300.0
"""Sizes are relative to this one, so that their logarithms are small numbers."""
_MIN_NORM = 1e-12
"""A single training scan lies at the centre."""


def write_embeddings(
    writer: StoreWriter,
    config: PrepareConfig,
    *,
    weights: Path | None,
    checkpoint: Path,
    progress: Progress,
) -> None:
    """Run the stage: write the autoencoder's weights and the embedding of every scan.

    weights
        Use these instead of training.
    checkpoint
        Where an interrupted training resumes.
    """
    if "embed" in writer.stages:
        return
    settings = config.autoencoder
    read = ShardedReader(writer.path, "scans/thumbnail").read
    scans = PatchStore(writer.path, allow_building=True).scans
    split, frame_mm = scans.split, scans.frame_mm
    facts: dict[str, Any] = {}
    with num_torch_threads(settings.threads):
        if weights is not None:
            with progress.stage("embed", len(split), "scans") as advance:
                model = load_autoencoder(weights)
                latent = encode_scans(model, read, len(split), advance=advance)
        else:
            train, validation = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
            epoch_steps = -(-len(train) // settings.batch_size)
            num_steps = min(settings.max_steps, settings.max_epochs * epoch_steps)
            done = steps_done(checkpoint)
            with progress.stage("embed", num_steps, "steps", done=done) as advance:
                model, training = train_autoencoder(
                    read,
                    train=train,
                    validation=validation,
                    config=settings,
                    seed=config.seed,
                    checkpoint=checkpoint,
                    advance=advance,
                )
                latent = encode_scans(model, read, len(split))
            set_centre(model, latent, split == 0)
            facts = training.to_facts()
    writer.write_table("scans/embedding", make_embeddings(latent, model, frame_mm))
    save_autoencoder(model, writer.path / AUTOENCODER_FILE)
    writer.finish_stage("embed", facts)


def encode_scans(
    model: Autoencoder,
    thumbnails: Thumbnails,
    num_scans: int,
    *,
    advance: Advance = lambda _: None,
) -> NDArray[np.float32]:
    """(num_scans, latent) float32, one scan at a time: a batch could change the last bits."""
    model.eval()
    load = reduced_loader(thumbnails, kept=0)
    latent = np.empty((num_scans, model.latent), np.float32)
    with torch.no_grad():
        for row in range(num_scans):
            latent[row] = model.encode(load(np.array([row])))[0].numpy()
            advance(1)
    return latent


def set_centre(model: Autoencoder, latent: NDArray[np.float32], train: NDArray[np.bool_]) -> None:
    """Set the model's centre to the mean latent vector of the training scans.

    latent
        (N, latent).
    train
        (N,), at least one true.
    """
    mean = latent.mean(axis=0, dtype=np.float64, where=train[:, None])
    model.centre.copy_(torch.from_numpy(mean))


def make_embeddings(
    latent: NDArray[np.float32], model: Autoencoder, frame_mm: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(N, latent + 2) float32: unit vectors, then the size of the frame box along y and x.

    Of two scans, the unit vectors are between 0 and 2 apart. Where one box is e times as wide as
    the other, they differ in size by 1.

    latent
        (N, latent) of `encode_scans`.
    frame_mm
        (N, 2, 3) low and high corner of each scan's frame box.
    """
    size_mm = frame_mm[:, 1, 1:] - frame_mm[:, 0, 1:]
    embedding = np.empty((len(latent), model.latent + BODY_SIZES), np.float32)
    vector = embedding[:, : model.latent]  # a view: a large archive's embeddings fill gigabytes
    np.subtract(latent, model.centre.numpy(), out=vector)
    vector /= np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), _MIN_NORM)
    embedding[:, model.latent :] = np.log(size_mm / _TYPICAL_MM)
    return embedding
