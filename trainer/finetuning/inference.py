"""What a fine-tuned net says about whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.finetuning.cases import Grid
from trainer.finetuning.images import bring_back

_WINDOWS = 4


def to_probability(logits: Tensor) -> Tensor:
    """(n, outputs, ...) logits -> (n, classes, ...) probabilities that add up to one."""
    logits = logits.float()
    if logits.shape[1] > 1:
        return logits.softmax(1)
    positive = logits.sigmoid()
    return torch.cat((1 - positive, positive), dim=1)


@torch.no_grad()
def slide(
    net: nn.Module,
    values: NDArray[np.float16],
    shape: Sequence[int],
    *,
    overlap: float,
    device: torch.device,
    autocast: torch.autocast,
) -> NDArray[np.float32]:
    """(classes, Z, Y, X) probabilities of a whole image, (Z, Y, X) in [0, 1].

    The net sees overlapping windows of `shape`; their middles count more than their edges.
    """
    from monai.inferers.utils import sliding_window_inference  # seconds to import

    def answer(windows: Tensor) -> Tensor:
        with autocast:
            return to_probability(net(windows.to(device)))

    image = torch.from_numpy(np.asarray(values, np.float32))[None, None]
    found: Any = sliding_window_inference(
        image, tuple(shape), _WINDOWS, answer, overlap=overlap, mode="gaussian", device="cpu"
    )
    probabilities: NDArray[np.float32] = found[0].numpy()
    return probabilities


def to_mask(probability: NDArray[np.float32], grid: sitk.Image, image: sitk.Image) -> sitk.Image:
    """The likeliest class of each voxel, on the grid that an image came with.

    probability
        (classes, Z, Y, X) on `grid`, the image turned and resampled.
    """
    best = bring_back(probability[0], grid, image)
    named: sitk.Image = sitk.Cast(best, sitk.sitkUInt8) * 0
    for number, values in enumerate(probability[1:], 1):
        other = bring_back(values, grid, image)
        above = sitk.Greater(other, best)
        named = sitk.Mask(named, sitk.Not(above)) + sitk.Cast(above, sitk.sitkUInt8) * number
        best = sitk.Maximum(best, other)
    named = sitk.Cast(named, sitk.sitkUInt8)
    named.CopyInformation(image)
    return named


def segment(
    net: nn.Module,
    image: sitk.Image,
    grid: Grid,
    *,
    overlap: float,
    device: torch.device,
    autocast: torch.autocast,
) -> sitk.Image:
    """A mask on the image's own grid."""
    brought = grid.bring(image)
    probability = slide(
        net, grid.to_unit(brought), grid.shape, overlap=overlap, device=device, autocast=autocast
    )
    return to_mask(probability, brought, image)


@torch.no_grad()
def classify(
    net: nn.Module, images: Tensor, *, device: torch.device, autocast: torch.autocast
) -> NDArray[np.float32]:
    """(n, classes) probabilities of (n, 1, Z, Y, X) images in [0, 1]."""
    with autocast:
        logits = net(images.to(device).float())
    probabilities: NDArray[np.float32] = to_probability(logits).cpu().numpy()
    return probabilities
