"""Train the autoencoder on a store's thumbnails and embed every scan.

One process and a fixed number of threads, so that weights and embeddings are the same bytes
whatever the workers. Inputs are slightly moved, scaled and noised while the target stays the
scan itself: neighbours must be alike in anatomy, not in how they lay on the table.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig
from store.errors import ConfigError
from store.format import AUTOENCODER_FILE, THUMBNAIL_SHAPE

_ORDER, _AUGMENT, _INIT = 11, 12, 13
_MOST_SHIFT = (0.02, 0.05, 0.05)
_MOST_SCALE = (0.03, 0.08, 0.08)
"""z, y, x, as shares of the thumbnail: least along z, where a shift is another part of a body."""
_MOST_GAIN, _NOISE = 0.1, 0.05
_LEAST_HELD_OUT = 2
_CHECKPOINT_STEPS = 100
_CACHED_THUMBNAILS = 1024  # of 64 KiB

Thumbnails = Callable[[NDArray[Any]], NDArray[np.uint8]]
"""Read rows (n,) -> (n, 64, 128, 128) uint8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How training went: mean squared errors of thumbnails in [0, 1], on the halved-twice grid."""

    epochs: int
    loss: float
    held_out_loss: float


def train_autoencoder(
    thumbnails: Thumbnails,
    *,
    train: NDArray[Any],
    held_out: NDArray[Any],
    config: AutoencoderConfig,
    seed: int,
    checkpoint: Path,
    progress: Callable[[int, Training], None] = lambda *_: None,
) -> tuple[Autoencoder, Training]:
    """Fit to the training scans, keep the weights with the least held-out loss.

    checkpoint
        Written now and then, between epochs; a killed training resumes from it and ends the same.
    held_out
        Scans to judge by; where there are none, the training scans, unaugmented.
    """
    load = _loader(thumbnails, kept=_CACHED_THUMBNAILS)
    model = new_autoencoder(config, seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, factor=0.5, patience=config.lr_patience
    )
    judged_by = held_out if len(held_out) >= _LEAST_HELD_OUT else np.concatenate([held_out, train])
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
        order = np.random.default_rng([seed, _ORDER, epoch]).permutation(train)
        losses = []
        model.train()
        for start in range(0, len(order), config.batch_size):
            if state["step"] == config.max_steps:
                break
            target = load(np.sort(order[start : start + config.batch_size]))
            generator = _generator(seed, _AUGMENT, state["step"])
            loss = torch.nn.functional.mse_loss(model(_disturb(target, generator)), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
            state["step"] += 1
        held_out_loss = _evaluate(model, load, judged_by, config.batch_size)
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
        progress(len(losses), now)
    model.load_state_dict(state["best"])
    return model.eval(), Training(**state["training"])


def steps_done(checkpoint: Path) -> int:
    """Steps of an interrupted training that `train_autoencoder` will not repeat."""
    if not checkpoint.exists():
        return 0
    return int(torch.load(checkpoint, weights_only=True)["state"]["step"])


def new_autoencoder(config: AutoencoderConfig, seed: int) -> Autoencoder:
    """An untrained autoencoder; global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_entropy(seed, _INIT))
        return Autoencoder(latent=config.latent, width=config.width)


def embed(
    model: Autoencoder,
    thumbnails: Thumbnails,
    num_scans: int,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """(num_scans, latent) embeddings, scan by scan, so that no batch shapes the last bits."""
    model.eval()
    load = _loader(thumbnails, kept=0)
    embedding = np.empty((num_scans, model.latent), np.float32)
    with torch.no_grad():
        for row in range(num_scans):
            embedding[row] = model.encode(load(np.array([row])))[0].numpy()
            progress(1)
    return embedding


def save_autoencoder(model: Autoencoder, file: Path) -> None:
    """Write weights as safetensors (temporary name, then rename)."""
    partial = file.with_suffix(".partial")
    shape = {"latent": model.latent, "width": model.width}
    metadata = {"semgen-autoencoder": json.dumps(shape)}
    partial.write_bytes(save(model.state_dict(), metadata=metadata))
    os.replace(partial, file)


def load_autoencoder(file: Path) -> Autoencoder:
    """Read weights that `save_autoencoder` wrote; ConfigError when the file is something else."""
    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
            shape = json.loads(metadata["semgen-autoencoder"])
            model = Autoencoder(latent=shape["latent"], width=shape["width"])
            model.load_state_dict({name: handle.get_tensor(name) for name in list(handle.keys())})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{file}: not an autoencoder that semgen wrote; give a store, or its {AUTOENCODER_FILE}"
        ) from error
    return model.eval()


def _loader(thumbnails: Thumbnails, *, kept: int) -> Callable[[NDArray[Any]], Tensor]:
    """Rows (n,) -> (n, 1, 16, 32, 32), the model's input; the last `kept` need no reading."""
    # one buffer for all: fresh ones, large, between the small tensors that stay, would leave holes
    # in memory that nothing fits into, several MiB a scan
    image = torch.empty(1, 1, *THUMBNAIL_SHAPE)

    @lru_cache(maxsize=kept)
    def load_one(row: int) -> Tensor:
        image.copy_(torch.from_numpy(thumbnails(np.array([row]))).unsqueeze(1))
        return Autoencoder.reduce(image.div_(255))

    return lambda rows: torch.cat([load_one(int(row)) for row in rows])


def _disturb(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move and scale a little, change gain, add noise."""
    n = len(image)
    shift, scale = (torch.tensor(most[::-1]) for most in (_MOST_SHIFT, _MOST_SCALE))  # x, y, z

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    affine = torch.zeros(n, 3, 4)
    affine[:, :, :3] = torch.diag_embed(1 + scale * draw(n, 3))
    affine[:, :, 3] = 2 * shift * draw(n, 3)
    grid = torch.nn.functional.affine_grid(affine, list(image.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    gain = 1 + _MOST_GAIN * draw(n, 1, 1, 1, 1)
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
    return torch.Generator().manual_seed(_entropy(*key))


def _entropy(*key: int) -> int:
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _save_checkpoint(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    packed = io.BytesIO()  # torch's own writer does not say why a file cannot be written
    torch.save(content, packed)
    partial.write_bytes(packed.getvalue())
    os.replace(partial, file)
