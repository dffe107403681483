"""The 3-D U-Net of Models Genesis, at any width: the net "genesis".

Module names are those of the published checkpoints, so that state_dict keys agree. Spatial
axes are z, y, x, each divisible by 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.errors import TrainError


class ConvUnit(nn.Module):
    """3x3x3 convolution, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm3d(channels_out)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, out, Z, Y, X)
        return torch.relu_(self.bn1(self.conv1(x)))


class DownTransition(nn.Module):
    """Two units. The pooling after them is in the net, because the skip is taken before it."""

    def __init__(self, channels_in: int, channels_between: int, channels_out: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(
            ConvUnit(channels_in, channels_between), ConvUnit(channels_between, channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, out, Z, Y, X)
        out: Tensor = self.ops(x)
        return out


class UpTransition(nn.Module):
    """Transposed convolution to twice the size, then two units on (up, skip)."""

    def __init__(self, channels_in: int, channels_skip: int, channels_out: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(channels_in, channels_in, kernel_size=2, stride=2)
        self.ops = nn.Sequential(
            ConvUnit(channels_in + channels_skip, channels_out),
            ConvUnit(channels_out, channels_out),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = self.up_conv(x)  # (n, in, 2Z, 2Y, 2X)
        out: Tensor = self.ops(torch.cat((up, skip), dim=1))  # (n, out, 2Z, 2Y, 2X)
        return out


class Encoder3D(nn.Module):
    """The contracting half. `forward` returns the bottleneck, (n, 16 width, Z/8, Y/8, X/8)."""

    factor = 8
    """Z, Y and X must be multiples of this: they are halved three times."""
    encoder_keys = ("down_tr",)

    def __init__(self, *, width: int = 32) -> None:
        """Build with `width` channels in the first convolution; the published net has 32."""
        super().__init__()
        if width < 1:
            raise TrainError(f"width must be >= 1, got {width}")
        w = width
        self.width = width
        self.bottleneck_channels = 16 * w
        self.pool = nn.MaxPool3d(2)
        self.down_tr64 = DownTransition(1, w, 2 * w)
        self.down_tr128 = DownTransition(2 * w, 2 * w, 4 * w)
        self.down_tr256 = DownTransition(4 * w, 4 * w, 8 * w)
        self.down_tr512 = DownTransition(8 * w, 8 * w, 16 * w)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The bottleneck and the three skips, deepest first. Shapes below for width w."""
        x = x.contiguous(memory_format=torch.channels_last_3d)  # (n, 1, Z, Y, X), as the weights
        skip64 = self.down_tr64(x)  # (n, 2w, Z, Y, X)
        skip128 = self.down_tr128(self.pool(skip64))  # (n, 4w, Z/2, Y/2, X/2)
        skip256 = self.down_tr256(self.pool(skip128))  # (n, 8w, Z/4, Y/4, X/4)
        bottleneck = self.down_tr512(self.pool(skip256))  # (n, 16w, Z/8, Y/8, X/8)
        return bottleneck, skip256, skip128, skip64

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, 16 width, Z/8, Y/8, X/8) of crops (n, 1, Z, Y, X)."""
        return self.encode(x)[0]

    def stages(self) -> list[nn.Module]:
        """Blocks, in order."""
        return [self.down_tr64, self.down_tr128, self.down_tr256, self.down_tr512]


class UNet3D(Encoder3D):
    """Encoder and decoder. `forward` returns the decoder's features, (n, 2 width, Z, Y, X)."""

    decoder_keys = ("up_tr",)

    def __init__(self, *, width: int = 32) -> None:
        super().__init__(width=width)
        w = width
        self.decoded_channels = 2 * w
        self.up_tr256 = UpTransition(16 * w, 8 * w, 8 * w)
        self.up_tr128 = UpTransition(8 * w, 4 * w, 4 * w)
        self.up_tr64 = UpTransition(4 * w, 2 * w, 2 * w)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The decoder's features, (n, 2w, Z, Y, X), from what `encode` returned."""
        bottleneck, skip256, skip128, skip64 = features
        up256 = self.up_tr256(bottleneck, skip256)  # (n, 8w, Z/4, Y/4, X/4)
        up128 = self.up_tr128(up256, skip128)  # (n, 4w, Z/2, Y/2, X/2)
        up64: Tensor = self.up_tr64(up128, skip64)
        return up64

    def forward(self, x: Tensor) -> Tensor:
        """The decoder's features of crops (n, 1, Z, Y, X)."""
        return self.decode(self.encode(x))

    def stages(self) -> list[nn.Module]:
        """Blocks, in order."""
        return [*super().stages(), self.up_tr256, self.up_tr128, self.up_tr64]
