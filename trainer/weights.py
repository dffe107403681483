"""Weights in and out: exports for others, and starting from weights that we wrote.

Nothing executes code on loading. Kernels of other axis orders are turned here, too, once
there are readers for other people's layouts.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from trainer.checkpoint import BEST, LAST, load_checkpoint
from trainer.config import PARTS
from trainer.errors import TrainError

FORMATS = ("safetensors", "torch")
AXES = "z,y,x"
METADATA_KEY = "semgen"
ENCODER_PREFIX = "down_tr"


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by state_dict key, and what is known about them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    """width, num_classes, fingerprint, axes, part, pretext, step; empty where the file has none."""


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
    run: str | Path, file: str | Path, *, format: str = "safetensors", part: str = "all"
) -> dict[str, Any]:
    """Write a run's best weights (the last where none was chosen) and return their metadata.

    format
        "safetensors", or "torch" for a dict with `state_dict` and `metadata`.
    part
        "all", or "encoder" for what fine-tuning a new head needs.
    """
    run, file = Path(run), Path(file)
    _require("format", format, FORMATS)
    _require("part", part, PARTS)
    source = run / BEST if (run / BEST).exists() else run / LAST
    if not source.exists():
        raise TrainError(f"{run}: no checkpoint here yet; run `semgen pretrain` first")
    weights = _from_checkpoint(load_checkpoint(source))
    tensors = {
        key: tensor.contiguous()
        for key, tensor in weights.tensors.items()
        if part == "all" or key.startswith(ENCODER_PREFIX)
    }
    metadata = {**weights.metadata, "part": part}
    partial = file.with_name(file.name + ".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    if format == "safetensors":
        # one key: safetensors writes several in any order, and bytes must not vary
        partial.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(metadata)}))
    else:
        torch.save({"state_dict": tensors, "metadata": metadata}, partial)
    partial.replace(file)
    return metadata


def read_weights(file: str | Path) -> Weights:
    """Read one of our checkpoints or exports, told apart by content; TrainError otherwise."""
    file = Path(file)
    if not file.is_file():
        raise TrainError(f"{file}: no such file of weights")
    if _is_safetensors(file):
        return _from_safetensors(file)
    try:
        with warnings.catch_warnings():  # about what then proves to be no file of tensors
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainError(
            f"{file}: expected safetensors or a torch file of plain tensors; "
            f"cannot be read as either ({type(error).__name__})"
        ) from error
    if isinstance(content, dict) and {"model", "config", "fingerprint"} <= content.keys():
        return _from_checkpoint(content)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        return Weights(content["state_dict"], content.get("metadata", {}))
    raise TrainError(f"{file}: expected a checkpoint or an export of semgen, got something else")


def load_weights(
    net: nn.Module, file: str | Path, *, part: str = "all", strict: bool = True
) -> KeyReport:
    """Copy a file's weights into a net.

    part
        "encoder" considers the encoder's keys only, on both sides.
    strict
        Raise TrainError listing every missing, unexpected and misshapen key, before anything
        is changed; otherwise load what fits and return the report.
    """
    _require("part", part, PARTS)

    def considered(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if part == "all" or key.startswith(ENCODER_PREFIX)]

    theirs, ours = read_weights(file).tensors, net.state_dict()
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
            f"{file}: weights do not fit the net; {'; '.join(problems) or 'no keys in common'}"
            ' (part "encoder" takes the encoder alone; width must be the same)'
        )
    net.load_state_dict({**ours, **{key: theirs[key] for key in fitting}})
    return report


def _from_checkpoint(content: dict[str, Any]) -> Weights:
    config, progress = content["config"], content["progress"]
    metadata = {
        "width": config["width"],
        "num_classes": content["num_classes"],
        "fingerprint": content["fingerprint"],
        "axes": AXES,
        "part": "all",
        "pretext": config["pretext"],
        "step": progress["step"],
    }
    return Weights(content["model"], metadata)


def _is_safetensors(file: Path) -> bool:
    """Whether the file begins as safetensors does: the length of a JSON header, then the header."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 32


def _from_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, framework="pt") as archive:
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
            return Weights(tensors, json.loads((archive.metadata() or {}).get(METADATA_KEY, "{}")))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise TrainError(f"{file}: broken safetensors file ({error}); export it again") from error


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TrainError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
