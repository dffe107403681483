"""Nets for fine-tuning: a body, pretrained or not, and a new head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from trainer.nets.pretraining import OutputTransition
from trainer.nets.resenc import ResEncUNet
from trainer.nets.unet import ConvUnit, UNet3D

_FINEST_CHANNELS = 32


class UNetSegmenter(nn.Module):
    """A net that was pretrained, with a new 1 x 1 x 1 convolution that classifies voxels."""

    def __init__(self, body: UNet3D | ResEncUNet, *, outputs: int) -> None:
        super().__init__()
        self.body = body
        channels = body.decoded_channels
        OutputTransition(channels)  # unused: its draws keep the head's weights those of older runs
        self.head = nn.Conv3d(channels, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # (n, 1, Z, Y, X) -> logits (n, outputs, Z, Y, X)
        logits: Tensor = self.head(self.body.decode(self.body.encode(x)))
        return logits


class Segmenter(nn.Module):
    """Any body with a new decoder: at each finer resolution, two units that also see the skip."""

    def __init__(self, body: nn.Module, channels: tuple[int, ...], *, outputs: int) -> None:
        """Add a decoder to `body`.

        body
            Its `encode` takes (n, 1, Z, Y, X) images and returns features, deepest first.
        channels
            Of each of these features.
        """
        super().__init__()
        self.body = body
        deepest, *skips = channels
        self.ups = nn.ModuleList()
        for skip in skips:
            self.ups.append(nn.Sequential(ConvUnit(deepest + skip, skip), ConvUnit(skip, skip)))
            deepest = skip
        self.last = ConvUnit(deepest, _FINEST_CHANNELS)
        self.head = nn.Conv3d(_FINEST_CHANNELS, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # (n, 1, Z, Y, X) -> logits (n, outputs, Z, Y, X)
        features, *skips = self.body.encode(x)  # type: ignore[operator]
        for up, skip in zip(self.ups, skips, strict=True):
            features = up(torch.cat((_resize(features, skip), skip), dim=1))
        logits: Tensor = self.head(self.last(_resize(features, x)))
        return logits


class Classifier(nn.Module):
    """Global average pool of the deepest features, then two linear layers, as published."""

    def __init__(self, body: nn.Module, channels: int, *, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:  # (n, 1, Z, Y, X) -> logits (n, outputs)
        deepest, *_ = self.body.encode(x)  # type: ignore[operator]
        logits: Tensor = self.head(deepest.mean(dim=(2, 3, 4)))
        return logits


def _resize(features: Tensor, like: Tensor) -> Tensor:
    """Features interpolated to the resolution of another tensor."""
    if features.shape[2:] == like.shape[2:]:
        return features
    return F.interpolate(features, like.shape[2:], mode="trilinear", align_corners=False)
