"""Set up a pretraining run: resolved settings, datasets, the net with its weights."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from store import PatchStore, read_annotation
from store.decisions import list_excluded_members
from store.scans import scan_name
from trainer.checkpoint import LAST, refuse_other_run
from trainer.config import TrainConfig
from trainer.data.dataset import PatchDataset
from trainer.device import check_precision, pick_device, resolve_precision, set_precision
from trainer.errors import TrainError
from trainer.nets.backbone import check_outputs, check_protocol, check_shape
from trainer.nets.pretraining import PretrainingNet, seeded_weights
from trainer.nets.registry import build_backbone, build_net
from trainer.pretexts import Pretext, find_pretext
from trainer.ranks import Ranks, sync_batch_norm
from trainer.recipe import trained_weights
from trainer.recompute import recompute_stages
from trainer.weights import Weights, copy_weights, read_weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The parts of a pretraining run."""

    config: TrainConfig
    """With all defaults resolved that depend on the store, the device or a checkpoint."""
    device: torch.device
    ranks: Ranks
    pretext: Pretext
    train: PatchDataset
    validation: PatchDataset
    net: PretrainingNet
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
    own_net: nn.Module | None = None,
    own_pretext: type[Pretext] | None = None,
    saved: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Setup:
    """Set up a new run, or the one of a checkpoint's content `saved`.

    own_net, own_pretext
        A net and a pretext task to train instead of those that the settings name.

    Raises TrainError when settings or net do not suit the store, the device or the checkpoint.
    """
    ranks = ranks or Ranks()
    device = pick_device(config.device, ranks)
    config = resolve_precision(config, device)
    config = resolve_selection(config, store, saved=saved)
    initial = None if saved or not config.init else read_weights(config.init, part=config.init_part)
    config = resolve_normalise(config, initial, saved=saved)
    shape = store.crop_shape
    config = resolve_own(config, net=own_net, pretext=own_pretext)
    pretext = (own_pretext or find_pretext(config))(shape, config)
    sketch = _sketch_net(config, pretext, own_net)
    check_shape(shape, sketch, pretext.parts_per_axis)
    check_precision(config.precision, device, shape, pretext.parts_per_axis, factor=sketch.factor)
    set_precision(config.precision)

    train, validation = _open_datasets(store, config, device, ranks)
    if not len(train):
        name = store.location.name
        raise TrainError(f"{name}: no train crops left; choose more scales or classes")
    config = resolve_warmup(config, pretext, len(train), saved=saved)
    fingerprint = store.fingerprint or ""
    own = _describe_own(own_net, own_pretext, pretext)
    if saved:
        config = resolve_init(config, saved=saved)
        _refuse_other_own(run / LAST, own, saved=saved)
        refuse_other_run(
            run / LAST, saved, fingerprint=fingerprint, config=config, num_processes=ranks.size
        )

    num_classes = store.num_classes if config.classify else None
    net = _build_net(config, pretext, num_classes, own_net, initial, saved=saved)
    net.to(device)
    if config.sync_batch_norm and ranks.size > 1:
        sync_batch_norm(net)
    if config.recompute:
        stages = net.stages()
        if not stages:
            raise TrainError(
                "recompute needs a net with a method stages, which lists its blocks; add one, or"
                " leave recompute out"
            )
        recompute_stages(stages)
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
            **_inherit(initial, saved=saved, used=_list_scans(store, train, validation)),
            "window_hu": list(store.window_hu),
            "normalise": config.normalise,
            "crop_shape": list(shape),
            "spacing_mm": store.config.get("spacing_mm"),
            **own,
        },
    )


# Settings that depend on the store or on the run to resume


def resolve_selection(
    config: TrainConfig, store: PatchStore, *, saved: dict[str, Any] | None = None
) -> TrainConfig:
    """The config with excluded classes and members: the checkpoint's, else the annotation's."""
    classes, members = config.excluded_classes, config.excluded_members
    if classes is None and saved:
        classes = saved["config"]["excluded_classes"]
    if classes is None:
        classes = read_annotation(store.location).excluded
    if members is None and saved:
        members = saved["config"]["excluded_members"]
    if members is None:
        members = list_excluded_members(store)
    return dataclasses.replace(
        config, excluded_classes=tuple(classes), excluded_members=tuple(members)
    )


def resolve_init(config: TrainConfig, *, saved: dict[str, Any]) -> TrainConfig:
    """The config with `init` as in the checkpoint, unless it is given."""
    if config.init is not None:
        return config
    before = saved["config"]
    return dataclasses.replace(config, init=before["init"], init_part=before["init_part"])


def resolve_normalise(
    config: TrainConfig, initial: Weights | None = None, *, saved: dict[str, Any] | None = None
) -> TrainConfig:
    """The config with `normalise` as given, else of the checkpoint, else of the initial weights.

    "window" where none of them says.
    """
    found: Any = config.normalise
    if found is None and saved:
        found = saved["config"].get("normalise")
    elif found is None and initial:
        found = initial.metadata.get("normalise")
    return dataclasses.replace(config, normalise=found or "window")


def resolve_own(
    config: TrainConfig, *, net: nn.Module | None, pretext: type[Pretext] | None
) -> TrainConfig:
    """The config with None for what is one's own; TrainError where there is no net."""
    if pretext is not None and not isinstance(pretext, type):
        raise TrainError(
            f"pretext must be a subclass of Pretext, got {pretext!r}; name a task of semgen in"
            " TrainConfig(pretext=...)"
        )
    if net is None and config.net is None:
        raise TrainError("net is None: name a net, or pass one as pretrain(..., net=...)")
    return dataclasses.replace(
        config,
        net=config.net if net is None else None,
        pretext=config.pretext if pretext is None else None,
    )


def resolve_warmup(
    config: TrainConfig,
    pretext: Pretext,
    steps_per_epoch: int,
    *,
    saved: dict[str, Any] | None = None,
) -> TrainConfig:
    """The config with `warmup_epochs` as given, else of the checkpoint, else a tenth of the run.

    Raises TrainError when the warm-up would take all epochs.
    """
    before = saved["config"].get("warmup_epochs") if saved else None
    epochs = min(config.epochs, -(-(config.steps or 2**62) // steps_per_epoch))
    if not (config.classify and pretext.metric):
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


# Data, net and facts


def _open_datasets(
    store: PatchStore, config: TrainConfig, device: torch.device, ranks: Ranks
) -> tuple[PatchDataset, PatchDataset]:
    """The training and the validation crops. `scales` and `fraction` select training crops only."""
    common: dict[str, Any] = {
        "classes": config.classes,
        "excluded_classes": config.excluded_classes,
        "excluded_members": config.excluded_members,
        "seed": config.seed,
        "threads": config.threads,
        "cache": config.cache,
        "device": device,
        "normalise": config.normalise,
        "skip_corrupt": config.skip_corrupt,
        "ranks": ranks,
    }
    batches = config.validation_batches
    return PatchDataset(
        store,
        "train",
        batch_size=config.batch_size,
        scales=config.scales,
        fraction=config.fraction,
        **common,
    ), PatchDataset(
        store,
        "validation",
        batch_size=config.batch_size // config.accumulate,
        max_batches=None if batches is None else batches * config.accumulate,
        **common,
    )


def _build_net(
    config: TrainConfig,
    pretext: Pretext,
    num_classes: int | None,
    own_net: Any,
    initial: Weights | None,
    *,
    saved: dict[str, Any] | None,
) -> PretrainingNet:
    """The net on the CPU, with weights of the checkpoint, of `init`, or drawn by the seed.

    A net of one's own is copied, and brings its initial weights; those of heads are drawn.
    """
    parts: dict[str, Any] = {
        "num_classes": num_classes,
        "decoder": pretext.decodes,
        "head": pretext.make_head,
        "parts_per_axis": pretext.parts_per_axis,
        "activation": "linear" if config.normalise == "zscore" else "sigmoid",
    }
    if own_net is None:
        assert config.net is not None
        net = build_net(config.net, width=config.width, seed=config.seed, **parts)
    else:
        with seeded_weights(config.seed):
            net = PretrainingNet(copy.deepcopy(own_net).cpu(), **parts)
    if saved:
        net.load_state_dict(trained_weights(saved))
    elif initial:
        assert config.init is not None
        copy_weights(net, initial, config.init, part=config.init_part)
    return net


def _sketch_net(config: TrainConfig, pretext: Pretext, own_net: nn.Module | None) -> Any:
    """The net to train without its weights, or one's own, checked."""
    if own_net is not None:
        check_protocol(own_net, decoder=pretext.decodes)
        check_outputs(own_net, decoder=pretext.decodes)
        return own_net
    assert config.net is not None
    with torch.device("meta"):
        return build_backbone(config.net, config.width)


def _describe_own(net: Any, own_pretext: type[Pretext] | None, pretext: Pretext) -> dict[str, Any]:
    """What checkpoints record of a net and a pretext task of one's own."""
    facts: dict[str, Any] = {}
    if own_pretext is not None:
        facts["own_pretext"] = own_pretext.__name__
    if net is not None:
        facts["own_net"] = {
            "class": type(net).__name__,
            "encoder_keys": list(net.encoder_keys),
            "decoder_keys": list(getattr(net, "decoder_keys", ())),
            "decodes": pretext.decodes,
        }
    return facts


def _refuse_other_own(path: Path, own: dict[str, Any], *, saved: dict[str, Any]) -> None:
    """Raise TrainError when a checkpoint is of another net or task of one's own than is given."""
    for kind, fact, text in (("net", "own_net", "net"), ("pretext", "own_pretext", "pretext task")):
        before = saved.get(fact)
        if before is not None and before != own.get(fact):
            name = before["class"] if fact == "own_net" else before
            raise TrainError(
                f"{path}: trains a {text} of your own, {name}; resume it from Python with"
                f" pretrain(..., {kind}=...) and the same {text}"
            )


def _inherit(
    initial: Weights | None, *, saved: dict[str, Any] | None, used: list[str]
) -> dict[str, Any]:
    """Scans that the weights depend on, so that nobody tests on them, and others' initial weights.

    used
        Ids of the scans of this run.
    """
    earlier = saved or (initial.metadata if initial else {})
    return {
        "scans": sorted({*earlier.get("scans", []), *used}),
        "origins": earlier.get("origins", []),
    }


def _list_scans(store: PatchStore, train: PatchDataset, validation: PatchDataset) -> list[str]:
    """Ids of all scans of a run."""
    rows = np.concatenate(
        [store.train.scan[train.plan.rows], store.validation.scan[validation.plan.rows]]
    )
    return [scan_name(store.scans.id[row]) for row in np.unique(rows)]
