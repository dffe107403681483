"""The ResidualEncoderUNet of nnU-Net, found from its tensors, and as nnU-Net's plans describe it.

Keys and shapes are those of `dynamic_network_architectures.architectures.unet`. Its state_dict
names most tensors more than once: each convolution and norm also under `all_modules`, and the
encoder also under `decoder.encoder`. These further names are called aliases here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from trainer.errors import TrainError

Size = tuple[int, ...]
"""z, y, x."""
CLASS_NAME: Final = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
OUTPUT: Final = ".seg_layer"
"""In the keys of the output layers, which belong to one task."""
IN_PROJECTION: Final = ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0")
_STEM: Final = f"{IN_PROJECTION[0]}.weight"
_DECODER_ALIAS: Final = "decoder.encoder."
_LAYERS: Final[dict[str, Any]] = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
"""Layers that our nets share with nnU-Net's presets of the residual encoder."""
IMPORTED: Final = ("conv_op", "norm_op", "dropout_op", "nonlin")
"""The values above that name a class."""
_LABELS: Final = {
    "features": "features per stage",
    "blocks": "blocks per stage",
    "decoder_convs": "convolutions per stage of the decoder",
    "kernels": "kernel sizes",
    "strides": "strides",
    "input_channels": "input channels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Everything that the keys and shapes of the tensors depend on; stages from full size down."""

    features: tuple[int, ...]
    """Channels of each stage."""
    blocks: tuple[int, ...]
    """Residual blocks of each stage."""
    decoder_convs: tuple[int, ...] | None
    """Convolutions of each stage of the decoder, deepest first; None without a decoder."""
    kernels: tuple[Size, ...]
    strides: tuple[Size, ...] | None
    """Stride of each stage, z, y, x. None without a decoder, whose tensors tell them."""
    input_channels: int = 1

    @property
    def factor(self) -> Size:
        """How much smaller the deepest stage is, along each axis; strides must be known."""
        assert self.strides is not None
        return tuple(math.prod(along) for along in zip(*self.strides, strict=True))

    def describe(self) -> dict[str, Any]:
        """`arch_kwargs` of nnU-Net's plans, of JSON values."""
        assert self.decoder_convs is not None
        assert self.strides is not None
        return {
            "n_stages": len(self.features),
            "features_per_stage": list(self.features),
            "conv_op": _LAYERS["conv_op"],
            "kernel_sizes": [list(kernel) for kernel in self.kernels],
            "strides": [list(stride) for stride in self.strides],
            "n_blocks_per_stage": list(self.blocks),
            "n_conv_per_stage_decoder": list(self.decoder_convs),
            **{name: value for name, value in _LAYERS.items() if name != "conv_op"},
        }


def is_residual_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the keys of a 3-D ResidualEncoderUNet, or of its encoder."""
    first = tensors.get("encoder.stages.0.blocks.0.conv1.conv.weight")
    return _STEM in tensors and first is not None and first.ndim == 5


def find_architecture(tensors: Mapping[str, Tensor]) -> Architecture:
    """The architecture of tensors for which `is_residual_encoder` holds."""

    def count(pattern: str) -> int:
        found = (re.match(pattern, key) for key in tensors)
        return len({match[1] for match in found if match})

    stages = range(count(r"encoder\.stages\.(\d+)\."))
    first = [tensors[f"encoder.stages.{s}.blocks.0.conv1.conv.weight"] for s in stages]
    ups = count(r"decoder\.transpconvs\.(\d+)\.")
    strides: tuple[Size, ...] | None = None
    if ups and ups == len(stages) - 1:  # in the decoder, the deepest comes first
        up = [tuple(tensors[f"decoder.transpconvs.{s}.weight"].shape[2:]) for s in range(ups)]
        strides = ((1, 1, 1), *reversed(up))
    return Architecture(
        features=tuple(len(weight) for weight in first),
        blocks=tuple(count(rf"encoder\.stages\.{s}\.blocks\.(\d+)\.") for s in stages),
        decoder_convs=tuple(count(rf"decoder\.stages\.{s}\.convs\.(\d+)\.") for s in range(ups))
        or None,
        kernels=tuple(tuple(weight.shape[2:]) for weight in first),
        strides=strides,
        input_channels=tensors[_STEM].shape[1],
    )


def parse_architecture(description: Mapping[str, Any], *, input_channels: int) -> Architecture:
    """The architecture in `arch_kwargs` of nnU-Net's plans, which may give one number for all.

    Raises TrainError for a value that is missing or of another kind.
    """
    try:
        count = int(description["n_stages"])

        def numbers(name: str, length: int) -> tuple[int, ...]:
            value = description[name]
            values = [value] * length if isinstance(value, int) else value
            return tuple(int(number) for number in values)

        def sizes(name: str) -> tuple[Size, ...]:
            value = description[name]
            values = [value] * count if isinstance(value, int) else value
            return tuple((v,) * 3 if isinstance(v, int) else tuple(map(int, v)) for v in values)

        return Architecture(
            features=numbers("features_per_stage", count),
            blocks=numbers("n_blocks_per_stage", count),
            decoder_convs=numbers("n_conv_per_stage_decoder", count - 1),
            kernels=sizes("kernel_sizes"),
            strides=sizes("strides"),
            input_channels=input_channels,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(
            f"arch_kwargs cannot be read ({type(error).__name__}: {error}); plan again with nnU-Net"
        ) from error


def compare_architectures(weights: Architecture, other: Architecture, where: str) -> list[str]:
    """What keeps weights from another net, as "name: value in the weights, value `where`"."""
    found = []
    if len(weights.features) != len(other.features):
        found.append(
            f"stages: {len(weights.features)} in the weights, {len(other.features)} {where}"
        )
    for name, label in _LABELS.items():
        mine, wanted = getattr(weights, name), getattr(other, name)
        if mine != wanted:
            found.append(f"{label}: {_show(mine)} in the weights, {_show(wanted)} {where}")
    return found


def compare_layers(description: Mapping[str, Any]) -> list[str]:
    """Layers in `arch_kwargs` of plans that differ from ours, as `compare_architectures`."""
    return [
        f"{name}: {value} in the weights, {description.get(name)} in the plans"
        for name, value in _LAYERS.items()
        if not _is_same_layer(name, value, description.get(name))
    ]


def _is_same_layer(name: str, mine: Any, other: Any) -> bool:
    if name in IMPORTED and isinstance(mine, str) and isinstance(other, str):
        return mine.rpartition(".")[2] == other.rpartition(".")[2]  # torch has aliases of modules
    if name.endswith("_kwargs"):
        return (mine or {}) == (other or {})
    return bool(mine == other)


def _show(value: Any) -> str:
    """Sizes such as 3x3x3 for a value of an architecture."""
    if isinstance(value, tuple):
        return " ".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return str(value)


def is_alias(key: str) -> bool:
    """Whether a key is a further name of a tensor that the same file holds under another key."""
    return key.startswith(_DECODER_ALIAS) or ".all_modules." in key
