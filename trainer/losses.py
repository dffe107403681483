"""Losses of the pretraining tasks, their weighted sum, and means over examples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.ranks import Ranks


def restoration_loss(restored: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all voxels, in float32 at every precision of the net."""
    return F.mse_loss(restored.float(), target)


def masked_loss(restored: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the voxels where `mask` is true, in float32; all (n, 1, Z, Y, X).

    The mean of each crop's own mean: crops weigh the same, however many voxels they hide. Every
    crop must hide at least one.
    """
    squares = (restored.float() - target).square() * mask
    return (squares.flatten(1).sum(1) / mask.flatten(1).sum(1)).mean()


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (n, classes) logits and (n,) labels, in float32."""
    return F.cross_entropy(logits.float(), labels)


def weigh(
    pretext: Tensor | None,
    classification: Tensor | None,
    *,
    pretext_weight: float,
    classification_weight: float,
) -> Tensor:
    """The weighted sum of both losses, or the only one unweighted."""
    if pretext is None:
        assert classification is not None
        return classification
    if classification is None:
        return pretext
    return pretext_weight * pretext + classification_weight * classification


class Means:
    """Running means of losses, summed on the device so that the CPU never waits for a GPU."""

    def __init__(
        self,
        device: torch.device,
        sums: dict[str, float] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Start at zero, or from what `sums` returned earlier.

        ranks
            Processes that add to the same means; all of them must call `sums` and `values`.
        """
        self._device, self._ranks = device, ranks or Ranks()
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in (sums or {}).items()
        }

    def add(self, values: dict[str, Tensor], num: int) -> None:
        """Add the mean losses of `num` more examples."""
        for name, value in {**values, "num": torch.ones((), device=self._device)}.items():
            part = value.detach().double().to(self._device) * num
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def sums(self) -> dict[str, float]:
        """Sums by name, and the number of examples as "num"; a new object can start from these."""
        names = self._ranks.union(list(self._sums))
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        if not names:
            return {}
        total = self._ranks.sum(torch.stack([self._sums.get(name, zero) for name in names]))
        return dict(zip(names, total.tolist(), strict=True))

    def values(self) -> dict[str, float]:
        """Means by name; empty when nothing was added."""
        sums = self.sums()
        num = sums.pop("num", 1.0)
        return {name: value / num for name, value in sums.items()}
