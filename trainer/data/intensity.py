"""Z-scores: a crop's HU, less the mean of its scan, over the standard deviation of its scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ZScores:
    """Maps crops from [0, 1] (the HU window) to z-scores of their scans, and back.

    Perturbations work on [0, 1], so crops are mapped after them.
    """

    gain: Tensor
    """(n, 1, 1, 1, 1) z-scores from one end of the window to the other."""
    offset: Tensor
    """(n, 1, 1, 1, 1) z-score of the window's low end."""

    @classmethod
    def of_scans(cls, statistics_hu: Tensor, window_hu: tuple[float, float]) -> ZScores:
        """The z-scores of n crops.

        statistics_hu
            (n, 2) mean and standard deviation of the scan of each crop.
        window_hu
            What is mapped to 0 and 1.
        """
        mean, std = (column[:, None, None, None, None] for column in statistics_hu.unbind(1))
        low, high = window_hu
        return cls((high - low) / std, (low - mean) / std)

    def apply(self, images: Tensor) -> Tensor:
        """Crops (n, 1, Z, Y, X) in [0, 1] as z-scores."""
        return torch.addcmul(self.offset, images, self.gain)

    def undo(self, scores: Tensor) -> Tensor:
        """Z-scores (n, 1, Z, Y, X) as crops in [0, 1]; outside it beyond the window."""
        return (scores - self.offset) / self.gain
