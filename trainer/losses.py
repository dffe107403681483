"""The two losses of joint pretraining, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

RESTORATION_WEIGHT = 1.0
CLASSIFICATION_WEIGHT = 0.01


def restoration_loss(restored: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all voxels, in float32 whatever the network's precision."""
    return F.mse_loss(restored.float(), target)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy from logits, through log-softmax in float32."""
    return F.cross_entropy(logits.float(), labels)


def weigh(
    pretext: Tensor | None,
    classification: Tensor | None,
    *,
    pretext_weight: float = RESTORATION_WEIGHT,
    classification_weight: float = CLASSIFICATION_WEIGHT,
) -> Tensor:
    """What the optimiser sees: the weighted sum, or the only loss as it is."""
    if pretext is None:
        assert classification is not None
        return classification
    if classification is None:
        return pretext
    return pretext_weight * pretext + classification_weight * classification


class Means:
    """Means of losses over crops, summed where the batch is so that a GPU is not waited for."""

    def __init__(self, device: torch.device, sums: dict[str, float] | None = None) -> None:
        """Start at zero, or from what `sums` returned."""
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in (sums or {}).items()
        }

    def add(self, values: dict[str, Tensor], num: int) -> None:
        """Take the means of `num` more crops."""
        for name, value in {**values, "num": torch.ones(())}.items():
            part = value.detach().double() * num
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def sums(self) -> dict[str, float]:
        """Sums by name, and "num" crops: enough to go on from."""
        return {name: float(value) for name, value in self._sums.items()}

    def values(self) -> dict[str, float]:
        """The means; empty when nothing was added."""
        sums = self.sums()
        num = sums.pop("num", 1.0)
        return {name: value / num for name, value in sums.items()}
