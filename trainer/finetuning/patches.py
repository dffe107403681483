"""Batches of labeled patches; each patch depends on seed, epoch and row alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.readahead import read_ahead
from trainer.finetuning.cases import Prepared
from trainer.finetuning.config import FinetuneConfig
from trainer.seeds import derive_seeds


@dataclass(frozen=True, slots=True)
class Examples:
    """Patches or images of one optimiser step, on the CPU."""

    index: int
    """Position in the epoch, from 0."""
    images: Tensor
    """(n, 1, Z, Y, X) float16, as the net sees them."""
    truths: Tensor
    """(n, Z, Y, X) uint8 class of each voxel, or (n,) int64 class of each image."""

    def __len__(self) -> int:
        return len(self.images)


class Patches:
    """Batches of patches, or of complete images, of some cases."""

    def __init__(
        self, cases: Sequence[Prepared], config: FinetuneConfig, *, segments: bool, role: str
    ) -> None:
        """Draw from `cases`.

        segments
            Draw `patches_per_case` patches of each case and epoch, instead of complete images.
        role
            "train" draws different patches in each epoch; any other role draws the same patches
            each time, in order.
        """
        self.cases, self.config, self.segments = cases, config, segments
        self.role, self._is_train = role, role == "train"
        self._flip_probability = 0.5 if config.mirror and self._is_train else 0.0  # for each axis

    @property
    def num_examples(self) -> int:
        """Patches or images of an epoch."""
        return len(self.cases) * (self.config.patches_per_case if self.segments else 1)

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return math.ceil(self.num_examples / self.config.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Examples]:
        """The batches of one epoch in order, from batch `start` on; the last may be smaller."""
        epoch = epoch if self._is_train else 0
        order = np.arange(self.num_examples)
        if self._is_train:
            np.random.default_rng(derive_seeds(self.config.seed, "order", epoch)).shuffle(order)
        size = self.config.batch_size

        def read(index: int) -> Examples:
            return self._read(index, order[index * size : (index + 1) * size], epoch)

        return read_ahead(read, range(start, len(self)), threads=self.config.threads)

    def _read(self, index: int, rows: NDArray[np.int64], epoch: int) -> Examples:
        """Draw the examples of these rows."""
        images = np.zeros((len(rows), 1, *self.config.shape), np.float16)
        truths: NDArray[Any] = (
            np.zeros((len(rows), *self.config.shape), np.uint8)
            if self.segments
            else np.zeros(len(rows), np.int64)
        )
        for number, row in enumerate(rows.tolist()):
            rng = np.random.default_rng(derive_seeds(self.config.seed, self.role, epoch, row))
            case = self.cases[row % len(self.cases)]
            axes = tuple(np.flatnonzero(rng.random(3) < self._flip_probability).tolist())
            if self.segments:
                self._cut(case, rng, images[number, 0], truths[number])
                truths[number] = np.flip(truths[number], axes)
            else:
                images[number, 0] = case.image
                truths[number] = case.case.label
            images[number, 0] = np.flip(images[number, 0], axes)
        return Examples(index, torch.from_numpy(images), torch.from_numpy(truths))

    def _cut(
        self,
        case: Prepared,
        rng: np.random.Generator,
        image: NDArray[np.float16],
        truth: NDArray[np.uint8],
    ) -> None:
        """Fill one patch; a case that is smaller than the patch is surrounded by zeros.

        Among z-scores, zero is the mean of the image, as in nnU-Net.
        """
        full, mask, foreground = case.image, case.mask, case.foreground
        shape = np.array(self.config.shape)
        spare = np.array(full.shape) - shape
        if rng.random() < self.config.foreground and len(foreground):
            low = foreground[rng.integers(len(foreground))] - shape // 2
        else:
            low = rng.integers(np.minimum(spare, 0), np.maximum(spare, 0) + 1)
        low = np.where(spare >= 0, np.clip(low, 0, np.maximum(spare, 0)), spare // 2)
        source = tuple(
            slice(max(0, a), min(n, a + side))
            for a, side, n in zip(low.tolist(), shape.tolist(), full.shape, strict=True)
        )
        target = tuple(
            slice(s.start - a, s.stop - a) for s, a in zip(source, low.tolist(), strict=True)
        )
        image[target] = full[source]
        truth[target] = mask[source]
