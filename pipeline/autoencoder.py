"""A small 3-D autoencoder on thumbnails; its latent vector gives the embedding of a scan.

It restores its input under MSE (the paper, section 2.1). It works on thumbnails averaged over
blocks of 4 x 4 x 4, without skip connections: all that is restored passes the bottleneck.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.config import AutoencoderConfig
from pipeline.errors import PrepareError
from pipeline.seeds import INITIAL_WEIGHTS, hash_seed
from store.atomic import replace_file
from store.format import AUTOENCODER_FILE, THUMBNAIL_SHAPE

_REDUCTION = 4
_LEVELS = 3
_NORM_GROUPS = 4
_METADATA, _VERSION = "semgen-autoencoder", 2

Thumbnails = Callable[[NDArray[Any]], NDArray[np.uint8]]
"""Read rows (n,) -> (n, 64, 128, 128) uint8."""


class Autoencoder(nn.Module):
    """Reduced thumbnails (n, 1, 16, 32, 32) float32 in [0, 1] -> (n, latent) -> themselves.

    Three strided convolutions bring the grid to (2, 4, 4); one linear layer makes the latent.
    """

    centre: Tensor
    """(latent,) float32, mean latent vector of the training scans; 0 until it is set."""

    def __init__(self, *, latent: int, width: int) -> None:
        super().__init__()
        self.latent, self.width = latent, width
        widths = [width * 2**level for level in range(_LEVELS)]
        grid = [n // _REDUCTION // 2**_LEVELS for n in THUMBNAIL_SHAPE]
        self._bottom = (widths[-1], *grid)
        numbers = widths[-1] * grid[0] * grid[1] * grid[2]
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for channels_in, channels_out in zip([1, *widths[:-1]], widths, strict=True):
            encoder += [
                nn.Conv3d(channels_in, channels_out, 3, stride=2, padding=1),
                nn.GroupNorm(_NORM_GROUPS, channels_out),
                nn.SiLU(),
            ]
        for channels_in, channels_out in zip(widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [
                nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
                nn.Conv3d(channels_in, channels_out, 3, padding=1),
                nn.GroupNorm(_NORM_GROUPS, channels_out),
                nn.SiLU(),
            ]
        decoder += [
            nn.Conv3d(widths[0], 1, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        ]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(numbers, latent))
        self.expand = nn.Linear(latent, numbers)
        self.decoder = nn.Sequential(*decoder)
        self.register_buffer("centre", torch.zeros(latent))

    @staticmethod
    def reduce(thumbnail: Tensor) -> Tensor:
        """(n, 1, 64, 128, 128) -> (n, 1, 16, 32, 32), block means."""
        return nn.functional.avg_pool3d(thumbnail, _REDUCTION)

    def encode(self, reduced: Tensor) -> Tensor:
        latent: Tensor = self.encoder(reduced)  # (n, latent)
        return latent

    def forward(self, reduced: Tensor) -> Tensor:
        bottom = self.expand(self.encode(reduced)).unflatten(1, self._bottom)  # (n, C, 2, 4, 4)
        restored: Tensor = self.decoder(bottom)
        return restored  # (n, 1, 16, 32, 32)


def new_autoencoder(config: AutoencoderConfig, seed: int) -> Autoencoder:
    """An untrained autoencoder; does not change the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed(seed, INITIAL_WEIGHTS))
        return Autoencoder(latent=config.latent, width=config.width)


def save_autoencoder(model: Autoencoder, file: Path) -> None:
    """Write weights and centre as safetensors."""
    facts = {"version": _VERSION, "latent": model.latent, "width": model.width}
    metadata = {_METADATA: json.dumps(facts)}
    with replace_file(file) as partial:
        partial.write_bytes(save(model.state_dict(), metadata=metadata))


def load_autoencoder(file: Path) -> Autoencoder:
    """Read what `save_autoencoder` wrote; PrepareError for any other file."""
    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
            facts = json.loads(metadata[_METADATA])
            model = Autoencoder(latent=facts["latent"], width=facts["width"])
            tensors = {name: handle.get_tensor(name) for name in list(handle.keys())}
        version = facts.get("version", 1)
        if version == _VERSION:
            model.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PrepareError(
            f"{file}: not an autoencoder that semgen wrote; give a store or its {AUTOENCODER_FILE}"
        ) from error
    if version != _VERSION:
        raise PrepareError(
            f"{file}: autoencoder of another version of semgen (format {version}, expected"
            f" {_VERSION}); train a new one by leaving out --autoencoder"
        )
    return model.eval()


def reduced_loader(thumbnails: Thumbnails, *, kept: int) -> Callable[[NDArray[Any]], Tensor]:
    """Rows (n,) -> (n, 1, 16, 32, 32), the model's input; the last `kept` need no reading."""
    # one buffer for all scans: a new one for each would fragment memory, by several MiB a scan
    image = torch.empty(1, 1, *THUMBNAIL_SHAPE)

    @lru_cache(maxsize=kept)
    def load_one(row: int) -> Tensor:
        image.copy_(torch.from_numpy(thumbnails(np.array([row]))).unsqueeze(1))
        return Autoencoder.reduce(image.div_(255))

    return lambda rows: torch.cat([load_one(int(row)) for row in rows])
