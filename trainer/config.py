"""Settings of a training run, checked when made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from store.format import format_rows
from store.settings import check_types
from trainer.data.cache import MODES
from trainer.errors import TrainError
from trainer.nets.unet import PARTS
from trainer.pretexts import PRETEXTS
from trainer.transforms.perturb import NUM_BLOCKS

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
SCHEDULES = ("step", "plateau")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """What every training has."""

    free_to_change: ClassVar[frozenset[str]] = frozenset(
        {"epochs", "steps", "patience", "device", "threads", "checkpoint_every",
         "checkpoint_minutes", "validate_every", "log_every"}
    )  # fmt: skip
    """Settings that may differ when a run is resumed; all others must be the same."""

    batch_size: int = 64
    """Examples of one optimiser step, over all processes."""
    epochs: int = 200
    """Maximum number of epochs."""
    steps: int | None = None
    """Maximum number of optimiser steps; None: `epochs` decides."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam."""
    lr_schedule: str = "step"
    """"step" cuts the learning rate every `lr_step_epochs` epochs, "plateau" after as many epochs
    without a better validation loss."""
    lr_step_epochs: int = 40
    """Epochs between two cuts of the learning rate."""
    lr_gamma: float = 0.5
    """Factor of each cut."""
    lr_minimum: float = 0.0
    """Lower limit of the learning rate."""
    patience: int = 50
    """Epochs without a better validation loss after which the run stops."""
    seed: int = 0
    """Seed of initial weights, row order and perturbations."""
    device: str = "auto"
    """Any torch device; "auto" takes a GPU where there is one."""
    precision: str = "auto"
    """"fp32", "tf32", "bf16" (automatic mixed precision), or "auto": bf16 on a GPU, else fp32."""
    checkpoint_every: int = 500
    """Steps between checkpoints, in addition to one after each epoch."""
    checkpoint_minutes: float = 10.0
    """Minutes after which a checkpoint is written at the next step. Under several processes, at
    the next multiple of `log_every`."""
    validate_every: int = 1
    """Epochs between validations, in addition to one at the end."""
    log_every: int = 10
    """Steps between lines of metrics; each is the mean since the line before."""

    def __post_init__(self) -> None:
        check_types(self, error=TrainError)
        for name in ("batch_size", "epochs", "lr_step_epochs", "patience", "checkpoint_every",
                     "validate_every", "log_every"):  # fmt: skip
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "steps", self.steps is None or self.steps >= 1, ">= 1")
        require(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        require(self, "learning_rate", self.learning_rate > 0, "> 0")
        require(self, "checkpoint_minutes", self.checkpoint_minutes > 0, "> 0")
        require(self, "lr_gamma", 0 < self.lr_gamma <= 1, "in (0, 1]")
        above = 0 <= self.lr_minimum <= self.learning_rate
        require(self, "lr_minimum", above, "in [0, learning_rate]")
        require_one_of(self, "precision", PRECISIONS)
        require_one_of(self, "lr_schedule", SCHEDULES)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: tuples are lists."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


Config = TypeVar("Config", bound=LoopConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(LoopConfig):
    """How to pretrain. The defaults are the paper's where it gives a number.

    `batch_size` counts crops; `epochs` and `steps` include the warm-up, and each phase begins with
    `learning_rate` anew.
    """

    free_to_change = LoopConfig.free_to_change | {"cache", "compile"}
    pretext: str = "restoration"
    """What is learned besides the classes: "restoration" (Models Genesis), "inpainting",
    "shuffling", "rotation", "rubik" or "none"."""
    classify: bool = True
    """Whether to learn the pseudo-labels, too."""
    width: int = 32
    """Channels of the first convolution; every other count scales with it. 32 is the paper's."""
    accumulate: int = 1
    """Gradient-accumulation steps: each process splits its share of a batch into this many parts,
    to need less memory. Batch norm sees one part at a time."""
    warmup_epochs: int | None = None
    """Epochs of encoder and head alone on classification before both losses together, with a
    fresh optimiser each. None: a tenth of the run. Ignored where only one loss is learned."""
    pretext_weight: float = 1.0
    """Weight of the pretext task's loss in the sum."""
    classification_weight: float | None = None
    """Weight of the cross-entropy in the sum. None: 0.01 beside a task that restores, as published,
    1 beside one that names, whose loss is of the same kind."""
    shuffle_blocks: int = NUM_BLOCKS
    """Blocks of one local shuffling; 10,000 in Models Genesis, 5 in the published code."""
    compile: bool = False
    """Whether to compile the net: faster steps on a GPU, after minutes of compiling."""
    sync_batch_norm: bool = False
    """Whether batch norm sees the batches of all processes as one."""
    threads: int = 2
    """Threads that read and decode crops."""
    cache: str = "auto"
    """Where decoded crops are cached: "none", "memory", "device", or "auto" for the first of device
    and memory where they need less than half of the free memory."""
    scales: tuple[int, ...] | None = None
    """Scales of train crops to use (0 is the base crop); None takes all."""
    classes: tuple[int, ...] | None = None
    """Classes to use; None takes all."""
    excluded_classes: tuple[int, ...] | None = None
    """Classes to leave out of training and validation; None: those that the store's annotation
    (`semgen classes --exclude`) excludes when the run begins."""
    fraction: float = 1.0
    """Share of the training persons to use, drawn by the seed; smaller ones are parts of larger."""
    validation_batches: int | None = None
    """Maximum number of validation batches, spread evenly over the rows; None takes all rows."""
    skip_corrupt: bool = False
    """Leave out crops that cannot be read and count them, instead of stopping."""
    init: str | None = None
    """Weights to start from: a run, a checkpoint or an export of semgen, or an official Semantic
    Genesis or Models Genesis checkpoint. None: random weights; for a resumed run, those that it
    was started with."""
    init_part: str = "all"
    """Take "all" of `init`, its "unet" (encoder and decoder), or its "encoder" only."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # super() does not know classes with slots
        for name in ("width", "accumulate", "threads"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        for name, least in (("validation_batches", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            require(self, name, value is None or value >= least, f">= {least}")
        require(self, "shuffle_blocks", self.shuffle_blocks >= 0, ">= 0")
        for name in ("pretext_weight", "classification_weight"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 0, ">= 0")
        for name in ("classes", "scales"):
            require(self, name, getattr(self, name) != (), "at least one number, or None for all")
        require(self, "fraction", 0 < self.fraction <= 1, "in (0, 1]")
        require(self, "accumulate", self.accumulate <= self.batch_size, "<= batch_size")
        for name, allowed in (("pretext", PRETEXTS), ("cache", MODES), ("init_part", PARTS)):
            require_one_of(self, name, tuple(allowed))
        if self.pretext == "none" and not self.classify:
            raise TrainError('nothing to learn: pretext "none" needs classify')


def find_differences(saved: dict[str, Any], wanted: LoopConfig) -> list[str]:
    """The settings that forbid going on, as "name saved -> wanted"."""
    return [
        f"{name} {saved.get(name)!r} -> {value!r}"
        for name, value in wanted.to_dict().items()
        if name not in wanted.free_to_change and saved.get(name) != value
    ]


def resolve_selection(
    config: TrainConfig, excluded: tuple[int, ...], num_classes: int, *, saved: Any = None
) -> TrainConfig:
    """The config with its excluded classes named; `saved` are those of the run to resume.

    excluded
        What the store's annotation says.

    Raises TrainError for a class that the store does not have.
    """
    for name in ("classes", "excluded_classes"):
        strange = [c for c in getattr(config, name) or () if not 0 <= c < num_classes]
        if strange:
            raise TrainError(
                f"{name}: the store has classes 0 to {num_classes - 1}, not {format_rows(strange)}"
            )
    if config.excluded_classes is not None:
        return config
    return dataclasses.replace(config, excluded_classes=excluded if saved is None else tuple(saved))


def resolve_init(config: TrainConfig, *, saved: dict[str, Any]) -> TrainConfig:
    """The config with the starting weights of the run to resume, unless it names some itself."""
    if config.init is not None:
        return config
    return dataclasses.replace(config, init=saved["init"], init_part=saved["init_part"])


def resolve_precision(config: Config, device: torch.device) -> Config:
    """The config with its precision as a word."""
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if device.type == "cuda" else "fp32")


def resolve_warmup(
    config: TrainConfig, steps_per_epoch: int, *, saved: int | None = None
) -> TrainConfig:
    """The config with its warm-up as a number; `saved` is that of the run to resume.

    Raises TrainError when the warm-up would take the whole run.
    """
    epochs = min(config.epochs, -(-(config.steps or 2**62) // steps_per_epoch))
    if not (config.classify and PRETEXTS[config.pretext].metric):
        warmup = 0
    elif config.warmup_epochs is None:
        warmup = epochs // 10 if saved is None else saved
    else:
        warmup = config.warmup_epochs
    if warmup and warmup >= epochs:
        raise TrainError(
            f"warmup_epochs must leave epochs for both losses: got {warmup} of {epochs}"
            f" ({steps_per_epoch} steps each); lower it or train longer"
        )
    return dataclasses.replace(config, warmup_epochs=warmup)


def require(config: LoopConfig, name: str, holds: bool, what: str) -> None:
    """Raise TrainError that says what a setting must be, unless it holds."""
    if not holds:
        raise TrainError(f"{name} must be {what}, got {getattr(config, name)!r}")


def require_one_of(config: LoopConfig, name: str, allowed: tuple[str, ...]) -> None:
    """Raise TrainError that lists what a setting may be, unless it is one of them."""
    require(config, name, getattr(config, name) in allowed, f"one of {', '.join(allowed)}")
