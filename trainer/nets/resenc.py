"""The residual-encoder U-Net of nnU-Net: the nets "resenc-s", "resenc-m" and "resenc-l".

Keys and shapes are those of `ResidualEncoderUNet` in the package dynamic-network-architectures,
which holds most tensors under two or four names; here each has one, and `add_aliases` adds the
others. Blocks are those of ResNet-D (He et al., CVPR 2019). Spatial axes are z, y, x.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.errors import TrainError

_FEATURES = (1, 2, 4, 8, 10, 10)
"""Channels of each stage, in units of the width."""
_BLOCKS = (1, 3, 4, 6, 6, 6)
_SLOPE = 0.01


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions beside a skip: average pool, then 1x1x1 convolution, where needed."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(channels_in, channels_out, stride=stride)
        self.conv2 = _conv_norm(channels_out, channels_out, activate=False)
        nn.init.zeros_(self.conv2.get_parameter("norm.weight"))  # begins as its skip
        skip: list[nn.Module] = [nn.AvgPool3d(stride)] if stride > 1 else []
        if channels_in != channels_out:
            skip.append(_conv_norm(channels_in, channels_out, kernel=1, activate=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, out, Z / stride, ...)
        skipped = self.skip(x)
        out = self.conv2(self.conv1(x))
        out += skipped
        return nn.functional.leaky_relu_(out, _SLOPE)


class ResEncEncoder(nn.Module):
    """The contracting half. `forward` returns the bottleneck."""

    encoder_keys = ("encoder.",)

    def __init__(self, *, stages: int, width: int = 32) -> None:
        """Build with this number of stages, 2 to 6, and of channels in the first.

        Later stages have 2, 4, 8, 10 and 10 times as many channels, and each halves the sides.
        """
        super().__init__()
        if width < 1:
            raise TrainError(f"width must be >= 1, got {width}")
        self.width = width
        self.channels = tuple(width * times for times in _FEATURES[:stages])
        self.factor = 2 ** (stages - 1)
        self.bottleneck_channels = self.channels[-1]
        built: list[nn.Module] = []
        channels_in = width
        for number, channels in enumerate(self.channels):
            blocks = [
                ResidualBlock(
                    channels if block else channels_in,
                    channels,
                    stride=1 if block or number == 0 else 2,
                )
                for block in range(_BLOCKS[number])
            ]
            built.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
            channels_in = channels
        self.encoder = nn.ModuleDict(
            {"stem": _stacked(_conv_norm(1, width)), "stages": nn.ModuleList(built)}
        )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of every stage for (n, 1, Z, Y, X) crops, deepest first."""
        x = self.encoder["stem"](x)  # (n, width, Z, Y, X)
        features: list[Tensor] = []
        for stage in self.encoder["stages"]:  # type: ignore[attr-defined]
            x = stage(x)  # (n, channels, Z / 2^number, ...)
            features.append(x)
        return tuple(reversed(features))

    def forward(self, x: Tensor) -> Tensor:
        """The deepest features of crops (n, 1, Z, Y, X)."""
        return self.encode(x)[0]

    def stages(self) -> list[nn.Module]:
        """Blocks, in order."""
        return [self.encoder["stem"], *self.encoder["stages"]]  # type: ignore[misc]


class ResEncUNet(ResEncEncoder):
    """Encoder and decoder. `forward` returns the decoder's features, (n, width, Z, Y, X)."""

    decoder_keys = ("decoder.",)

    def __init__(self, *, stages: int, width: int = 32) -> None:
        super().__init__(stages=stages, width=width)
        self.decoded_channels = width
        deep_to_fine = list(reversed(self.channels))
        pairs = list(itertools.pairwise(deep_to_fine))
        self.decoder = nn.ModuleDict(
            {
                "stages": nn.ModuleList(_stacked(_conv_norm(2 * fine, fine)) for _, fine in pairs),
                "transpconvs": nn.ModuleList(_transposed(deep, fine) for deep, fine in pairs),
            }
        )

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The decoder's features, (n, width, Z, Y, X), from what `encode` returned."""
        x, *skips = features
        ups, stages = self.decoder["transpconvs"], self.decoder["stages"]
        for up, stage, skip in zip(ups, stages, skips, strict=True):  # type: ignore[call-overload]
            x = stage(torch.cat((up(x), skip), dim=1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The decoder's features of crops (n, 1, Z, Y, X)."""
        return self.decode(self.encode(x))

    def stages(self) -> list[nn.Module]:
        """Blocks, in order."""
        return [*super().stages(), *self.decoder["stages"]]  # type: ignore[misc]


def add_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by all names that `ResidualEncoderUNet` gives them.

    `X.conv` is also `X.all_modules.0`, `X.norm` also `X.all_modules.1`; and all of `encoder` is
    also in `decoder.encoder`. The tensors themselves are shared.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        names = [key]
        *path, layer, kind = key.split(".")
        if layer in ("conv", "norm"):
            alias = "all_modules.0" if layer == "conv" else "all_modules.1"
            names.append(".".join((*path, alias, kind)))
        if key.startswith("encoder."):
            names += [f"decoder.{name}" for name in names]
        named |= dict.fromkeys(names, tensor)
    return named


def _conv_norm(
    channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1, activate: bool = True
) -> nn.Sequential:
    """Convolution (He normal; only those of 1x1x1 lack a bias), instance norm, leaky ReLU."""
    conv = nn.Conv3d(
        channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=kernel > 1
    )
    layers: dict[str, nn.Module] = {
        "conv": _initialise(conv),
        "norm": nn.InstanceNorm3d(channels_out, eps=1e-5, affine=True),
    }
    if activate:
        layers["nonlin"] = nn.LeakyReLU(_SLOPE, inplace=True)
    return nn.Sequential(OrderedDict(layers))


def _stacked(convolution: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(convs=nn.Sequential(convolution)))


def _transposed(channels_in: int, channels_out: int) -> nn.Module:
    return _initialise(nn.ConvTranspose3d(channels_in, channels_out, kernel_size=2, stride=2))


def _initialise(conv: nn.Conv3d | nn.ConvTranspose3d) -> nn.Module:
    """Initial weights as nnU-Net draws them."""
    nn.init.kaiming_normal_(conv.weight, a=_SLOPE)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
