"""Read weights of runs, exports and official checkpoints, and load them into nets.

Nothing executes code on loading. Official kernels have their axes in the order x, y, z: they are
reversed to our z, y, x when they are read.
"""

from __future__ import annotations

import json
import logging
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from store.settings import require_choice
from trainer.checkpoint import in_warmup, load_best
from trainer.config import NetName, Part
from trainer.errors import SettingError, TrainError
from trainer.nets.backbone import HEADS
from trainer.nets.pretraining import PretrainingNet
from trainer.nets.registry import (
    FIRST_OF_GENESIS,
    PARTS,
    NetKeys,
    build_encoder,
    build_net,
    channels_last,
    find_kind,
    find_width,
    keys_of,
)
from trainer.nets.resenc import ResEncEncoder
from trainer.nets.unet import Encoder3D
from trainer.nnunet import read as nnunet

_log = logging.getLogger(__name__)
OUR_AXES, GENESIS_AXES = "z,y,x", "x,y,z"
METADATA_KEY = "semgen"
Net = TypeVar("Net", bound=nn.Module)
_HEAD = "clc_out.fc1.weight"


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by state_dict key, and their metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    """net, width, num_classes, fingerprint, axes, part, pretext, step, scans (ids of the scans that
    the weights depend on), window_hu, normalise (see `TrainConfig`; "window" if it is missing),
    crop_shape, spacing_mm, origins (others' weights that they started from, see
    `trainer.nnunet.read.Origin`); for a net of one's own, own_net. Official files have none of
    these; for them, axes is "x,y,z", although `tensors` are in our order already. Files of nnU-Net
    and nnssl have part "backbone", or "encoder" without a decoder."""

    @property
    def keys(self) -> NetKeys:
        """Which keys belong to which part."""
        own = self.metadata.get("own_net")
        if own:
            return NetKeys(tuple(own["encoder_keys"]), tuple(own["decoder_keys"]))
        return keys_of(find_kind(self.tensors))

    @property
    def known(self) -> tuple[str, ...]:
        """Prefixes of all keys that the net may have."""
        if self.metadata.get("own_net") or not self.keys.encoder:
            return ("",)
        return (*self.keys.prefixes("backbone"), *HEADS)


@dataclass(frozen=True, slots=True)
class KeyReport:
    """Comparison of a file's keys with a net's."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the net, but not in the file."""
    unexpected: tuple[str, ...]
    """In the file, but not in the net."""
    wrong_shape: tuple[str, ...]
    """In both, but with different shapes, as "key (file shape) for (net shape)"."""


def read_weights(file: str | Path, *, part: Part = "all") -> Weights:
    """Read the best weights of a run directory, a checkpoint, an export, or others' weights.

    The kind of file is found by its content. Others' weights are a checkpoint of nnU-Net or nnssl,
    or a folder with checkpoint_final.pth as they publish it, and official Genesis checkpoints: a
    file without our metadata counts as one of these, the axes of its kernels are reversed, and
    `module.` before keys is dropped. Raises TrainError for anything else.

    part
        The part that is needed. All tensors are returned anyway, but more than the "encoder" is
        refused from a run in its warm-up, because its decoder is untrained.
    """
    file = Path(file)
    if file.is_dir():
        published = nnunet.find_checkpoint(file)
        if published is None:
            return parse_checkpoint(*load_best(file), part)
        file = published
    if not file.is_file():
        raise TrainError(f"{file}: no such run or weights file")
    if _is_safetensors(file):
        return _from_safetensors(file)
    content = _load_torch(file)
    if isinstance(content, dict) and {"model", "config", "fingerprint"} <= content.keys():
        return parse_checkpoint(file, content, part)
    if nnunet.is_checkpoint(content):
        return _from_nnunet(file, content)
    return _with_axes(file, *_take_tensors(file, content))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file that holds nothing else, unchanged."""
    return _take_tensors(file, _load_torch(file))[0]


def _load_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings(), nnunet.allow_numpy_scalars():
            warnings.simplefilter("ignore")  # warnings about files of another kind
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that it did not write
        raise TrainError(
            f"{file}: expected safetensors or a torch file of plain tensors; "
            f"cannot be read as either ({type(error).__name__})"
        ) from error


def _take_tensors(file: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a dict of tensors, or of a dict with `state_dict`."""
    if isinstance(content, dict):
        tensors = content.get("state_dict", content)
        if isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values()):
            return tensors, content.get("metadata") or {}
    raise TrainError(f"{file}: expected a dict of tensors, or one with `state_dict`")


def load_encoder(file: str | Path) -> Encoder3D | ResEncEncoder:
    """The encoder of a weights file, in eval mode, as a starting point for other nets.

    Input: crops (n, 1, Z, Y, X) float32, HU window mapped to [0, 1], or z-scores if trained so
    (`read_weights(file).metadata["normalise"]`); sides multiples of the net's `factor`, 8 for the
    net "genesis". Output: features (n, c, Z/factor, Y/factor, X/factor), c = `bottleneck_channels`;
    `encode` returns the skip connections, too. See `load_unet` for official weights and errors.
    """
    weights = read_weights(file, part="encoder")
    net = build_encoder(*describe_net(file, weights))
    copy_weights(net, weights, file, part="encoder")
    return _set_eval_mode(net, weights)


def load_unet(file: str | Path) -> PretrainingNet:
    """The net of a weights file, in eval mode.

    Input: as for `load_encoder`. Output: `Output` with `restored` (n, 1, Z, Y, X), in the range of
    the input, if the file has a decoder, and `logits` (n, classes) if it has a classification head.
    The head of a pretext task is left out.

    Official weights are meant to be used with the statistics of each batch in batch norm, in
    evaluation, too; nets loaded from them do so.

    Raises TrainError that lists every missing key, unexpected key and wrong shape; and for a file
    of nnU-Net or nnssl, which has no layer that restores crops.
    """
    weights = read_weights(file)
    head = weights.tensors.get(_HEAD)
    own = {k: t for k, t in weights.tensors.items() if not k.startswith("pretext_out.")}
    kind, width = describe_net(file, weights)
    if weights.metadata.get("part") == "backbone":
        raise TrainError(
            f"{file}: holds encoder and decoder, but no layer that restores crops; use load_encoder"
            ' or, with a bare net such as ResEncUNet, load_weights(net, file, part="backbone")'
        )
    net = build_net(
        kind,
        width=width,
        num_classes=None if head is None else len(head),
        decoder=weights.keys.has_decoder(own),
        activation="linear" if weights.metadata.get("normalise") == "zscore" else "sigmoid",
    )
    copy_weights(net, Weights(own, weights.metadata), file)
    return _set_eval_mode(net, weights)


def load_weights(
    net: nn.Module, file: str | Path, *, part: Part = "all", strict: bool = True
) -> KeyReport:
    """Copy a file's weights into a net.

    part
        "unet", "backbone" and "encoder" compare and load only the keys of that part. Of a file that
        holds the backbone only, as those of nnU-Net and nnssl, "all" and "unet" are that.
    strict
        Raise TrainError that lists every missing key, unexpected key and wrong shape, before
        anything is changed; otherwise load what fits and return the report.
    """
    require_choice("part", part, PARTS, error=SettingError)
    return copy_weights(net, read_weights(file, part=part), file, part=part, strict=strict)


def copy_weights(
    net: nn.Module, weights: Weights, file: str | Path, *, part: Part = "all", strict: bool = True
) -> KeyReport:
    """Copy weights that were read from a file into a net; see `load_weights`."""
    if weights.metadata.get("part") == "backbone" and part in ("all", "unet"):
        part = "backbone"  # all that the file has
    theirs, ours = find_kind(weights.tensors), find_kind(net.state_dict())
    if strict and theirs and ours and theirs != ours:
        raise TrainError(
            f"{file}: holds weights of the net {theirs}, not of {ours}; use net {theirs}"
        )
    hint = '; use the same width, or load only part "unet", "backbone" or "encoder"'
    prefixes = weights.keys.prefixes(part)
    return copy_tensors(
        net,
        weights.tensors,
        file,
        prefixes=prefixes,
        known=weights.known,
        strict=strict,
        hint=hint,
    )


def copy_tensors(
    net: nn.Module,
    theirs: dict[str, Tensor],
    file: str | Path,
    *,
    prefixes: tuple[str, ...] = ("",),
    known: tuple[str, ...] = ("",),
    strict: bool = True,
    hint: str = "",
) -> KeyReport:
    """Copy tensors into a net, only those whose keys have one of the prefixes; see `load_weights`.

    known
        Prefixes of the keys that may be left out; all others are unexpected.
    file, hint
        For the message of an error: where the tensors come from, and how to fix it.
    """

    def considered(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key.startswith(prefixes)]

    ours = net.state_dict()
    shared = [key for key in considered(ours) if key in theirs]
    fitting = tuple(key for key in shared if theirs[key].shape == ours[key].shape)
    report = KeyReport(
        loaded=fitting,
        missing=tuple(key for key in considered(ours) if key not in theirs),
        unexpected=tuple(
            key
            for key in theirs
            if key not in ours and (key.startswith(prefixes) or not key.startswith(known))
        ),
        wrong_shape=tuple(
            f"{key} {tuple(theirs[key].shape)} for {tuple(ours[key].shape)}"
            for key in shared
            if key not in fitting
        ),
    )
    problems = [
        f"{name}: {', '.join(keys)}"
        for name, keys in (
            ("missing", report.missing),
            ("unexpected", report.unexpected),
            ("wrong shape", report.wrong_shape),
        )
        if keys
    ]
    if strict and (problems or not fitting):
        raise TrainError(
            f"{file}: weights do not fit the net;"
            f" {'; '.join(problems) or 'no keys in common'}{hint}"
        )
    net.load_state_dict({**ours, **{key: theirs[key] for key in fitting}})
    return report


def parse_checkpoint(file: Path, content: dict[str, Any], part: Part) -> Weights:
    """Weights of a pretrained run, or the net in a fine-tuned one, from a checkpoint's content.

    part
        See `read_weights`.
    """
    config, tensors = content["config"], content["model"]
    if "task" in content:
        body = "body."
        tensors = {k.removeprefix(body): t for k, t in tensors.items() if k.startswith(body)}
    metadata = {
        "net": find_kind(tensors),
        "width": find_width(tensors),
        "num_classes": content.get("num_classes"),
        "fingerprint": content["fingerprint"],
        "axes": OUR_AXES,
        "part": "all",
        "pretext": content.get("own_pretext") or config.get("pretext"),
        "step": content["progress"]["step"],
        "scans": content["scans"],
        "window_hu": content.get("window_hu"),  # None in older runs
        "normalise": content.get("normalise", "window"),
        "crop_shape": content.get("crop_shape"),
        "spacing_mm": content.get("spacing_mm"),
        "origins": content.get("origins", []),
    }
    own = content.get("own_net")
    if own:
        metadata |= {"net": None, "width": None, "own_net": own}
    weights = Weights(tensors, metadata)
    if own and not own["decodes"]:  # its decoder was not trained
        decoder = weights.keys.decoder
        tensors = {key: t for key, t in tensors.items() if not key.startswith(decoder)}
        weights = Weights(tensors, metadata)
    if part != "encoder" and weights.keys.has_decoder(tensors) and in_warmup(content):
        step = content["progress"]["step"]
        raise TrainError(
            f"{file}: the decoder is untrained: these weights are of step {step}, in the warm-up,"
            " which trains encoder and head only; train longer, or use part encoder"
        )
    return weights


def _from_nnunet(file: Path, content: dict[str, Any]) -> Weights:
    """Weights of a checkpoint of nnU-Net or nnssl, or of our exports for them."""
    tensors, earlier, origin = nnunet.parse_checkpoint(file, content)
    kind = find_kind(tensors)
    used = keys_of(kind).prefixes("backbone")
    extra = [key for key in tensors if not key.startswith(used)]
    if extra:
        _log.warning("%s: not used: %s", file, ", ".join(extra))
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(used)}
    metadata = {
        **earlier,
        "net": kind,
        "width": find_width(tensors),
        "axes": OUR_AXES,
        "part": "backbone" if keys_of(kind).has_decoder(tensors) else "encoder",
        "origins": [*earlier.get("origins", []), *([origin.to_json()] if origin else [])],
    }
    return Weights(tensors, metadata)


def _with_axes(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Weights:
    """Weights in our order of axes, from an export or an official file."""
    if metadata.get("axes") == OUR_AXES:
        return Weights(tensors, metadata)
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if FIRST_OF_GENESIS not in tensors:
        raise TrainError(f"{file}: not U-Net weights; expected keys such as {FIRST_OF_GENESIS}")
    return Weights(reverse_axes(tensors), {**metadata, "axes": GENESIS_AXES})


def reverse_axes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels with their spatial axes reversed, x-y-z to z-y-x or back; other tensors unchanged."""
    return {
        key: tensor.permute(0, 1, 4, 3, 2).contiguous() if tensor.ndim == 5 else tensor
        for key, tensor in tensors.items()
    }


def describe_net(file: str | Path, weights: Weights) -> tuple[NetName, int]:
    """Name and width of the net; TrainError for a net of one's own, and without an encoder."""
    own = weights.metadata.get("own_net")
    if own:
        raise TrainError(
            f"{file}: holds weights of a net of your own ({own['class']}); build that net, and load"
            " them from Python with load_weights"
        )
    kind, width = find_kind(weights.tensors), find_width(weights.tensors)
    if kind is None or width is None:
        raise TrainError(
            f"{file}: holds no encoder of a net of semgen; export --part encoder or all of a run of"
            " semgen pretrain"
        )
    return kind, width


def _set_eval_mode(net: Net, weights: Weights) -> Net:
    """Set eval mode; batch norm of official nets uses the statistics of each batch."""
    if "fingerprint" not in weights.metadata and weights.metadata["axes"] == GENESIS_AXES:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    return channels_last(net).eval()


def _is_safetensors(file: Path) -> bool:
    """Whether the file begins like safetensors: the length of a JSON header, then the header."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 32


def _from_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, framework="pt") as archive:
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
            metadata = json.loads((archive.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise TrainError(f"{file}: broken safetensors file ({error}); export it again") from error
    return _with_axes(file, tensors, metadata)
