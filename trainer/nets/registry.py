"""The nets by name: build one, find the one in a file by its keys, name the keys of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, get_args

import torch
from torch import Tensor, nn

from trainer.config import NetName, Part
from trainer.nets.pretraining import PretrainingNet, seeded_weights
from trainer.nets.resenc import ResEncEncoder, ResEncUNet
from trainer.nets.unet import Encoder3D, UNet3D

Net = TypeVar("Net", bound=nn.Module)
KINDS: Final[tuple[NetName, ...]] = get_args(NetName)
STAGES: Final[dict[NetName, int]] = {"resenc-s": 4, "resenc-m": 5, "resenc-l": 6}
"""Resolutions of the residual-encoder nets."""
PARTS: Final[tuple[Part, ...]] = get_args(Part)
_FIRST = {False: "down_tr64.ops.0.conv1.weight", True: "encoder.stem.convs.0.conv.weight"}
"""Key of the first convolution, by whether it is a residual-encoder net."""
FIRST_OF_GENESIS: Final = _FIRST[False]


@dataclass(frozen=True, slots=True)
class NetKeys:
    """Which keys of a state dict belong to which part."""

    encoder: tuple[str, ...]
    """Prefixes; empty for an unknown net."""
    decoder: tuple[str, ...]

    def prefixes(self, part: Part) -> tuple[str, ...]:
        """Prefixes of a part: "all", "unet" (the net without heads but its output), "encoder"."""
        if part == "all":
            return ("",)
        if part == "encoder":
            return self.encoder
        return (*self.encoder, *self.decoder, "out_tr.")

    def has_decoder(self, keys: Iterable[str]) -> bool:
        """Whether any key is the decoder's."""
        return any(key.startswith(self.decoder) for key in keys)


def build_encoder(kind: NetName, width: int = 32) -> Encoder3D | ResEncEncoder:
    """The encoder of a net; weights are drawn from torch's global random state."""
    if kind == "genesis":
        return Encoder3D(width=width)
    return ResEncEncoder(stages=STAGES[kind], width=width)


def build_backbone(kind: NetName, width: int = 32) -> UNet3D | ResEncUNet:
    """Encoder and decoder of a net; weights are drawn from torch's global random state.

    width
        Channels of the first convolution; all others scale with it.
    """
    if kind == "genesis":
        return UNet3D(width=width)
    return ResEncUNet(stages=STAGES[kind], width=width)


def build_net(
    kind: NetName = "genesis",
    *,
    width: int = 32,
    seed: int = 0,
    decoder: bool = True,
    **parts: Any,
) -> PretrainingNet:
    """A net to pretrain, whose initial weights depend on `seed` alone.

    parts
        See `PretrainingNet`. Without `decoder` there are no weights of a decoder.
    """
    with seeded_weights(seed):
        backbone = build_backbone(kind, width) if decoder else build_encoder(kind, width)
        net = PretrainingNet(backbone, decoder=decoder, **parts)
    return channels_last(net)


def channels_last(net: Net) -> Net:
    """The net with its weights in the memory layout that is fastest for it.

    Channels last is several times faster on the CPU and on tensor cores, but not with instance
    norm, which would copy its input to the other layout and back.
    """
    if any(isinstance(module, nn.InstanceNorm3d) for module in net.modules()):
        return net
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def find_kind(keys: Iterable[str]) -> NetName | None:
    """The name of the net with these state-dict keys; None for none of ours, or no encoder."""
    keys = set(keys)
    if FIRST_OF_GENESIS in keys:
        return "genesis"
    stages = {key.split(".")[2] for key in keys if key.startswith("encoder.stages.")}
    if _FIRST[True] in keys:
        return next((kind for kind, number in STAGES.items() if number == len(stages)), None)
    return None


def find_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Channels of the first convolution of one of our nets; None for none of ours."""
    kind = find_kind(tensors)
    return None if kind is None else len(tensors[_FIRST[kind != "genesis"]])


def keys_of(kind: NetName | None) -> NetKeys:
    """The keys of a net's parts."""
    if kind is None:
        return NetKeys((), ())
    backbone = UNet3D if kind == "genesis" else ResEncUNet
    return NetKeys(backbone.encoder_keys, backbone.decoder_keys)
