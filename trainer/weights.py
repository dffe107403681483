"""Weights in and out: ours, and those of the official Semantic and Models Genesis.

Nothing executes code on loading. Official arrays are (x, y, z): their kernels are turned to our
(z, y, x) on the way in, and back on the way out.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from trainer.checkpoint import BEST, LAST, load_checkpoint
from trainer.errors import TrainError
from trainer.nets.unet import PARTS, Encoder3D, UNet3D

FORMATS = ("safetensors", "torch", "genesis")
_SUFFIXES = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}
OURS, GENESIS = "z,y,x", "x,y,z"
METADATA_KEY = "semgen"
Net = TypeVar("Net", bound=nn.Module)
_FIRST, _HEAD = "down_tr64.ops.0.conv1.weight", "clc_out.fc1.weight"


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by state_dict key, and what is known about them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    """width, num_classes, fingerprint, axes, part, pretext, step, scans (pseudonyms of those that
    were learned from), window_hu. Official files have none of it but axes: "x,y,z", though
    `tensors` are turned already."""


@dataclass(frozen=True, slots=True)
class KeyReport:
    """How a file's keys met a net's."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Of the net, not in the file."""
    unexpected: tuple[str, ...]
    """In the file, not of the net."""
    misshapen: tuple[str, ...]
    """In both with different shapes, as "key (file shape) for (net shape)"."""


def export_weights(
    run: str | Path, file: str | Path, *, format: str | None = None, part: str = "all"
) -> dict[str, Any]:
    """Write a run's best weights (the last where none was chosen) and return their metadata.

    format
        "safetensors", "torch" for a dict with `state_dict` and `metadata`, or "genesis" for what
        the official code loads: a dict with `state_dict`, its axes (x, y, z), without the head of
        a pretext task. None goes by the file's suffix: .safetensors, or .pt and .pth for "torch".
    part
        "all", "unet" (encoder and decoder), or "encoder" for what fine-tuning a new head needs.

    Raises TrainError when the suffix contradicts the format, and for a decoder that is still
    untrained because the run is in its warm-up.
    """
    run, file = Path(run), Path(file)
    _require("part", part, tuple(PARTS))
    best, chosen = _best_of(run), _choose_format(file, format)
    if file.resolve() in {(run / name).resolve() for name in (BEST, LAST)}:
        raise TrainError(f"{file}: a checkpoint of the run itself; give another FILE")
    weights = _from_checkpoint(best, load_checkpoint(best), part)
    tensors = {
        key: tensor.contiguous()
        for key, tensor in weights.tensors.items()
        if key.startswith(PARTS[part])
    }
    metadata = {**weights.metadata, "part": part}
    partial = file.with_name(file.name + ".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "safetensors":
        # one key: safetensors writes several in any order, and bytes must not vary
        partial.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(metadata)}))
    elif chosen == "torch":
        torch.save({"state_dict": tensors, "metadata": metadata}, partial)
    else:
        published = {k: t for k, t in tensors.items() if not k.startswith("pretext_out.")}
        torch.save({"state_dict": _turn(published)}, partial)
        metadata["axes"] = GENESIS
    partial.replace(file)
    return metadata


def _choose_format(file: Path, wanted: str | None) -> str:
    """The format of an export: the wanted one, or that of the suffix where none is wanted."""
    by_suffix = _SUFFIXES.get(file.suffix.lower())
    if wanted is None:
        if by_suffix is None:
            raise TrainError(
                f"{file}: no format is known by this suffix; end the name in"
                f" {', '.join(_SUFFIXES)}, or give --format"
            )
        return by_suffix
    _require("format", wanted, FORMATS)
    if by_suffix and (by_suffix == "safetensors") != (wanted == "safetensors"):
        raise TrainError(f"{file}: the suffix contradicts format {wanted!r}; change one of the two")
    return wanted


def read_weights(file: str | Path, *, part: str = "all") -> Weights:
    """Read a run's best, a checkpoint or export of ours, or an official one, told by content.

    A file without our metadata is taken for official: its kernels are turned, `module.` before
    keys is dropped. Raises TrainError for anything else.

    part
        What is wanted of them. All tensors are returned whatever it is, but anything more than the
        "encoder" is refused while a run is in its warm-up, which leaves the decoder untrained.
    """
    file = _best_of(Path(file)) if Path(file).is_dir() else Path(file)
    if not file.is_file():
        raise TrainError(f"{file}: no such file of weights")
    if _is_safetensors(file):
        return _from_safetensors(file)
    content = _load_torch(file)
    if isinstance(content, dict) and {"model", "config", "fingerprint"} <= content.keys():
        return _from_checkpoint(file, content, part)
    return _with_axes(file, *_take_tensors(file, content))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of any torch file that holds nothing else, as they are."""
    return _take_tensors(file, _load_torch(file))[0]


def _load_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings():  # about what then proves to be no file of tensors
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"{file}: expected safetensors or a torch file of plain tensors; "
            f"cannot be read as either ({type(error).__name__})"
        ) from error


def _take_tensors(file: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a dict of tensors, or one with `state_dict`."""
    if isinstance(content, dict):
        tensors = content.get("state_dict", content)
        if isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values()):
            return tensors, content.get("metadata") or {}
    raise TrainError(f"{file}: expected a dict of tensors, or one with `state_dict`")


def _best_of(run: Path) -> Path:
    """A run's checkpoint to use: the best, or the last where none was chosen.

    Where the best is of the warm-up and the last is not, the last: no joint validation chose yet.
    """
    best, last = run / BEST, run / LAST
    if not best.exists() and not last.exists():
        raise TrainError(f"{run}: no checkpoint here yet; run `semgen pretrain` first")
    if not best.exists():
        return last
    if not last.exists() or not _in_warmup(load_checkpoint(best)):
        return best
    return best if _in_warmup(load_checkpoint(last)) else last


def _in_warmup(content: dict[str, Any]) -> bool:
    """Whether a checkpoint is of the warm-up of a run, which trains encoder and head only."""
    return bool(content["config"].get("warmup_epochs")) and not content["progress"]["joint"]


def load_encoder(file: str | Path) -> Encoder3D:
    """The encoder of a file of weights, in eval mode, to build upon.

    Cubes (n, 1, Z, Y, X) float32, HU window mapped to [0, 1], sides multiples of 8 -> features
    (n, 16 width, Z/8, Y/8, X/8). `encode` gives the skips, too. See `load_unet`.
    """
    weights = read_weights(file, part="encoder")
    net = Encoder3D(width=find_width(file, weights))
    _copy(net, weights, file, part="encoder")
    return _in_mode(net, weights)


def load_unet(file: str | Path) -> UNet3D:
    """The net of a file of weights, in eval mode.

    Cubes (n, 1, Z, Y, X) float32, HU window mapped to [0, 1], sides multiples of 8 -> `Output`
    with `restored` (n, 1, Z, Y, X) where the file has a decoder, and `logits` (n, classes) where
    it has that head. A pretext task's own head is left out.

    Official weights were trained, and are meant to be used, with each batch's own statistics in
    batch norm, also in evaluation; nets loaded from them do so.

    Raises TrainError listing every missing, unexpected and misshapen key.
    """
    weights = read_weights(file)
    head = weights.tensors.get(_HEAD)
    own = {k: t for k, t in weights.tensors.items() if not k.startswith("pretext_out.")}
    net = UNet3D(
        width=find_width(file, weights),
        num_classes=None if head is None else len(head),
        decoder=any(key.startswith("up_tr") for key in own),
    )
    _copy(net, Weights(own, weights.metadata), file)
    return _in_mode(net, weights)


def load_weights(
    net: nn.Module, file: str | Path, *, part: str = "all", strict: bool = True
) -> KeyReport:
    """Copy a file's weights into a net.

    part
        "unet" and "encoder" consider the keys of that part only, on both sides.
    strict
        Raise TrainError listing every missing, unexpected and misshapen key, before anything
        is changed; otherwise load what fits and return the report.
    """
    _require("part", part, tuple(PARTS))
    return _copy(net, read_weights(file, part=part), file, part=part, strict=strict)


def _copy(
    net: nn.Module, weights: Weights, file: str | Path, *, part: str = "all", strict: bool = True
) -> KeyReport:
    hint = ' (part "unet" or "encoder" takes less; width must be the same)'
    return copy_tensors(
        net, weights.tensors, file, beginnings=PARTS[part], strict=strict, hint=hint
    )


def copy_tensors(
    net: nn.Module,
    theirs: dict[str, Tensor],
    file: str | Path,
    *,
    beginnings: tuple[str, ...] = ("",),
    strict: bool = True,
    hint: str = "",
) -> KeyReport:
    """Copy into a net what a file holds of the keys that begin so; see `load_weights`."""

    def considered(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key.startswith(beginnings)]

    ours = net.state_dict()
    shared = [key for key in considered(ours) if key in theirs]
    fitting = tuple(key for key in shared if theirs[key].shape == ours[key].shape)
    report = KeyReport(
        loaded=fitting,
        missing=tuple(key for key in considered(ours) if key not in theirs),
        unexpected=tuple(key for key in considered(theirs) if key not in ours),
        misshapen=tuple(
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
            ("misshapen", report.misshapen),
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


def _from_checkpoint(file: Path, content: dict[str, Any], part: str) -> Weights:
    """Weights of a pretrained run, or the U-Net in a fine-tuned one; see `read_weights`."""
    config, tensors = content["config"], content["model"]
    has_decoder = any(key.startswith("up_tr") for key in tensors)
    if part != "encoder" and has_decoder and _in_warmup(content):
        step = content["progress"]["step"]
        raise TrainError(
            f"{file}: the decoder is untrained: these weights are of step {step}, in the warm-up,"
            " which trains encoder and head only; train longer, or take part encoder"
        )
    if "task" in content:
        body = "body."
        tensors = {k.removeprefix(body): t for k, t in tensors.items() if k.startswith(body)}
    metadata = {
        "width": len(tensors[_FIRST]) if _FIRST in tensors else None,
        "num_classes": content.get("num_classes"),
        "fingerprint": content["fingerprint"],
        "axes": OURS,
        "part": "all",
        "pretext": config.get("pretext"),
        "step": content["progress"]["step"],
        "scans": content["scans"],
        "window_hu": content.get("window_hu"),  # older runs do not say
    }
    return Weights(tensors, metadata)


def _with_axes(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Weights:
    """Weights in our axes, whoever wrote them."""
    if metadata.get("axes") == OURS:
        return Weights(tensors, metadata)
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if _FIRST not in tensors:
        raise TrainError(f"{file}: not U-Net weights; expected keys such as {_FIRST}")
    return Weights(_turn(tensors), {**metadata, "axes": GENESIS})


def _turn(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernels with their spatial axes reversed."""
    return {
        key: tensor.permute(0, 1, 4, 3, 2).contiguous() if tensor.ndim == 5 else tensor
        for key, tensor in tensors.items()
    }


def find_width(file: str | Path, weights: Weights) -> int:
    """Channels of the first convolution; TrainError when there is no encoder."""
    if _FIRST not in weights.tensors:
        raise TrainError(f"{file}: holds no encoder; export it with --part encoder or all")
    return len(weights.tensors[_FIRST])


def _in_mode(net: Net, weights: Weights) -> Net:
    """Eval mode; batch norm of official nets goes by each batch's own statistics."""
    if weights.metadata.get("axes") == GENESIS:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    return net.to(memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload,no-any-return]


def _is_safetensors(file: Path) -> bool:
    """Whether the file begins as safetensors does: the length of a JSON header, then the header."""
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


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
