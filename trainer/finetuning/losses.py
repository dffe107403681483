"""Losses of fine-tuning: soft Dice and cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes logits (n, outputs, ...) and truth (n, ...)."""


def make_loss(kind: str, *, segments: bool, ignored: int | None = None) -> Loss:
    """The loss of a name (see `FinetuneConfig.loss`), computed in float32.

    Soft Dice is computed over all voxels of the batch together, because a single patch may have no
    voxel of a class, and averaged over all classes but the first.

    ignored
        Label value of voxels to leave out of the loss.
    """
    if kind == "auto":
        kind = "dice" if segments else "cross-entropy"
    dice = partial(dice_loss, ignored=ignored)
    entropy = partial(cross_entropy, ignored=ignored)
    if kind == "cross-entropy":
        return entropy
    if kind == "dice":
        return dice
    return lambda logits, truth: dice(logits, truth) + entropy(logits, truth)


def cross_entropy(logits: Tensor, truth: Tensor, ignored: int | None = None) -> Tensor:
    """Mean cross-entropy; binary where there is one output."""
    if ignored is not None:
        known = truth != ignored
        logits, truth = logits.movedim(1, -1)[known], truth[known]  # (voxels, outputs), (voxels,)
        if not len(truth):
            return logits.float().sum()  # zero, and it has gradients
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), truth.float())
    return F.cross_entropy(logits.float(), truth.long())


def dice_loss(logits: Tensor, truth: Tensor, ignored: int | None = None) -> Tensor:
    """One minus soft Dice, of (n, outputs, Z, Y, X) logits and (n, Z, Y, X) classes."""
    from monai.losses.dice import DiceLoss  # seconds to import

    outputs = logits.shape[1]
    if outputs == 1:
        found, wanted = logits.float().sigmoid(), truth[:, None].float()
    else:
        found = logits.float().softmax(1)
        classes = torch.arange(outputs, device=truth.device)
        wanted = (truth[..., None] == classes).movedim(-1, 1).float()
    if ignored is not None:
        known = (truth != ignored)[:, None]
        found, wanted = found * known, wanted * known
    loss: Tensor = DiceLoss(include_background=outputs == 1, batch=True)(found, wanted)
    return loss
