"""I3D: Inception v1 inflated to three dimensions (Carreira & Zisserman, CVPR 2017).

Module names are those of the weight files that circulate for PyTorch, such as
`Mixed_3b.b1a.conv3d.weight`. Their first axis is time; here it is z.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

_MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
"""Channels in, and of each branch's convolutions."""


class Unit3D(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, ReLU."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels_in, channels_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, out, Z / stride, ...)
        padded = _pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return torch.relu_(self.bn(self.conv3d(padded)))


class InceptionModule(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels_in: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit3D(channels_in, channels[0])
        self.b1a = Unit3D(channels_in, channels[1])
        self.b1b = Unit3D(channels[1], channels[2], 3)
        self.b2a = Unit3D(channels_in, channels[3])
        self.b2b = Unit3D(channels[3], channels[4], 3)
        self.b3b = Unit3D(channels_in, channels[5])

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, out, Z, Y, X)
        pooled = _pool_same(x, (3, 3, 3), (1, 1, 1))
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled))
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """The net up to its last features, for one channel: weights of three channels are summed."""

    channels = (1024, 832, 480, 192, 64)

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(1, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        for name, (channels_in, channels) in _MIXED.items():
            self.add_module(name, InceptionModule(channels_in, channels))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of (n, 1, Z, Y, X) images in [0, 1], deepest first.

        z is halved 3, 2, 1, 1 and 1 times, y and x 5 to 1 times.
        """
        plane = (1, 3, 3), (1, 2, 2)
        first = self.Conv3d_1a_7x7(2 * x - 1)  # frames were in [-1, 1]
        second = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(_pool_same(first, *plane)))
        third = self._mixed(_pool_same(second, *plane), "3bc")
        fourth = self._mixed(_pool_same(third, (3, 3, 3), (2, 2, 2)), "4bcdef")
        fifth = self._mixed(_pool_same(fourth, (2, 2, 2), (2, 2, 2)), "5bc")
        return [fifth, fourth, third, second, first]

    def _mixed(self, x: Tensor, which: str) -> Tensor:
        for letter in which[1:]:
            x = self.get_submodule(f"Mixed_{which[0]}{letter}")(x)
        return x


def adapt_i3d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a weight file by the names of `I3D`: one input channel, no classifier."""
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith("logits.")}
    first = "Conv3d_1a_7x7.conv3d.weight"
    if first in found:
        found[first] = found[first].sum(dim=1, keepdim=True)
    return found


def _pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad (n, c, Z, Y, X) with zeros, at most one more at the end, as TensorFlow does."""
    pads: list[int] = []
    for side, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((-(-side // s) - 1) * s + k - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


def _pool_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return F.max_pool3d(_pad_same(x, kernel, stride), kernel, stride)
