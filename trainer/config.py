"""Settings of a training run, checked when made."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from store.settings import check_types, differences, require, to_json
from trainer.errors import SettingError

Precision = Literal["auto", "fp32", "tf32", "bf16"]
PretextName = Literal["restoration", "inpainting", "shuffling", "mae", "rotation", "rubik", "none"]
OptimiserName = Literal["adam", "adamw", "sgd"]
Schedule = Literal["step", "plateau", "poly", "cosine"]
NetName = Literal["genesis", "resenc-s", "resenc-m", "resenc-l"]
Normalise = Literal["window", "zscore"]
CacheMode = Literal["auto", "none", "memory", "device"]
Part = Literal["all", "unet", "backbone", "encoder"]

MACHINE_SETTINGS: Final = frozenset(
    {"device", "threads", "cache", "compile", "recompute", "checkpoint_every", "checkpoint_minutes",
     "log_every"}
)  # fmt: skip
"""Settings that suit the machine, and shape neither weights nor scores."""
FREE_TO_CHANGE: Final = MACHINE_SETTINGS | {"epochs", "steps", "patience", "validate_every"}
"""Settings that may differ when a run is resumed; all others must be the same."""
LOOP_HEADINGS: Final = {
    "batch_size": "Optimisation",
    "seed": "Seed and device",
    "checkpoint_every": "Checkpoints, validation, metrics",
}
"""Headings of the settings in --help, by the first setting below each."""
HEADINGS: Final = LOOP_HEADINGS | {
    "pretext": "Pretext task",
    "net": "Net",
    "accumulate": "Speed and memory",
    "warmup_epochs": "Losses",
    "shuffle_blocks": "Pretext task",
    "compile": "Speed and memory",
    "scales": "Which crops are used",
    "init": "Starting weights",
}
MOST_WIDTH: Final = 256
_FLOAT32: Final = 1e38
"""About the largest number of the nets' type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Settings of every training."""

    batch_size: int = 64
    """Examples of one optimiser step, over all processes."""
    epochs: int = 200
    """Maximum number of epochs."""
    steps: int | None = None
    """Maximum number of optimiser steps. Default: no limit besides `epochs`."""
    optimiser: OptimiserName = "adam"
    """Optimiser; "adamw" decays weights apart from the gradient, "sgd" has Nesterov momentum."""
    learning_rate: float = 1e-3
    """Highest learning rate. Typical values: 0.001 with adam, 0.01 with sgd, 0.0001 to 0.001
    with adamw."""
    lr_schedule: Schedule = "step"
    """How the learning rate falls: "step" is a cut every `lr_step_epochs` epochs, "plateau" a cut
    after that many epochs without a better validation loss; "poly" (as nnU-Net) and "cosine" fall
    with every step, down to `lr_minimum` at the end of the run. In a run that is made longer they
    continue at the rate of the longer run."""
    lr_warmup_steps: int = 0
    """Steps at the start in which the learning rate rises linearly from 0."""
    lr_step_epochs: int = 40
    """Epochs between two cuts of the learning rate."""
    lr_gamma: float = 0.5
    """Factor of each cut of the learning rate."""
    lr_minimum: float = 0.0
    """Lower limit of the learning rate; not applied during `lr_warmup_steps`."""
    momentum: float = 0.99
    """Momentum of "sgd"; 0.99 is nnU-Net's."""
    weight_decay: float | None = None
    """Weight decay. Default: 0 with "adam", 3e-5 with "sgd" as nnU-Net, 0.05 with "adamw", which
    spares biases and the weights of norms."""
    clip_norm: float | None = None
    """Highest norm of the gradient: a longer one is shortened to it; nnU-Net's is 12. Default: no
    limit."""
    ema_decay: float | None = None
    """Average the weights over the steps with this decay, such as 0.999; validation, best weights
    and exports are the average. Default: no average."""
    patience: int = 50
    """Epochs without a better validation loss after which training stops."""
    seed: int = 0
    """Seed of initial weights, order of the examples and perturbations."""
    device: str = "auto"
    """Any PyTorch device; "auto" is a GPU if there is one, else the CPU."""
    precision: Precision = "auto"
    """Numerical precision; "bf16" is automatic mixed precision. "auto" is bf16 on a GPU, else
    fp32."""
    checkpoint_every: int = 500
    """Steps between checkpoints, in addition to one after each epoch."""
    checkpoint_minutes: float = 10.0
    """Maximum minutes between checkpoints. With several processes, checked every `log_every`
    steps."""
    validate_every: int = 1
    """Epochs between validations, in addition to one at the end."""
    log_every: int = 10
    """Steps between two lines of metrics; each is the mean since the line before."""

    def __post_init__(self) -> None:
        check_types(self, error=SettingError)
        for name in ("batch_size", "epochs", "lr_step_epochs", "patience", "checkpoint_every",
                     "validate_every", "log_every"):  # fmt: skip
            check(self, name, getattr(self, name) >= 1, ">= 1")
        check(self, "steps", self.steps is None or self.steps >= 1, ">= 1")
        check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        check(self, "learning_rate", 0 < self.learning_rate < _FLOAT32, f"in (0, {_FLOAT32:g})")
        check(self, "checkpoint_minutes", self.checkpoint_minutes > 0, "> 0")
        check(self, "lr_gamma", 0 < self.lr_gamma <= 1, "in (0, 1]")
        above = 0 <= self.lr_minimum <= self.learning_rate
        check(self, "lr_minimum", above, "in [0, learning_rate]")
        check(self, "lr_warmup_steps", self.lr_warmup_steps >= 0, ">= 0")
        check(self, "momentum", 0 < self.momentum < 1, "in (0, 1)")
        decay, norm, average = self.weight_decay, self.clip_norm, self.ema_decay
        below = f"in [0, {_FLOAT32:g})"
        check(self, "weight_decay", decay is None or 0 <= decay < _FLOAT32, below)
        check(self, "clip_norm", norm is None or norm > 0, "> 0")
        check(self, "ema_decay", average is None or 0 < average < 1, "in (0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(LoopConfig):
    """Settings of pretraining. The defaults are the paper's where it gives a number.

    `batch_size` counts crops; `epochs` and `steps` include the warm-up, and each phase starts again
    with `learning_rate`.
    """

    pretext: PretextName | None = "restoration"
    """Pretext task learned besides the classes; "restoration" is the task of Models Genesis and of
    Semantic Genesis. From Python, `pretrain(..., pretext=...)` takes a task of your own instead."""
    classify: bool = True
    """Learn to classify crops by pseudo-label."""
    net: NetName | None = "genesis"
    """Net to train: "genesis" is the U-Net of Models Genesis and of the paper; "resenc-s",
    "resenc-m" and "resenc-l" are nnU-Net's residual-encoder U-Net with 4, 5 and 6 resolutions. From
    Python, `pretrain(..., net=...)` takes a net of your own instead."""
    width: int = 32
    """Channels of the first convolution; all others scale with it. 32 is the paper's and
    nnU-Net's."""
    normalise: Normalise | None = None
    """What the net sees of a crop, and restores: "window" is the store's HU window mapped to 0..1;
    "zscore" is (HU - mean of the scan) / standard deviation of the scan, as nnU-Net and nnssl do,
    and crops are restored without a sigmoid. Default: as the weights in `init` were trained, else
    "window"."""
    accumulate: int = 1
    """Gradient-accumulation steps: split each batch into this many parts, to need less memory.
    Batch norm sees one part at a time."""
    warmup_epochs: int | None = None
    """Epochs at the start that train encoder and classification head only. Default: a tenth of the
    run. Ignored unless both classes and a pretext task are learned."""
    pretext_weight: float = 1.0
    """Weight of the pretext task's loss in the sum."""
    classification_weight: float | None = None
    """Weight of the classification loss in the sum. Default: 0.01 with a pretext task that restores
    crops, as published, and 0.2 if it restores z-scores, since its loss is then about 20 times as
    large; 1 with a task that classifies."""
    shuffle_blocks: int = 10_000
    """Blocks of one local shuffling; 10000 in Models Genesis, 5 in the published code."""
    mask_ratio: float = 0.75
    """Share of a crop's blocks that pretext "mae" hides."""
    mask_block: int | None = None
    """Side in voxels of the blocks that pretext "mae" hides. Default: the largest power of two that
    fits six times into the crop's longest side, from 4 to 16: 16 for sides of 96 and more, 8 for
    64."""
    compile: bool = False
    """Compile the net with torch.compile: faster steps on a GPU, after minutes of compiling."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them (activation
    checkpointing): less memory, slower steps, same numbers."""
    sync_batch_norm: bool = False
    """Compute batch norm over the batches of all processes."""
    threads: int = 2
    """Threads that read and decode crops."""
    cache: CacheMode = "auto"
    """Where decoded crops are cached; "auto" is GPU memory if they need at most half of what is
    free there, else main memory by the same rule, else no cache."""
    scales: tuple[int, ...] | None = None
    """Scales of training crops to use, such as 0,1; 0 is the base crop. Default: all."""
    classes: tuple[int, ...] | None = None
    """Classes to use, such as 0-9,12. Default: all."""
    excluded_classes: tuple[int, ...] | None = None
    """Classes to leave out. Default: those excluded by `semgen classes --exclude` when the run
    starts."""
    excluded_members: tuple[str, ...] | None = None
    """Members of classes to leave out, as CLASS=SCAN with a scan id, such as 3=0123456789abcdef.
    Default: those excluded by `semgen classes --exclude-member` when the run starts."""
    fraction: float = 1.0
    """Share of the training patients to use, drawn by the seed. Smaller shares are subsets of
    larger ones."""
    validation_batches: int | None = None
    """Maximum number of validation batches, spread evenly over all rows. Default: no limit."""
    skip_corrupt: bool = False
    """Skip corrupt crops and count them, instead of stopping."""
    init: str | None = None
    """Weights to start from: a run, a checkpoint or export of semgen, an official Semantic Genesis
    or Models Genesis checkpoint, or a checkpoint or published folder of nnU-Net or nnssl. Default:
    random weights."""
    init_part: Part = "all"
    """Part of the weights in `init` to load: "backbone" is encoder and decoder, "unet" these and
    the layer that restores crops. Files of nnU-Net and nnssl have the backbone at most."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # super() does not know classes with slots
        for name in ("width", "accumulate", "threads"):
            check(self, name, getattr(self, name) >= 1, ">= 1")
        check(self, "width", self.width <= MOST_WIDTH, f"<= {MOST_WIDTH}")
        for name, least in (("validation_batches", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            check(self, name, value is None or value >= least, f">= {least}")
        check(self, "shuffle_blocks", self.shuffle_blocks >= 0, ">= 0")
        for name in ("pretext_weight", "classification_weight"):
            value = getattr(self, name)
            check(self, name, value is None or value >= 0, ">= 0")
        for name in ("classes", "scales"):
            check(self, name, getattr(self, name) != (), "at least one number, or None for all")
        check(self, "accumulate", self.accumulate <= self.batch_size, "<= batch_size")
        check(self, "mask_ratio", 0 < self.mask_ratio < 1, "in (0, 1)")
        block = self.mask_block
        check(self, "mask_block", block is None or block >= 1, ">= 1")
        check(self, "fraction", 0 < self.fraction <= 1, "in (0, 1]")
        weights = (
            0 if self.pretext == "none" else self.pretext_weight,
            self.classification_weight if self.classify else 0,
        )
        if weights == (0, 0):
            raise SettingError(
                "nothing to learn: needs a pretext with a weight above 0, or classify with a"
                " classification_weight above 0"
            )


def suggest_batch_size(shape: Sequence[int]) -> int:
    """Crops of (Z, Y, X) `shape` in a batch that needs about the memory of the default one.

    >>> suggest_batch_size((32, 64, 64)), suggest_batch_size((96, 96, 96))
    (64, 9)
    """
    return max(2, min(64, 64 * 32 * 64 * 64 // math.prod(shape)))


def check(config: LoopConfig, name: str, holds: bool, rule: str) -> None:
    """Raise SettingError that says what a setting must be, unless it holds."""
    require(holds, name, rule, getattr(config, name), error=SettingError)


def find_differences(
    saved: dict[str, Any], wanted: LoopConfig, free: Collection[str] = FREE_TO_CHANGE
) -> list[str]:
    """Settings that do not allow resuming, as "name: saved -> wanted"; those in `free` may differ.

    A setting that the saved run does not know has its default.
    """
    fixed = {name: value for name, value in to_json(wanted).items() if name not in free}
    before = to_json(type(wanted)()) | saved
    return differences(fixed, {name: before[name] for name in fixed})
