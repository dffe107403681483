"""Export a run's weights for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from store.atomic import replace_file
from store.errors import check_local
from store.settings import require_choice
from trainer.checkpoint import BEST, LAST, in_warmup, load_best, write_torch
from trainer.config import Part
from trainer.errors import SettingError, TrainError
from trainer.folder import CONFIG
from trainer.nets.registry import PARTS, find_kind
from trainer.nnunet.write import CONFIGURATION, write_nnssl, write_nnunet
from trainer.record import METRICS
from trainer.weights import (
    GENESIS_AXES,
    METADATA_KEY,
    Weights,
    parse_checkpoint,
    reverse_axes,
)

FORMATS = ("safetensors", "torch", "genesis", "nnunet", "nnssl")
_SUFFIXES = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}


def export_weights(
    run: str | Path,
    file: str | Path,
    *,
    format: str | None = None,
    part: Part = "all",
    plans: str | Path | None = None,
    configuration: str = CONFIGURATION,
    adapt: str | None = None,
    licence: str | None = None,
    patch_size: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Write a run's best weights (see `load_best`) to a file, and return their metadata.

    format
        "safetensors"; "torch", a dict with `state_dict` and `metadata`; or "genesis", which the
        official code loads: a dict with `state_dict`, its axes (x, y, z), and `metadata`, without
        the head of a pretext task. For residual encoder nets, also "nnunet", a checkpoint for
        `nnUNetv2_train -pretrained_weights`; and "nnssl", a folder for
        `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_train_pretrained`. None: by the file's
        suffix, "safetensors" for .safetensors, "torch" for .pt and .pth.
    part
        "all", "backbone" (encoder and decoder), "unet" (these and the layer that restores crops),
        or "encoder". Always "backbone" for "nnunet"; for "nnssl", too, or "encoder" where the
        decoder is not trained.
    plans, configuration, adapt
        For "nnunet": a plans file of nnU-Net and its configuration that the weights must fit; or,
        with a name in `adapt`, a copy of the plans with the net of the weights is written beside
        them, NAME.json.
    licence, patch_size
        For "nnssl": the licence in the model card, and the patch size (z, y, x) that it recommends,
        by default that of the crops.

    Raises TrainError when the suffix contradicts the format, for a decoder that is still untrained
    because the run is in its warm-up, and for plans that do not fit, naming what differs.
    """
    run, file = Path(run), Path(file)
    require_choice("part", part, PARTS, error=SettingError)
    _check_target(file)
    best, content = load_best(run)
    chosen = _choose_format(file, format)
    _check_options(
        chosen, nnunet={"plans": plans, "adapt": adapt},
        nnssl={"licence": licence, "patch_size": patch_size},
    )  # fmt: skip
    if chosen == "nnunet":
        part = "backbone"
    elif chosen == "nnssl":
        if "task" in content:
            raise TrainError(f"{run}: a fine-tuned run; format nnssl is for pretrained ones")
        part = "encoder" if in_warmup(content) else "backbone"
    weights = parse_checkpoint(best, content, part)
    if chosen == "genesis":
        _check_genesis(best, weights, part)
    prefixes = weights.keys.prefixes(part)
    tensors = {
        key: tensor.contiguous()
        for key, tensor in weights.tensors.items()
        if key.startswith(prefixes)
    }
    if not tensors:
        raise TrainError(f"{best}: not a net of semgen, whose parts are known; give part all")
    metadata = {**weights.metadata, "part": part}
    if chosen != "nnssl":
        file.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "safetensors":
        # one key: safetensors writes several in any order, and the bytes must always be the same
        packed = save(tensors, metadata={METADATA_KEY: json.dumps(metadata)})
        with replace_file(file) as partial:
            partial.write_bytes(packed)
    elif chosen == "nnunet":
        write_nnunet(file, tensors, metadata, plans=plans, configuration=configuration, adapt=adapt)
    elif chosen == "nnssl":
        config = content["config"]
        write_nnssl(file, tensors, metadata, config, licence=licence, patch_size=patch_size)
    elif chosen == "torch":
        write_torch(file, {"state_dict": tensors, "metadata": metadata})
    else:
        published = {k: t for k, t in tensors.items() if not k.startswith("pretext_out.")}
        metadata["axes"] = GENESIS_AXES
        write_torch(file, {"state_dict": reverse_axes(published), "metadata": metadata})
    return metadata


def _check_target(file: Path) -> None:
    """Raise an error for a URL and for a file of a run."""
    check_local(file)
    if file.name in (BEST, LAST, CONFIG, METRICS) and (file.parent / CONFIG).exists():
        raise TrainError(f"{file}: this is a file of a run; give another FILE")


def _check_genesis(best: Path, weights: Weights, part: Part) -> None:
    """Raise TrainError for weights that the official code cannot use."""
    if find_kind(weights.tensors) != "genesis":
        raise TrainError(
            f"{best}: format genesis is for the net genesis only; use safetensors or torch"
        )
    if weights.metadata["normalise"] == "zscore" and part in ("all", "unet"):
        raise TrainError(
            f"{best}: restores z-scores, and the official net restores 0 to 1; give part backbone"
            " or encoder"
        )


def _check_options(chosen: str, **options: dict[str, Any]) -> None:
    """Raise TrainError for an option that belongs to another format than the chosen one."""
    for owner, values in options.items():
        for name, value in values.items():
            if value is not None and chosen != owner:
                option = name.replace("_", "-")
                raise TrainError(f"{option} is for format {owner} only; the format is {chosen}")


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
    require_choice("format", wanted, FORMATS, error=SettingError)
    if wanted == "nnssl":
        return wanted  # a folder
    if file.is_dir():
        raise TrainError(f"{file}: is a folder; give a FILE in it")
    if by_suffix and (by_suffix == "safetensors") != (wanted == "safetensors"):
        raise TrainError(f"{file}: the suffix contradicts format {wanted!r}; change one of the two")
    return wanted
