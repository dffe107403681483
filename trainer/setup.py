"""Set up a pretraining run: resolved settings, streams of crops, the net with its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from store import PatchStore, read_annotation
from store.format import format_rows
from store.geometry import scan_name
from trainer.checkpoint import LAST, refuse_other_run
from trainer.config import TrainConfig
from trainer.data.stream import Stream, open_stream
from trainer.device import check_precision, pick_device, resolve_precision, set_precision
from trainer.errors import TrainError
from trainer.nets.unet import UNet3D, build_unet, check_shape
from trainer.pretexts import PRETEXTS, Pretext
from trainer.ranks import Ranks, sync_batch_norm
from trainer.recipe import trained_weights
from trainer.recompute import recompute_stages
from trainer.weights import load_weights, read_weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The parts of a pretraining run."""

    config: TrainConfig
    """With all defaults resolved that depend on the store, the device or a checkpoint."""
    device: torch.device
    ranks: Ranks
    pretext: Pretext
    train: Stream
    validation: Stream
    net: UNet3D
    num_classes: int
    """Classes of the store, those not used included."""
    facts: dict[str, Any]
    """What checkpoints record of the data: see `trainer.weights.Weights`."""

    @property
    def warmup_epochs(self) -> int:
        """Epochs of the warm-up; 0 for none."""
        return self.config.warmup_epochs or 0


def set_up(
    store: PatchStore,
    run: Path,
    config: TrainConfig,
    *,
    saved: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Setup:
    """Set up a new run, or the one of a checkpoint's content `saved`.

    Raises TrainError when settings do not suit the store, the device or the checkpoint.
    """
    ranks = ranks or Ranks()
    device = pick_device(config.device, ranks)
    config = resolve_precision(config, device)
    config = resolve_selection(config, store, saved=saved)
    shape = store.crop_shape
    pretext = PRETEXTS[config.pretext](shape, config)
    check_shape(shape, pretext.parts_per_axis)
    check_precision(config.precision, device, shape, pretext.parts_per_axis)
    set_precision(config.precision)

    train = open_stream(store, store.train, config, device, ranks)
    validation = open_stream(store, store.validation, config, device, ranks)
    if not len(train.plan):
        raise TrainError(f"{store.path.name}: no train crops left; choose more scales or classes")
    config = resolve_warmup(config, len(train.plan), saved=saved)
    fingerprint = store.fingerprint or ""
    if saved:
        config = resolve_init(config, saved=saved)
        refuse_other_run(
            run / LAST, saved, fingerprint=fingerprint, config=config, num_processes=ranks.size
        )

    num_classes = store.num_classes if config.classify else None
    net = _build_net(config, pretext, num_classes, saved=saved)
    net.to(device)
    if config.sync_batch_norm and ranks.size > 1:
        sync_batch_norm(net)
    if config.recompute:
        recompute_stages(net.stages())
    if config.compile:
        net.compile()
    return Setup(
        config=config,
        device=device,
        ranks=ranks,
        pretext=pretext,
        train=train,
        validation=validation,
        net=net,
        num_classes=store.num_classes,
        facts={
            "fingerprint": fingerprint,
            "num_classes": num_classes,
            "scans": _list_scans(store, train, validation, config, saved=saved),
            "window_hu": list(store.window_hu),
        },
    )


# Settings that depend on the store or on the run to resume


def resolve_selection(
    config: TrainConfig, store: PatchStore, *, saved: dict[str, Any] | None = None
) -> TrainConfig:
    """The config with `excluded_classes` set: from the checkpoint, else from the annotations.

    Raises TrainError for a class that the store does not have.
    """
    for name in ("classes", "excluded_classes"):
        unknown = [c for c in getattr(config, name) or () if not 0 <= c < store.num_classes]
        if unknown:
            raise TrainError(
                f"{name}: the store has classes 0 to {store.num_classes - 1},"
                f" not {format_rows(unknown)}"
            )
    if config.excluded_classes is not None:
        return config
    excluded = saved["config"].get("excluded_classes") if saved else None
    if excluded is None:
        excluded = read_annotation(store.path).excluded
    return dataclasses.replace(config, excluded_classes=tuple(excluded))


def resolve_init(config: TrainConfig, *, saved: dict[str, Any]) -> TrainConfig:
    """The config with `init` as in the checkpoint, unless it is given."""
    if config.init is not None:
        return config
    before = saved["config"]
    return dataclasses.replace(config, init=before["init"], init_part=before["init_part"])


def resolve_warmup(
    config: TrainConfig, steps_per_epoch: int, *, saved: dict[str, Any] | None = None
) -> TrainConfig:
    """The config with `warmup_epochs` as given, else of the checkpoint, else a tenth of the run.

    Raises TrainError when the warm-up would take all epochs.
    """
    before = saved["config"].get("warmup_epochs") if saved else None
    epochs = min(config.epochs, -(-(config.steps or 2**62) // steps_per_epoch))
    if not (config.classify and PRETEXTS[config.pretext].metric):
        warmup = 0
    elif config.warmup_epochs is None:
        warmup = epochs // 10 if before is None else before
    else:
        warmup = config.warmup_epochs
    if warmup and warmup >= epochs:
        raise TrainError(
            f"warmup_epochs must be less than the epochs of the run: got {warmup} of {epochs}"
            f" ({steps_per_epoch} steps each); lower warmup_epochs or train longer"
        )
    return dataclasses.replace(config, warmup_epochs=warmup)


# Net and facts


def _build_net(
    config: TrainConfig,
    pretext: Pretext,
    num_classes: int | None,
    *,
    saved: dict[str, Any] | None,
) -> UNet3D:
    """The net on the CPU, with weights of the checkpoint, of `init`, or drawn by the seed."""
    net = build_unet(
        seed=config.seed,
        width=config.width,
        num_classes=num_classes,
        decoder=pretext.decodes,
        head=pretext.make_head,
        parts_per_axis=pretext.parts_per_axis,
    )
    if saved:
        net.load_state_dict(trained_weights(saved))
    elif config.init:
        load_weights(net, config.init, part=config.init_part)
    return net


def _list_scans(
    store: PatchStore,
    train: Stream,
    validation: Stream,
    config: TrainConfig,
    *,
    saved: dict[str, Any] | None,
) -> list[str]:
    """Ids of all scans that the weights depend on, so that nobody tests on them by mistake."""
    earlier: list[str] = []
    if saved:
        earlier = saved["scans"]
    elif config.init:
        earlier = read_weights(config.init, part=config.init_part).metadata.get("scans", [])
    used = np.concatenate(
        [store.train.scan[train.plan.rows], store.validation.scan[validation.plan.rows]]
    )
    return sorted({*earlier, *(scan_name(store.scans.id[row]) for row in np.unique(used))})
