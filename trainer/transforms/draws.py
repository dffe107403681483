"""Random numbers of a batch: every crop has its own, keyed by seed, role and row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor

from trainer.seeds import derive_seeds


class Draws:
    """Random numbers for the crops of a batch: decisions on the CPU, noise on the device.

    Each crop has its own generators. Methods return (n, *shape) for n crops.
    """

    def __init__(self, host: Sequence[Generator], noise: Sequence[Generator]) -> None:
        self._host, self._noise = host, noise
        self.device = noise[0].device if noise else torch.device("cpu")

    @classmethod
    def keyed(
        cls,
        seed: int,
        role: str,
        *index: int,
        rows: Iterable[int],
        device: torch.device | str = "cpu",
    ) -> Draws:
        """Draws for the crops of these rows; each depends on (seed, role, index, row) alone.

        Noise also depends on the kind of device: CPU and GPU have different generators.
        """
        host, noise = [], []
        for row in rows:
            host_seed, noise_seed = derive_seeds(seed, role, *index, int(row))
            host.append(Generator().manual_seed(host_seed))
            noise.append(Generator(device).manual_seed(noise_seed))
        return cls(host, noise)

    def __len__(self) -> int:
        return len(self._host)

    def of(self, members: Iterable[int]) -> Draws:
        """The draws of some of the crops; they share generators with these draws."""
        chosen = list(members)
        return Draws([self._host[i] for i in chosen], [self._noise[i] for i in chosen])

    def integers(self, low: Tensor | int, high: Tensor | int, *shape: int) -> Tensor:
        """Integers from low to high, both included, int64, on the CPU; the bounds broadcast."""
        span = torch.as_tensor(high) - low + 1
        return low + (self.uniform(*shape) * span).long()

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float64, on the CPU."""
        found = torch.empty((len(self), *shape), dtype=torch.float64)
        for part, generator in zip(found, self._host, strict=True):
            part.uniform_(generator=generator)
        return found

    def noise(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32, on the device."""
        found = torch.empty((len(self), *shape), device=self.device)
        for part, generator in zip(found, self._noise, strict=True):
            part.uniform_(generator=generator)
        return found

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32, on the device."""
        found = torch.empty((len(self), *shape), device=self.device)
        for part, generator in zip(found, self._noise, strict=True):
            part.normal_(generator=generator)
        return found

    def bits(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to high - 1, int32, on the device."""
        found = torch.empty((len(self), *shape), dtype=torch.int32, device=self.device)
        for part, generator in zip(found, self._noise, strict=True):
            part.random_(0, high, generator=generator)
        return found
