"""Run a fine-tuned net on whole images: probabilities, and masks on the image's own grid."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictor:
    """A fine-tuned net on a device, and how it sees images."""

    net: nn.Module
    grid: Grid
    overlap: float
    """Of sliding windows, as a share of a window."""
    device: torch.device
    autocast: torch.autocast

    def segment(self, image: sitk.Image) -> sitk.Image:
        """The predicted mask of an image, on the image's own grid."""
        on_grid = self.grid.resample(image)
        return to_mask(self.slide_window(self.grid.to_input(on_grid, image)), on_grid, image)

    @torch.no_grad()
    def classify(self, values: NDArray[np.float16]) -> NDArray[np.float32]:
        """(classes,) probabilities of one input of the net, (Z, Y, X)."""
        batch = torch.from_numpy(np.array(values))[None, None]
        with self.autocast:
            logits = self.net(upload(batch, self.device).float())
        probability: NDArray[np.float32] = to_probability(logits)[0].cpu().numpy()
        return probability

    @torch.no_grad()
    def slide_window(self, values: NDArray[np.float16]) -> NDArray[np.float32]:
        """(classes, Z, Y, X) probabilities of an image of any size, (Z, Y, X).

        The net sees overlapping windows. Where they overlap, probabilities are averaged with
        Gaussian weights: the middle of a window counts more than its edge.
        """
        from monai.inferers.utils import sliding_window_inference  # seconds to import

        def predict(windows: Tensor) -> Tensor:
            with self.autocast:
                return to_probability(self.net(windows))

        image = torch.from_numpy(np.asarray(values, np.float32))[None, None]
        found: Any = sliding_window_inference(
            image,
            self.grid.shape,
            _WINDOWS_AT_ONCE,
            predict,
            overlap=self.overlap,
            mode="gaussian",
            sw_device=self.device,
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
