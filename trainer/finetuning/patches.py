"""Batches of labeled patches: what is drawn follows from seed, epoch and place alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.plan import derive_seeds
from trainer.finetuning.cases import Prepared
from trainer.finetuning.config import FinetuneConfig


@dataclass(frozen=True, slots=True)
class Examples:
    """What one optimiser step learns from, on the host."""

    index: int
    """Place in the epoch, from 0."""
    images: Tensor
    """(n, 1, Z, Y, X) float16 in [0, 1]."""
    truths: Tensor
    """(n, Z, Y, X) uint8 class of each voxel, or (n,) int64 class of each image."""

    def __len__(self) -> int:
        return len(self.images)


class Patches:
    """Endless epochs of patches, or whole images, of some cases."""

    def __init__(
        self, cases: Sequence[Prepared], config: FinetuneConfig, *, segments: bool, role: str
    ) -> None:
        """Draw from `cases`.

        segments
            Draw `patches_per_case` patches of each case an epoch, instead of each whole.
        role
            "train" draws anew each epoch; any other always the same, in order.
        """
        self.cases, self.config, self.segments = cases, config, segments
        self.role, self._is_train = role, role == "train"
        self._mirrored = 0.5 if config.mirror and self._is_train else 0.0  # of examples, an axis

    @property
    def num_examples(self) -> int:
        """Of an epoch."""
        return len(self.cases) * (self.config.patches_per_case if self.segments else 1)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return math.ceil(self.num_examples / self.config.batch_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Examples]:
        """Batches from the `start`-th on; the last may be smaller."""
        epoch = epoch if self._is_train else 0
        order = np.arange(self.num_examples)
        if self._is_train:
            np.random.default_rng(derive_seeds(self.config.seed, "order", epoch)).shuffle(order)
        size = self.config.batch_size
        ahead: deque[Future[Examples]] = deque()
        with ThreadPoolExecutor(self.config.threads) as pool:
            for index in range(start, len(self)):
                rows = order[index * size : (index + 1) * size]
                ahead.append(pool.submit(self._read, index, rows, epoch))
                if len(ahead) > 2 * self.config.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _read(self, index: int, rows: NDArray[np.int64], epoch: int) -> Examples:
        images = np.zeros((len(rows), 1, *self.config.shape), np.float16)
        truths: NDArray[Any] = (
            np.zeros((len(rows), *self.config.shape), np.uint8)
            if self.segments
            else np.zeros(len(rows), np.int64)
        )
        for place, row in enumerate(rows.tolist()):
            rng = np.random.default_rng(derive_seeds(self.config.seed, self.role, epoch, row))
            case = self.cases[row % len(self.cases)]
            axes = tuple(np.flatnonzero(rng.random(3) < self._mirrored).tolist())
            if self.segments:
                self._cut(case, rng, images[place, 0], truths[place])
                truths[place] = np.flip(truths[place], axes)
            else:
                images[place, 0] = case.image
                truths[place] = case.case.label
            images[place, 0] = np.flip(images[place, 0], axes)
        return Examples(index, torch.from_numpy(images), torch.from_numpy(truths))

    def _cut(
        self,
        case: Prepared,
        rng: np.random.Generator,
        image: NDArray[np.float16],
        truth: NDArray[np.uint8],
    ) -> None:
        """Fill one patch; where a case is smaller than it, zeros surround the case."""
        whole, mask, foreground = case.image, case.mask, case.foreground
        shape = np.array(self.config.shape)
        room = np.array(whole.shape) - shape
        if rng.random() < self.config.foreground and len(foreground):
            low = foreground[rng.integers(len(foreground))] - shape // 2
        else:
            low = rng.integers(np.minimum(room, 0), np.maximum(room, 0) + 1)
        low = np.where(room >= 0, np.clip(low, 0, np.maximum(room, 0)), room // 2)
        source = tuple(
            slice(max(0, a), min(n, a + side))
            for a, side, n in zip(low.tolist(), shape.tolist(), whole.shape, strict=True)
        )
        target = tuple(
            slice(s.start - a, s.stop - a) for s, a in zip(source, low.tolist(), strict=True)
        )
        image[target] = whole[source]
        truth[target] = mask[source]
