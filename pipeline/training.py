"""Train the autoencoder; an interrupted training resumes with the same result.

Inputs are slightly moved, scaled and made noisy, while the target stays the scan itself: neighbours
must be alike in anatomy, not in their position on the table.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.autoencoder import Autoencoder, Thumbnails, new_autoencoder, reduced_loader
from pipeline.config import AutoencoderConfig
from pipeline.seeds import AUGMENTATION, TRAINING_ORDER, hash_seed
from store.atomic import replace_file
from store.progress import Advance

_MAX_SHIFT = (0.02, 0.05, 0.05)
_MAX_SCALE = (0.03, 0.08, 0.08)
"""z, y, x, as shares of the thumbnail: smallest along z, where a shift shows another body part."""
_MAX_GAIN, _NOISE = 0.1, 0.05
_MIN_VALIDATION_SCANS = 2
_CHECKPOINT_STEPS = 100
"""Steps between checkpoints, about: they are written between epochs."""
_CACHED_THUMBNAILS = 1024  # of 64 KiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Result of training: mean squared errors of reduced thumbnails, whose values are in [0, 1]."""

    epochs: int
    loss: float
    validation_loss: float

    def to_facts(self) -> dict[str, Any]:
        """As the store's attribute has them; it calls the validation loss `held_out_loss`."""
        return {"epochs": self.epochs, "loss": self.loss, "held_out_loss": self.validation_loss}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Training:
        return cls(
            epochs=facts["epochs"], loss=facts["loss"], validation_loss=facts["held_out_loss"]
        )


def train_autoencoder(
    thumbnails: Thumbnails,
    *,
    train: NDArray[Any],
    validation: NDArray[Any],
    config: AutoencoderConfig,
    seed: int,
    checkpoint: Path,
    advance: Advance = lambda _: None,
) -> tuple[Autoencoder, Training]:
    """Fit to the training scans; returns the weights with the lowest validation loss.

    validation
        Scans for the validation loss; where there are fewer than two, the training scans count too.
    checkpoint
        Written about every 100 steps, between epochs; an interrupted training resumes from it, with
        the same result.
    advance
        Counts steps.
    """
    if len(validation) < _MIN_VALIDATION_SCANS:
        validation = np.concatenate([validation, train])
    load = reduced_loader(thumbnails, kept=_CACHED_THUMBNAILS)
    run = _Run(config, seed, checkpoint)
    while not run.is_over():
        order = np.random.default_rng([seed, TRAINING_ORDER, run.epoch]).permutation(train)
        losses = []
        run.model.train()
        for start in range(0, len(order), config.batch_size):
            if run.step == config.max_steps:
                break
            target = load(np.sort(order[start : start + config.batch_size]))  # (n, 1, 16, 32, 32)
            generator = torch.Generator().manual_seed(hash_seed(seed, AUGMENTATION, run.step))
            loss = torch.nn.functional.mse_loss(run.model(_augment(target, generator)), target)
            run.optimiser.zero_grad()
            loss.backward()
            run.optimiser.step()
            losses.append(float(loss.detach()))
            run.step += 1
        run.end_epoch(losses, _evaluate(run.model, load, validation, config.batch_size))
        advance(len(losses))
    return run.best()


class _Run:
    """A training between two epochs: model, optimiser, the best weights; saved in a checkpoint."""

    def __init__(self, config: AutoencoderConfig, seed: int, checkpoint: Path) -> None:
        """Start, or resume from the checkpoint where it exists."""
        self.config, self.checkpoint = config, checkpoint
        self.model = new_autoencoder(config, seed)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimiser, factor=0.5, patience=config.lr_patience
        )
        self.epoch = self.step = self.epochs_since_best = 0
        self.best_weights: dict[str, Tensor] = {}
        self.best_training: Training | None = None
        if checkpoint.exists():
            self._load()

    def is_over(self) -> bool:
        return (
            self.epoch >= self.config.max_epochs
            or self.step >= self.config.max_steps
            or self.epochs_since_best >= self.config.patience
        )

    def end_epoch(self, losses: list[float], validation_loss: float) -> None:
        """Adapt the learning rate, keep the best weights, write a checkpoint now and then.

        losses
            Of the epoch's steps.
        """
        self.plateau.step(validation_loss)
        self.epoch += 1
        self.epochs_since_best += 1
        if self.best_training is None or validation_loss < self.best_training.validation_loss:
            self.epochs_since_best = 0
            self.best_training = Training(
                epochs=self.epoch, loss=float(np.mean(losses)), validation_loss=validation_loss
            )
            self.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        if self.step // _CHECKPOINT_STEPS > (self.step - len(losses)) // _CHECKPOINT_STEPS:
            self._save()

    def best(self) -> tuple[Autoencoder, Training]:
        """The model with the best weights, ready for inference, and their losses."""
        assert self.best_training is not None  # at least one epoch was trained
        self.model.load_state_dict(self.best_weights)
        return self.model.eval(), self.best_training

    def _save(self) -> None:
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "since_best": self.epochs_since_best,
            "best": self.best_weights or None,
            "training": self.best_training and self.best_training.to_facts(),
        }
        packed = io.BytesIO()  # torch's own writer does not say why a file cannot be written
        content = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "plateau": self.plateau.state_dict(),
            "state": state,
        }
        torch.save(content, packed)
        with replace_file(self.checkpoint) as partial:
            partial.write_bytes(packed.getvalue())

    def _load(self) -> None:
        saved = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.plateau.load_state_dict(saved["plateau"])
        state = saved["state"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.epochs_since_best = state["since_best"]
        self.best_weights = state["best"]
        self.best_training = Training.from_facts(state["training"])


def steps_done(checkpoint: Path) -> int:
    """Steps of an interrupted training from which `train_autoencoder` resumes."""
    if not checkpoint.exists():
        return 0
    return int(torch.load(checkpoint, weights_only=True)["state"]["step"])


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
    """Mean squared error over some rows of the thumbnails."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch):
        image = load(rows[start : start + batch])
        total += float(torch.nn.functional.mse_loss(model(image), image)) * len(image)
    return total / len(rows)


@contextlib.contextmanager
def num_torch_threads(num: int) -> Iterator[None]:
    """Limit torch to `num` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
