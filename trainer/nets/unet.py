"""The 3-D U-Net of Models Genesis with a classification head, at any width.

Module names are those of the published checkpoints, so that state_dict keys agree. Spatial
axes are z, y, x, each divisible by 8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from trainer.errors import TrainError
from trainer.nets.subcubes import join_subcubes, split_subcubes
from trainer.seeds import derive_seeds

FACTOR = 8
"""Z, Y and X must be multiples of this: the encoder halves them three times."""
PARTS: Final = {
    "all": ("",),
    "unet": ("down_tr", "up_tr", "out_tr"),
    "encoder": ("down_tr",),
}
"""Prefixes of the keys of each part of a net."""


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


class OutputTransition(nn.Module):
    """One channel in (0, 1)."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.final_conv = nn.Conv3d(channels_in, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, 1, Z, Y, X)
        return torch.sigmoid(self.final_conv(x))


class ClassificationHead(nn.Module):
    """Logits from the bottleneck, without softmax: the loss computes the log-softmax."""

    def __init__(self, channels_in: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels_in, channels, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm3d(channels)
        self.fc1 = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, z, y, x) -> (n, classes)
        features = torch.relu_(self.bn1(self.conv1(x)))  # (n, channels, z, y, x)
        logits: Tensor = self.fc1(features.mean(dim=(2, 3, 4)))  # (n, classes)
        return logits


class Output(NamedTuple):
    """The net's outputs for a batch; None for a part that was not requested."""

    restored: Tensor | None = None
    """(n, 1, Z, Y, X) in (0, 1)."""
    logits: Tensor | None = None
    """(n, classes)."""
    pretext_logits: Tensor | None = None
    """(n, outputs) of the pretext task's own head."""


class Encoder3D(nn.Module):
    """The contracting half. `forward` returns the bottleneck, (n, 16 width, Z/8, Y/8, X/8)."""

    def __init__(self, *, width: int = 32) -> None:
        """Build with `width` channels in the first convolution; the published net has 32."""
        super().__init__()
        if width < 1:
            raise TrainError(f"width must be >= 1, got {width}")
        w = width
        self.width = width
        self.pool = nn.MaxPool3d(2)
        self.down_tr64 = DownTransition(1, w, 2 * w)
        self.down_tr128 = DownTransition(2 * w, 2 * w, 4 * w)
        self.down_tr256 = DownTransition(4 * w, 4 * w, 8 * w)
        self.down_tr512 = DownTransition(8 * w, 8 * w, 16 * w)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The bottleneck and the three skips, deepest first. Shapes below for width w."""
        x = x.contiguous(memory_format=torch.channels_last_3d)  # (n, 1, Z, Y, X), as the weights
        skip64 = self.down_tr64(x)  # (n, 2w, Z, Y, X)
        skip128 = self.down_tr128(self.pool(skip64))  # (n, 4w, Z/2, Y/2, X/2)
        skip256 = self.down_tr256(self.pool(skip128))  # (n, 8w, Z/4, Y/4, X/4)
        bottleneck = self.down_tr512(self.pool(skip256))  # (n, 16w, Z/8, Y/8, X/8)
        return bottleneck, skip256, skip128, skip64

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, 16 width, Z/8, Y/8, X/8) of crops (n, 1, Z, Y, X) in [0, 1]."""
        return self.encode(x)[0]


class UNet3D(Encoder3D):
    """Encoder, and optionally decoder, classification head, and head of a pretext task."""

    def __init__(
        self,
        *,
        width: int = 32,
        num_classes: int | None = None,
        decoder: bool = True,
        head: Callable[[int], nn.Module] | None = None,
        parts_per_axis: int = 1,
    ) -> None:
        """Build with torch's default initialisation, from torch's global random state.

        num_classes
            None leaves out the classification head.
        head
            Makes a pretext task's head from the bottleneck's channels.
        parts_per_axis
            Split crops into this number of sub-cubes along each axis, and encode each sub-cube
            alone. Not possible with a decoder.
        """
        super().__init__(width=width)
        w = width
        self.num_classes = num_classes
        self.parts_per_axis = parts_per_axis
        self.decodes = decoder
        if decoder:
            self.up_tr256 = UpTransition(16 * w, 8 * w, 8 * w)
            self.up_tr128 = UpTransition(8 * w, 4 * w, 4 * w)
            self.up_tr64 = UpTransition(4 * w, 2 * w, 2 * w)
            self.out_tr = OutputTransition(2 * w)
        if num_classes is not None:
            self.clc_out = ClassificationHead(16 * w, 32 * w, num_classes)
        self.pretext_out = head(16 * w) if head else None

    def forward(self, x: Tensor, *, pretext: bool = True, classify: bool = True) -> Output:  # type: ignore[override]
        """Outputs for (n, 1, Z, Y, X) crops in [0, 1].

        A part that the net lacks, or that is not requested, is not computed and is None.

        pretext
            Whether to run decoder and pretext head.
        classify
            Whether to run the classification head.
        """
        subcubes = split_subcubes(x, self.parts_per_axis)  # (n * parts^3, 1, Z', Y', X')
        bottleneck, skip256, skip128, skip64 = self.encode(subcubes)
        bottleneck = join_subcubes(bottleneck, self.parts_per_axis)  # (n, 16w, Z/8, Y/8, X/8)
        restored = logits = pretext_logits = None
        if classify and self.num_classes is not None:
            logits = self.clc_out(bottleneck)  # (n, classes)
        if pretext and self.pretext_out is not None:
            pretext_logits = self.pretext_out(bottleneck)  # (n, outputs)
        if pretext and self.decodes:
            features = self.decode(bottleneck, skip256, skip128, skip64)
            restored = self.out_tr(features)  # (n, 1, Z, Y, X)
        return Output(restored, logits, pretext_logits)

    def decode(
        self, bottleneck: Tensor, skip256: Tensor, skip128: Tensor, skip64: Tensor
    ) -> Tensor:
        """The decoder's features, (n, 2w, Z, Y, X), from what `encode` returned."""
        up256 = self.up_tr256(bottleneck, skip256)  # (n, 8w, Z/4, Y/4, X/4)
        up128 = self.up_tr128(up256, skip128)  # (n, 4w, Z/2, Y/2, X/2)
        up64: Tensor = self.up_tr64(up128, skip64)
        return up64


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Draw initial weights inside from the seed alone; the global random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seeds(seed, "weights")[0])
        yield


def build_unet(*, seed: int = 0, **parts: Any) -> UNet3D:
    """A `UNet3D` whose initial weights depend on `seed` alone; global random state is unchanged.

    The memory layout is channels last: several times faster on the CPU and on tensor cores.
    """
    with seeded_weights(seed):
        net = UNet3D(**parts)
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def check_shape(shape: tuple[int, ...], parts_per_axis: int = 1) -> None:
    """Raise TrainError unless the net can halve every side of a (Z, Y, X) crop three times."""
    factor = FACTOR * parts_per_axis
    if any(side < factor or side % factor for side in shape):
        raise TrainError(
            f"crops must have sides that are multiples of {factor}, got {shape} (z, y, x); "
            "prepare a store with another shape"
        )
