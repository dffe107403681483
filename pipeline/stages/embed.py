"""Stage embed: train the autoencoder on a store's thumbnails, and embed every scan.

One process and a fixed number of threads, so that weights and embeddings are the same bytes for
any number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
from pipeline.config import PrepareConfig
from pipeline.training import steps_done, train_autoencoder
from store.format import AUTOENCODER_FILE
from store.progress import Advance, Progress
from store.reader import PatchStore
from store.sharded import ShardedReader
from store.writer import StoreWriter


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
    split = PatchStore(writer.path, allow_building=True).scans.split
    facts: dict[str, Any] = {}
    with _num_threads(settings.threads):
        if weights is not None:
            with progress.stage("embed", len(split), "scans") as advance:
                model = load_autoencoder(weights)
                embedding = embed_scans(model, read, len(split), advance=advance)
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
                embedding = embed_scans(model, read, len(split))
            facts = training.to_facts()
    writer.write_table("scans/embedding", embedding)
    save_autoencoder(model, writer.path / AUTOENCODER_FILE)
    writer.finish_stage("embed", facts)


@contextlib.contextmanager
def _num_threads(num: int) -> Iterator[None]:
    """Limit torch to `num` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def embed_scans(
    model: Autoencoder,
    thumbnails: Thumbnails,
    num_scans: int,
    *,
    advance: Advance = lambda _: None,
) -> NDArray[np.float32]:
    """(num_scans, latent) embeddings, one scan at a time: a batch could change the last bits."""
    model.eval()
    load = reduced_loader(thumbnails, kept=0)
    embedding = np.empty((num_scans, model.latent), np.float32)
    with torch.no_grad():
        for row in range(num_scans):
            embedding[row] = model.encode(load(np.array([row])))[0].numpy()
            advance(1)
    return embedding
