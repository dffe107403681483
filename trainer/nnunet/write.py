"""Write weights for nnU-Net (one file) and for nnssl's adaptation in nnU-Net (a folder)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from store.atomic import replace_file
from trainer.checkpoint import write_torch
from trainer.errors import TrainError
from trainer.nets.resenc import add_aliases
from trainer.nnunet.architecture import (
    CLASS_NAME,
    IMPORTED,
    IN_PROJECTION,
    Architecture,
    find_architecture,
    is_residual_encoder,
)
from trainer.nnunet.card import (
    Facts,
    describe_normalisation,
    list_citations,
    list_settings,
    write_card,
)
from trainer.nnunet.plans import adapt_plans, check_fit, read_plans
from trainer.nnunet.read import (
    ADAPTATION,
    CARD,
    CHECKPOINT,
    METADATA_KEY,
    PLAN_KEY,
    WEIGHTS_KEY,
    parse_origins,
)

CONFIG: Final = "config.json"
CONFIGURATION: Final = "3d_fullres"
_RESENC_L: Final = Architecture(
    features=(32, 64, 128, 256, 320, 320),
    blocks=(1, 3, 4, 6, 6, 6),
    decoder_convs=(1,) * 5,
    kernels=((3, 3, 3),) * 6,
    strides=((1, 1, 1), *((2, 2, 2),) * 5),
)
"""What nnU-Net and nnssl call "ResEncL"."""


def write_nnunet(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    plans: str | Path | None,
    configuration: str = CONFIGURATION,
    adapt: str | None = None,
) -> None:
    """Write a checkpoint for `nnUNetv2_train -pretrained_weights`, and adapted plans if wanted.

    tensors
        Of encoder and decoder, by the keys of nnU-Net, with or without aliases.
    plans
        Plans that the weights must fit, if given.
    adapt
        Name of adapted plans to write beside `plans`, where those do not fit.

    Raises TrainError, before anything is written, for weights of another net, without a decoder,
    and for plans that do not fit, naming what differs.
    """
    architecture = _require_residual_encoder(file, tensors)
    if architecture.decoder_convs is None or architecture.strides is None:
        raise TrainError(
            f"{file}: the weights have no decoder, which nnU-Net's -pretrained_weights needs;"
            " export with --format nnssl, which needs the encoder only"
        )
    if adapt is not None and plans is None:
        raise TrainError("adapt needs plans to adapt; give --plans PLANS.json")
    if plans is not None:
        chosen = read_plans(plans, configuration)
        if adapt is None:
            check_fit(chosen, architecture)
        else:
            adapt_plans(chosen, architecture, adapt)
    content = {WEIGHTS_KEY: _list_weights(tensors), METADATA_KEY: dict(metadata)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_torch(file, content)


def write_nnssl(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    licence: str | None = None,
    patch_size: tuple[int, ...] | None = None,
) -> None:
    """Write a folder as nnssl publishes: checkpoint, adaptation plan, config.json, model card.

    Nothing in it names a scan or a path of this machine.

    tensors
        Of the encoder, and of the decoder where it is trained, by the keys of nnU-Net.
    metadata, config
        Of the run; see `trainer.weights.Weights`.
    patch_size
        Recommended for fine-tuning, in voxels, z, y, x; by default, the shape of the crops.

    Raises TrainError, before anything is written, for weights of another net, a patch size that
    the strides do not divide, and a folder that holds other files.
    """
    architecture = _with_decoder(_require_residual_encoder(folder, tensors))
    shape = tuple(metadata.get("crop_shape") or ())
    if len(shape) != 3:
        raise TrainError(f"{folder}: the run does not record the shape of its crops; train it anew")
    patch_size = patch_size or shape
    _check_patch_size(patch_size, architecture)
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - _FILES):
        raise TrainError(f"{folder}: exists with other files; give a new folder")

    origins = parse_origins(metadata.get("origins"))
    facts = Facts(
        net=str(metadata["net"]),
        pretext=str(metadata.get("pretext")),
        classified=bool(config.get("classify")),
        num_scans=len(metadata.get("scans") or ()),
        num_classes=metadata.get("num_classes"),
        crop_shape=(shape[0], shape[1], shape[2]),
        spacing_mm=_read_spacing(metadata.get("spacing_mm")),
        normalise=describe_normalisation(metadata.get("normalise"), metadata.get("window_hu")),
        step=int(metadata["step"]),
        patch_size=patch_size,
        licence=licence,
        origins=origins,
        settings=list_settings(config),
        version=importlib.metadata.version("semgen"),
    )
    plan = _plan_adaptation(facts, architecture, metadata.get("normalise"))
    public = {k: v for k, v in metadata.items() if k not in ("scans", "fingerprint")}
    content = {
        WEIGHTS_KEY: _list_weights(tensors),
        PLAN_KEY: plan,
        "citations": list_citations(
            pretext=facts.pretext, classified=facts.classified, origins=origins
        ),
        "trainer_name": "semgen",
        "init_args": {},
        METADATA_KEY: {**public, "num_scans": facts.num_scans},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_torch(folder / CHECKPOINT, content)
    _write_text(folder / ADAPTATION, _to_json({**plan, "trainer_name": "semgen"}))
    described = dataclasses.asdict(facts) | {"origins": [o.to_json() for o in origins]}
    _write_text(folder / CONFIG, _to_json({"library_name": "semgen", **described}))
    _write_text(folder / CARD, write_card(facts))


_FILES: Final = {CHECKPOINT, ADAPTATION, CONFIG, CARD}


def _list_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder and decoder under all names of nnU-Net's net; each tensor is stored once."""
    return add_aliases({k: t for k, t in tensors.items() if k.startswith(("encoder.", "decoder."))})


def _require_residual_encoder(target: Path, tensors: Mapping[str, Tensor]) -> Architecture:
    if not is_residual_encoder(tensors):
        raise TrainError(
            f"{target}: the run's net is none of nnU-Net's; only runs with --net resenc-s,"
            " resenc-m or resenc-l can be exported for it"
        )
    return find_architecture(tensors)


def _with_decoder(architecture: Architecture) -> Architecture:
    """The architecture, with the decoder and the strides of our nets where it has none."""
    if architecture.strides is not None and architecture.decoder_convs is not None:
        return architecture
    ups = len(architecture.features) - 1
    return dataclasses.replace(
        architecture, decoder_convs=(1,) * ups, strides=((1, 1, 1), *((2, 2, 2),) * ups)
    )


def _check_patch_size(patch_size: tuple[int, ...], architecture: Architecture) -> None:
    factor = architecture.factor
    if len(patch_size) != 3 or any(
        side < least or side % least for side, least in zip(patch_size, factor, strict=False)
    ):
        raise TrainError(
            f"patch size must be three multiples of {' '.join(map(str, factor))} (z y x);"
            f" got {','.join(map(str, patch_size))}"
        )


def _plan_adaptation(
    facts: Facts, architecture: Architecture, normalise: str | None
) -> dict[str, Any]:
    """What nnssl calls the adaptation plan, of JSON values."""
    same = architecture == _RESENC_L
    spacing = None if facts.spacing_mm is None else list(facts.spacing_mm)
    style = "noresample" if spacing is None else "median"
    return {
        "architecture_plans": {
            "arch_class_name": "ResEncL" if same else CLASS_NAME.rpartition(".")[2],
            "arch_kwargs": None if same else architecture.describe(),
            "arch_kwargs_requiring_import": None if same else list(IMPORTED),
        },
        "pretrain_plan": {
            "dataset_name": "semgen",
            "plans_name": "semgen",
            "original_median_spacing_after_transp": spacing or [1.0, 1.0, 1.0],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {
                style: {
                    "data_identifier": f"semgen_{style}",
                    "preprocessor_name": "DefaultPreprocessor",
                    "spacing_style": style,
                    "normalization_schemes": [
                        "ZScoreNormalization" if normalise == "zscore" else "HUWindowTo01"
                    ],
                    "use_mask_for_norm": [False],
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": {
                        "is_seg": False, "order": 1, "order_z": 1, "force_separate_z": False,
                    },
                    "resampling_fn_mask": "resample_data_or_seg_to_shape",
                    "resampling_fn_mask_kwargs": {
                        "is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None,
                    },
                    "spacing": spacing,
                    "patch_size": list(facts.crop_shape),
                }
            },
            "experiment_planner_used": "semgen",
        },
        "pretrain_num_input_channels": architecture.input_channels,
        "recommended_downstream_patchsize": list(facts.patch_size),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": list(IN_PROJECTION),
        "key_to_lpe": None,
    }  # fmt: skip


def _read_spacing(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None  # "native": each scan's own
    return (float(value[0]), float(value[1]), float(value[2]))


def _to_json(content: Any) -> str:
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def _write_text(file: Path, text: str) -> None:
    with replace_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
