"""Stage embed: train the autoencoder on a store's thumbnails, and embed every scan.

One process and a fixed number of threads, so that weights and embeddings are the same bytes
whatever the workers. Inputs are slightly moved, scaled and made noisy, while the target stays the
scan itself: neighbours must be alike in anatomy, not in their position on the table.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.autoencoder import (
    Autoencoder,
    load_autoencoder,
    new_autoencoder,
    save_autoencoder,
    seed_of,
)
from pipeline.config import AutoencoderConfig, PrepareConfig
from store.atomic import replace_file
from store.format import AUTOENCODER_FILE, THUMBNAIL_SHAPE
from store.progress import Advance, Progress
from store.reader import PatchStore
from store.sharded import ShardedReader
from store.writer import StoreWriter

_ORDER_ROLE, _AUGMENT_ROLE = 11, 12
"""Random draws are keyed by (seed, role, index)."""
_MAX_SHIFT = (0.02, 0.05, 0.05)
_MAX_SCALE = (0.03, 0.08, 0.08)
"""z, y, x, as shares of the thumbnail: smallest along z, where a shift shows another body part."""
_MAX_GAIN, _NOISE = 0.1, 0.05
_MIN_HELD_OUT = 2
_CHECKPOINT_STEPS = 100
_CACHED_THUMBNAILS = 1024  # of 64 KiB

Thumbnails = Callable[[NDArray[Any]], NDArray[np.uint8]]
"""Read rows (n,) -> (n, 64, 128, 128) uint8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Result of training: mean squared errors of reduced thumbnails, whose values are in [0, 1]."""

    epochs: int
    loss: float
    held_out_loss: float


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
            train, held_out = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
            epoch_steps = -(-len(train) // settings.batch_size)
            num_steps = min(settings.max_steps, settings.max_epochs * epoch_steps)
            done = steps_done(checkpoint)
            with progress.stage("embed", num_steps, "steps", done=done) as advance:
                model, training = train_autoencoder(
                    read,
                    train=train,
                    held_out=held_out,
                    config=settings,
                    seed=config.seed,
                    checkpoint=checkpoint,
                    advance=advance,
                )
                embedding = embed_scans(model, read, len(split))
            facts = asdict(training)
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


def train_autoencoder(
    thumbnails: Thumbnails,
    *,
    train: NDArray[Any],
    held_out: NDArray[Any],
    config: AutoencoderConfig,
    seed: int,
    checkpoint: Path,
    advance: Advance = lambda _: None,
) -> tuple[Autoencoder, Training]:
    """Fit to the training scans; returns the weights with the lowest held-out loss.

    held_out
        Scans for the held-out loss; where there are fewer than two, the training scans count too.
    checkpoint
        Written at times, between epochs; an interrupted training resumes from it, with the same
        result.
    advance
        Counts steps.
    """
    load = _loader(thumbnails, kept=_CACHED_THUMBNAILS)
    model = new_autoencoder(config, seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=config.lr_patience
    )
    evaluated = held_out if len(held_out) >= _MIN_HELD_OUT else np.concatenate([held_out, train])
    state: dict[str, Any] = {"epoch": 0, "step": 0, "since_best": 0, "best": None, "training": None}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        plateau.load_state_dict(saved["plateau"])
        state = saved["state"]
    while (
        state["epoch"] < config.max_epochs
        and state["step"] < config.max_steps
        and state["since_best"] < config.patience
    ):
        epoch = state["epoch"]
        order = np.random.default_rng([seed, _ORDER_ROLE, epoch]).permutation(train)
        losses = []
        model.train()
        for start in range(0, len(order), config.batch_size):
            if state["step"] == config.max_steps:
                break
            target = load(np.sort(order[start : start + config.batch_size]))
            generator = _generator(seed, _AUGMENT_ROLE, state["step"])
            loss = torch.nn.functional.mse_loss(model(_augment(target, generator)), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
            state["step"] += 1
        held_out_loss = _evaluate(model, load, evaluated, config.batch_size)
        plateau.step(held_out_loss)
        now = Training(epochs=epoch + 1, loss=float(np.mean(losses)), held_out_loss=held_out_loss)
        state["epoch"] += 1
        state["since_best"] += 1
        best = state["training"]
        if best is None or held_out_loss < best["held_out_loss"]:
            state["since_best"] = 0
            state["training"] = asdict(now)
            state["best"] = {k: v.clone() for k, v in model.state_dict().items()}
        if state["step"] // _CHECKPOINT_STEPS > (state["step"] - len(losses)) // _CHECKPOINT_STEPS:
            _save_checkpoint(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "plateau": plateau.state_dict(),
                    "state": state,
                },
            )
        advance(len(losses))
    model.load_state_dict(state["best"])
    return model.eval(), Training(**state["training"])


def steps_done(checkpoint: Path) -> int:
    """Steps of an interrupted training from which `train_autoencoder` resumes."""
    if not checkpoint.exists():
        return 0
    return int(torch.load(checkpoint, weights_only=True)["state"]["step"])


def embed_scans(
    model: Autoencoder,
    thumbnails: Thumbnails,
    num_scans: int,
    *,
    advance: Advance = lambda _: None,
) -> NDArray[np.float32]:
    """(num_scans, latent) embeddings, one scan at a time: a batch could change the last bits."""
    model.eval()
    load = _loader(thumbnails, kept=0)
    embedding = np.empty((num_scans, model.latent), np.float32)
    with torch.no_grad():
        for row in range(num_scans):
            embedding[row] = model.encode(load(np.array([row])))[0].numpy()
            advance(1)
    return embedding


def _loader(thumbnails: Thumbnails, *, kept: int) -> Callable[[NDArray[Any]], Tensor]:
    """Rows (n,) -> (n, 1, 16, 32, 32), the model's input; the last `kept` need no reading."""
    # one buffer for all scans: a new one for each would fragment memory, by several MiB a scan
    image = torch.empty(1, 1, *THUMBNAIL_SHAPE)

    @lru_cache(maxsize=kept)
    def load_one(row: int) -> Tensor:
        image.copy_(torch.from_numpy(thumbnails(np.array([row]))).unsqueeze(1))
        return Autoencoder.reduce(image.div_(255))

    return lambda rows: torch.cat([load_one(int(row)) for row in rows])


def _augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move and scale the images slightly, change their gain, add noise."""
    n = len(image)
    shift, scale = (torch.tensor(limit[::-1]) for limit in (_MAX_SHIFT, _MAX_SCALE))  # x, y, z

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    affine = torch.zeros(n, 3, 4)
    affine[:, :, :3] = torch.diag_embed(1 + scale * draw(n, 3))
    affine[:, :, 3] = 2 * shift * draw(n, 3)
    grid = torch.nn.functional.affine_grid(affine, list(image.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    gain = 1 + _MAX_GAIN * draw(n, 1, 1, 1, 1)
    return moved * gain + _NOISE * torch.randn(image.shape, generator=generator)


@torch.no_grad()
def _evaluate(
    model: Autoencoder, load: Callable[[NDArray[Any]], Tensor], rows: NDArray[Any], batch: int
) -> float:
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch):
        image = load(rows[start : start + batch])
        total += float(torch.nn.functional.mse_loss(model(image), image)) * len(image)
    return total / len(rows)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def _save_checkpoint(file: Path, content: dict[str, Any]) -> None:
    packed = io.BytesIO()  # torch's own writer does not say why a file cannot be written
    torch.save(content, packed)
    with replace_file(file) as partial:
        partial.write_bytes(packed.getvalue())
