"""MedicalNet (Chen, Ma & Zheng 2019): 3-D ResNets with the names of its weight files.

MONAI's ResNets have the same parameters. The published ones keep layers 3 and 4 at an eighth of the
input's sides and dilate their kernels, where MONAI's halve the sides twice more.
"""

from __future__ import annotations

from functools import partial

import torch
from monai.networks.nets import resnet
from torch import Tensor, nn

from trainer.errors import TrainError

_BLOCKS = {10: 4, 18: 8, 34: 16, 50: 16, 101: 33, 152: 50, 200: 66}
_BOTTLENECK_FROM, _SHORTCUT_A = 50, (18, 34)
_DILATIONS = {"layer3": 2, "layer4": 4}


class MedicalNet(nn.Module):
    """The net up to its last features."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        net = getattr(resnet, f"resnet{depth}")(
            spatial_dims=3,
            n_input_channels=1,
            conv1_t_stride=2,
            feed_forward=False,
            shortcut_type="A" if depth in _SHORTCUT_A else "B",
            bias_downsample=False,
        )
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        for name, dilation in _DILATIONS.items():
            _dilate(self.get_submodule(name), dilation)
        widest = 4 if depth >= _BOTTLENECK_FROM else 1
        self.channels = (512 * widest, 128 * widest, 64 * widest, 64)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of (n, 1, Z, Y, X), deepest first: sides halved 3, 3, 2 and 1 times."""
        first = torch.relu_(self.bn1(self.conv1(x)))
        second = self.layer1(self.maxpool(first))
        third = self.layer2(second)
        return [self.layer4(self.layer3(third)), third, second, first]


def _dilate(layer: nn.Module, dilation: int) -> None:
    """Change a layer that halves its sides into one that keeps them and dilates its kernels."""
    for block in layer.children():
        for module in block.modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3
        if isinstance(block.downsample, partial):  # shortcut A has no parameters
            block.downsample = partial(block.downsample, stride=1)  # type: ignore[assignment]


def find_depth(tensors: dict[str, Tensor]) -> int:
    """The depth of the net in a weight file, from its number of blocks; TrainError if unknown."""
    blocks = {".".join(key.split(".")[:2]) for key in tensors if key.startswith("layer")}
    bottleneck = "layer1.0.conv3.weight" in tensors
    for depth, count in _BLOCKS.items():
        if count == len(blocks) and bottleneck == (depth >= _BOTTLENECK_FROM):
            return depth
    raise TrainError(f"no MedicalNet has {len(blocks)} residual blocks")


def adapt_medicalnet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a weight file by the names of `MedicalNet`, without its segmentation head."""
    plain = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return {key: t for key, t in plain.items() if not key.startswith(("conv_seg.", "fc."))}
