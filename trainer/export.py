"""Export a run's weights to a file for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from store.atomic import replace_file
from trainer.checkpoint import BEST, LAST, load_best, write_torch
from trainer.config import Part
from trainer.errors import TrainError
from trainer.nets.registry import PARTS, find_kind
from trainer.weights import GENESIS_AXES, METADATA_KEY, check_choice, parse_checkpoint, reverse_axes

FORMATS = ("safetensors", "torch", "genesis")
_SUFFIXES = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}


def export_weights(
    run: str | Path, file: str | Path, *, format: str | None = None, part: Part = "all"
) -> dict[str, Any]:
    """Write a run's best weights (see `load_best`) to a file, and return their metadata.

    format
        "safetensors"; "torch", a dict with `state_dict` and `metadata`; or "genesis", which the
        official code loads: a dict with `state_dict`, its axes (x, y, z), without the head of a
        pretext task. None: by the file's suffix, "safetensors" for .safetensors, "torch" for .pt
        and .pth.
    part
        "all", "unet" (encoder and decoder), or "encoder".

    Raises TrainError when the suffix contradicts the format, and for a decoder that is still
    untrained because the run is in its warm-up.
    """
    run, file = Path(run), Path(file)
    check_choice("part", part, PARTS)
    best, content = load_best(run)
    chosen = _choose_format(file, format)
    if file.resolve() in {(run / name).resolve() for name in (BEST, LAST)}:
        raise TrainError(f"{file}: this is a checkpoint of the run itself; give another FILE")
    weights = parse_checkpoint(best, content, part)
    if chosen == "genesis" and find_kind(weights.tensors) != "genesis":
        raise TrainError(
            f"{best}: format genesis is for the net genesis only; use safetensors or torch"
        )
    prefixes = weights.keys.prefixes(part)
    tensors = {
        key: tensor.contiguous()
        for key, tensor in weights.tensors.items()
        if key.startswith(prefixes)
    }
    metadata = {**weights.metadata, "part": part}
    file.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "safetensors":
        # one key: safetensors writes several in any order, and the bytes must always be the same
        packed = save(tensors, metadata={METADATA_KEY: json.dumps(metadata)})
        with replace_file(file) as partial:
            partial.write_bytes(packed)
    elif chosen == "torch":
        write_torch(file, {"state_dict": tensors, "metadata": metadata})
    else:
        published = {k: t for k, t in tensors.items() if not k.startswith("pretext_out.")}
        write_torch(file, {"state_dict": reverse_axes(published)})
        metadata["axes"] = GENESIS_AXES
    return metadata


def _choose_format(file: Path, wanted: str | None) -> str:
    """The format of an export: the wanted one, or that of the suffix."""
    by_suffix = _SUFFIXES.get(file.suffix.lower())
    if wanted is None:
        if by_suffix is None:
            raise TrainError(
                f"{file}: this suffix belongs to no format; end the name in"
                f" {', '.join(_SUFFIXES)}, or give --format"
            )
        return by_suffix
    check_choice("format", wanted, FORMATS)
    if by_suffix and (by_suffix == "safetensors") != (wanted == "safetensors"):
        raise TrainError(f"{file}: the suffix contradicts format {wanted!r}; change one of the two")
    return wanted
