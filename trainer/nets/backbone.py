"""What a net must offer to be pretrained: the protocols `Encoder` and `Backbone`, and their checks.

Any `torch.nn.Module` with these attributes and methods will do; it needs no base class. All crops
are (n, 1, Z, Y, X), spatial axes z, y, x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from trainer.errors import TrainError

HEADS: Final = ("out_tr.", "clc_out.", "pretext_out.")
"""Prefixes of the keys of the heads that pretraining adds to a backbone."""
_LEAST_SIDE = 16
_OF_ENCODER = {
    "factor": "a whole number: the sides of a crop must be multiples of it",
    "bottleneck_channels": "a whole number: channels of the deepest features",
    "encoder_keys": "a tuple of text: prefixes of the encoder's state-dict keys",
    "encode": "a method: crops (n, 1, Z, Y, X) -> features, deepest first",
}
_OF_DECODER = {
    "decoded_channels": "a whole number: channels that decode returns",
    "decoder_keys": "a tuple of text: prefixes of the decoder's state-dict keys",
    "decode": "a method: features of encode -> (n, decoded_channels, Z, Y, X)",
}


class Encoder(Protocol):
    """A net that makes features of crops: enough to classify, and for tasks with their own head."""

    @property
    def factor(self) -> int:
        """Z, Y and X of a crop must be multiples of this."""
        ...

    @property
    def bottleneck_channels(self) -> int:
        """Channels of the deepest features."""
        ...

    @property
    def encoder_keys(self) -> tuple[str, ...]:
        """Prefixes of the state-dict keys of the encoder."""
        ...

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """Features (n, c, z, y, x) of crops (n, 1, Z, Y, X), deepest first.

        Each crop is independent of the others, apart from batch norm.
        """
        ...


class Backbone(Encoder, Protocol):
    """An encoder with a decoder: for tasks that restore crops, and to segment."""

    @property
    def decoded_channels(self) -> int:
        """Channels of the decoder's features."""
        ...

    @property
    def decoder_keys(self) -> tuple[str, ...]:
        """Prefixes of the state-dict keys of the decoder."""
        ...

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features (n, decoded_channels, Z, Y, X) at full size, from those of `encode`."""
        ...


def check_protocol(net: Any, *, decoder: bool) -> None:
    """Raise TrainError, saying what is missing, unless a net of one's own meets the protocol.

    decoder
        Whether it must be a `Backbone`; else an `Encoder` is enough.
    """
    name = type(net).__name__
    if not isinstance(net, nn.Module):
        raise TrainError(f"net must be a torch.nn.Module, got {name}")
    wanted = _OF_ENCODER | _OF_DECODER if decoder else _OF_ENCODER
    for attribute, meaning in wanted.items():
        value = getattr(net, attribute, None)
        if not _suits(value, meaning):
            raise TrainError(
                f"net {name}: {attribute} must be {meaning}; got"
                f" {'nothing' if value is None else repr(value)} (see docs/nets.md)"
            )
    _check_keys(net, name)


def _suits(value: Any, meaning: str) -> bool:
    if meaning.startswith("a whole number"):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if meaning.startswith("a method"):
        return callable(value)
    return isinstance(value, tuple) and all(isinstance(part, str) and part for part in value)


def _check_keys(net: nn.Module, name: str) -> None:
    """Raise TrainError unless every weight belongs to the encoder or to the decoder."""
    keys = list(net.state_dict())
    known: tuple[str, ...] = (*net.encoder_keys, *getattr(net, "decoder_keys", ()))  # type: ignore[misc]
    for prefix in known:
        if not any(key.startswith(prefix) for key in keys):
            raise TrainError(f"net {name}: no weight has a key that starts with {prefix!r}")
    for key in keys:
        if key.startswith(HEADS):
            raise TrainError(
                f"net {name}: key {key} is reserved for a head of pretraining; rename that module"
            )
        if not key.startswith(known):
            raise TrainError(
                f"net {name}: key {key} belongs neither to encoder_keys nor to decoder_keys;"
                " extend one of them, or remove that module"
            )


@torch.no_grad()
def check_outputs(net: Any, *, decoder: bool) -> None:
    """Raise TrainError unless a net of one's own returns what it says for two tiny crops."""
    name, was_training = type(net).__name__, net.training
    side = net.factor * max(2, math.ceil(_LEAST_SIDE / net.factor))
    device = next((parameter.device for parameter in net.parameters()), None)
    crops = torch.zeros(2, 1, side, side, side, device=device)
    net.eval()
    try:
        features = net.encode(crops)
        if not isinstance(features, (tuple, list)) or not features:
            raise TrainError(
                f"net {name}: encode must return features as a tuple or list, got"
                f" {type(features).__name__}"
            )
        for number, found in enumerate(features):
            if not isinstance(found, Tensor) or found.ndim != 5 or len(found) != 2:
                raise TrainError(
                    f"net {name}: features {number} of encode must be (n, c, z, y, x) with n = 2"
                    f" for 2 crops, got {_show(found)}"
                )
        if features[0].shape[1] != net.bottleneck_channels:
            raise TrainError(
                f"net {name}: encode must return the deepest features first, with"
                f" bottleneck_channels = {net.bottleneck_channels}; got {_show(features[0])}"
            )
        if decoder:
            decoded, expected = net.decode(features), (2, net.decoded_channels, side, side, side)
            if not isinstance(decoded, Tensor) or decoded.shape != expected:
                raise TrainError(
                    f"net {name}: decode must return {expected} for crops {tuple(crops.shape)},"
                    f" got {_show(decoded)}"
                )
    finally:
        net.train(was_training)


def _show(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def check_shape(shape: tuple[int, ...], net: Any, parts_per_axis: int = 1) -> None:
    """Raise TrainError unless (Z, Y, X) crops, cut into sub-cubes, suit an `Encoder`.

    Their sides must be multiples of the net's factor. Instance norm needs more than one voxel, so
    for a net with it, one side of the deepest features must be longer than 1.
    """
    factor = net.factor * parts_per_axis
    if any(side < factor or side % factor for side in shape):
        raise TrainError(
            f"crops must have sides that are multiples of {factor} for this net, got {shape}"
            " (z, y, x); use another shape (to pretrain: of the store), or another net"
        )
    by_instance = any(isinstance(module, nn.InstanceNorm3d) for module in net.modules())
    if by_instance and all(side == factor for side in shape):
        raise TrainError(
            f"crops must have a side of at least {2 * factor} for this net, got {shape} (z, y, x):"
            " its instance norm needs more than one voxel of the deepest features; prepare a store"
            " with another shape, or give another net"
        )
