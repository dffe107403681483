"""The losses of users' tasks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits (n, outputs, ...) and truth (n, ...)."""


def make_loss(kind: str, *, segments: bool) -> Loss:
    """The loss of that name (see `FinetuneConfig.loss`), computed in float32.

    Dice is soft, of all classes but the first, over the batch as a whole: a patch that holds none
    of a class says little alone.
    """
    if kind == "auto":
        kind = "dice" if segments else "cross-entropy"
    if kind == "cross-entropy":
        return cross_entropy
    if kind == "dice":
        return dice_loss
    return lambda logits, truth: dice_loss(logits, truth) + cross_entropy(logits, truth)


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary where there is one output."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), truth.float())
    return F.cross_entropy(logits.float(), truth.long())


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Soft Dice."""
    from monai.losses.dice import DiceLoss  # seconds to import

    one = logits.shape[1] == 1
    loss = DiceLoss(
        include_background=one, sigmoid=one, softmax=not one, to_onehot_y=not one, batch=True
    )
    wanted = truth[:, None].float() if one else truth[:, None].long()
    found: Tensor = loss(logits.float(), wanted)
    return found
