"""Run a fine-tuned net on whole images: probabilities, and masks on the image's own grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.device import upload
from trainer.finetuning.grid import Grid, resample_back

_WINDOWS_AT_ONCE = 4


def to_probability(logits: Tensor) -> Tensor:
    """(n, outputs, ...) logits -> (n, classes, ...) probabilities that sum to one.

    One output means two classes (sigmoid), several mean one for each class (softmax).
    """
    logits = logits.float()
    if logits.shape[1] > 1:
        return logits.softmax(1)
    positive = logits.sigmoid()
    return torch.cat((1 - positive, positive), dim=1)


@torch.no_grad()
def slide_window(
    net: nn.Module,
    values: NDArray[np.float16],
    shape: Sequence[int],
    *,
    overlap: float,
    device: torch.device,
    autocast: torch.autocast,
) -> NDArray[np.float32]:
    """(classes, Z, Y, X) probabilities of an image of any size, (Z, Y, X).

    The net sees overlapping windows of `shape`. Where they overlap, probabilities are averaged with
    Gaussian weights: the middle of a window counts more than its edge.
    """
    from monai.inferers.utils import sliding_window_inference  # seconds to import

    def predict(windows: Tensor) -> Tensor:
        with autocast:
            return to_probability(net(windows))

    image = torch.from_numpy(np.asarray(values, np.float32))[None, None]
    found: Any = sliding_window_inference(
        image,
        tuple(shape),
        _WINDOWS_AT_ONCE,
        predict,
        overlap=overlap,
        mode="gaussian",
        sw_device=device,
        device="cpu",
    )
    probability: NDArray[np.float32] = found[0].numpy()
    return probability


def to_mask(probability: NDArray[np.float32], grid: sitk.Image, image: sitk.Image) -> sitk.Image:
    """The most probable class of each voxel, on the grid of the original image, as uint8.

    probability
        (classes, Z, Y, X) on `grid`, which is the image turned to LPS and resampled.
    """
    best = resample_back(probability[0], grid, image)
    mask: sitk.Image = sitk.Cast(best, sitk.sitkUInt8) * 0
    for number, values in enumerate(probability[1:], 1):
        other = resample_back(values, grid, image)
        above = sitk.Greater(other, best)
        mask = sitk.Mask(mask, sitk.Not(above)) + sitk.Cast(above, sitk.sitkUInt8) * number
        best = sitk.Maximum(best, other)
    mask = sitk.Cast(mask, sitk.sitkUInt8)
    mask.CopyInformation(image)
    return mask


def segment(
    net: nn.Module,
    image: sitk.Image,
    grid: Grid,
    *,
    overlap: float,
    device: torch.device,
    autocast: torch.autocast,
) -> sitk.Image:
    """The predicted mask of an image, on the image's own grid."""
    on_grid = grid.resample(image)
    probability = slide_window(
        net,
        grid.to_input(on_grid, image),
        grid.shape,
        overlap=overlap,
        device=device,
        autocast=autocast,
    )
    return to_mask(probability, on_grid, image)


@torch.no_grad()
def classify(
    net: nn.Module, images: Tensor, *, device: torch.device, autocast: torch.autocast
) -> NDArray[np.float32]:
    """(n, classes) probabilities of (n, 1, Z, Y, X) images."""
    with autocast:
        logits = net(upload(images, device).float())
    probability: NDArray[np.float32] = to_probability(logits).cpu().numpy()
    return probability
