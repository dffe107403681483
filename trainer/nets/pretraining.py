"""The net that pretraining trains: a backbone with the heads of its tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from trainer.nets.backbone import HEADS, Backbone, Encoder
from trainer.nets.subcubes import join_subcubes, split_subcubes
from trainer.seeds import derive_seeds

Activation: TypeAlias = Literal["sigmoid", "linear"]
_BACKBONE = "backbone."


class Output(NamedTuple):
    """The net's outputs for a batch; None for a part that was not requested."""

    restored: Tensor | None = None
    """(n, 1, Z, Y, X), in (0, 1) with the activation "sigmoid"."""
    logits: Tensor | None = None
    """(n, classes)."""
    pretext_logits: Tensor | None = None
    """(n, outputs) of the pretext task's own head."""


class OutputTransition(nn.Module):
    """One channel: the restored crop."""

    def __init__(self, channels_in: int, activation: Activation = "sigmoid") -> None:
        """Add a 1x1x1 convolution.

        activation
            "sigmoid" for crops in [0, 1], "linear" for crops of any range.
        """
        super().__init__()
        self.activation = activation
        self.final_conv = nn.Conv3d(channels_in, 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # (n, in, Z, Y, X) -> (n, 1, Z, Y, X)
        restored: Tensor = self.final_conv(x)
        return torch.sigmoid(restored) if self.activation == "sigmoid" else restored


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


class PretrainingNet(nn.Module):
    """A backbone, and optionally an output layer, a classification head, a pretext task's head.

    The state dict has the backbone's own keys, without a prefix, so that weights load into the bare
    backbone; the heads add `out_tr`, `clc_out` and `pretext_out`.
    """

    def __init__(
        self,
        backbone: Backbone | Encoder,
        *,
        num_classes: int | None = None,
        decoder: bool = True,
        head: Callable[[int], nn.Module | None] | None = None,
        parts_per_axis: int = 1,
        activation: Activation = "sigmoid",
    ) -> None:
        """Add heads with torch's default initialisation, from torch's global random state.

        num_classes
            None leaves out the classification head.
        decoder
            Whether crops are restored; needs a `Backbone`. If not, weights of the backbone that are
            not the encoder's are frozen.
        head
            Makes a pretext task's head from the bottleneck's channels.
        parts_per_axis
            Split crops into this number of sub-cubes along each axis, and encode each sub-cube
            alone. Not possible with a decoder.
        activation
            Of the restored crops; see `OutputTransition`.
        """
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone: Any
        self.add_module("backbone", backbone)
        self.num_classes = num_classes
        self.parts_per_axis = parts_per_axis
        self.decodes = decoder
        channels: int = self.backbone.bottleneck_channels
        if decoder:
            self.out_tr = OutputTransition(self.backbone.decoded_channels, activation)
        else:
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(name.startswith(self.backbone.encoder_keys))
        if num_classes is not None:
            self.clc_out = ClassificationHead(channels, 2 * channels, num_classes)
        self.pretext_out = head(channels) if head else None
        self.register_state_dict_post_hook(_drop_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(
        self,
        x: Tensor,
        *,
        originals: Tensor | None = None,
        pretext: bool = True,
        classify: bool = True,
    ) -> Output:
        """Outputs for (n, 1, Z, Y, X) crops.

        A part that the net lacks, or that is not requested, is not computed and is None.

        originals
            Crops to classify instead of `x`, (m, 1, Z, Y, X): of masked crops, the complete ones.
            Both are encoded in one pass.
        pretext
            Whether to run decoder and pretext head.
        classify
            Whether to run the classification head.
        """
        classify = classify and self.num_classes is not None
        pretext = pretext and (self.decodes or self.pretext_out is not None)
        crops, num = x, len(x)
        if originals is not None and classify:
            crops, num = (torch.cat((x, originals)), len(x)) if pretext else (originals, 0)
        subcubes = split_subcubes(crops, self.parts_per_axis)  # (n * parts^3, 1, Z', Y', X')
        features = self.backbone.encode(subcubes)
        bottleneck = join_subcubes(features[0], self.parts_per_axis)  # (n, channels, z, y, x)
        restored = logits = pretext_logits = None
        if classify:
            logits = self.clc_out(bottleneck if originals is None else bottleneck[num:])
        if pretext and self.pretext_out is not None:
            pretext_logits = self.pretext_out(bottleneck[:num])  # (n, outputs)
        if pretext and self.decodes:
            if len(crops) > num:
                features = [found[:num] for found in features]
            restored = self.out_tr(self.backbone.decode(features))  # (n, 1, Z, Y, X)
        return Output(restored, logits, pretext_logits)

    def describe(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (n, bottleneck_channels), means over space, and logits of (n, 1, Z, Y, X) crops.

        The logits are None without a classification head.
        """
        subcubes = split_subcubes(x, self.parts_per_axis)  # (n * parts^3, 1, Z', Y', X')
        bottleneck = join_subcubes(self.backbone.encode(subcubes)[0], self.parts_per_axis)
        logits = None if self.num_classes is None else self.clc_out(bottleneck)
        return bottleneck.mean(dim=(2, 3, 4)), logits

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The backbone's features of crops (n, 1, Z, Y, X), deepest first."""
        return tuple(self.backbone.encode(x))

    def stages(self) -> list[nn.Module]:
        """Blocks of the backbone whose activations may be computed again in the backward pass.

        Empty for a net of one's own without a method `stages`.
        """
        stages = getattr(self.backbone, "stages", None)
        return list(stages()) if callable(stages) else []


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Draw initial weights inside from the seed alone; the global random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seeds(seed, "weights")[0])
        yield


def _drop_prefix(net: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """After saving: keys of the backbone without `backbone.`, all in the same order."""
    for key in list(state):
        inner = key.removeprefix(prefix)
        renamed = prefix + inner.removeprefix(_BACKBONE) if key.startswith(prefix) else key
        state[renamed] = state.pop(key)


def _add_prefix(net: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before loading: undo `_drop_prefix`."""
    heads = tuple(prefix + head for head in HEADS)
    for key in list(state):
        if key.startswith(prefix) and not key.startswith(heads):
            state[prefix + _BACKBONE + key.removeprefix(prefix)] = state.pop(key)
