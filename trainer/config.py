"""Settings of a training run, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from store.settings import check_types, differences, require, to_json
from trainer.errors import TrainError

Precision = Literal["auto", "fp32", "tf32", "bf16"]
PretextName = Literal["restoration", "inpainting", "shuffling", "rotation", "rubik", "none"]
NetName = Literal["genesis", "resenc-s", "resenc-m", "resenc-l"]
CacheMode = Literal["auto", "none", "memory", "device"]
Part = Literal["all", "unet", "encoder"]

FREE_TO_CHANGE: Final = frozenset(
    {"epochs", "steps", "patience", "device", "threads", "cache", "compile", "checkpoint_every",
     "checkpoint_minutes", "validate_every", "log_every"}
)  # fmt: skip
"""Settings that may differ when a run is resumed; all others must be the same."""
_UNRECORDED: Final = {"net": "genesis"}
"""Values of settings in runs that are older than the setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Settings of every training."""

    batch_size: int = 64
    """Examples of one optimiser step, over all processes."""
    epochs: int = 200
    """Maximum number of epochs."""
    steps: int | None = None
    """Maximum number of optimiser steps. Default: no limit besides `epochs`."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam."""
    lr_schedule: Literal["step", "plateau"] = "step"
    """When the learning rate is cut: "step" every `lr_step_epochs` epochs, "plateau" after that
    many epochs without a better validation loss."""
    lr_step_epochs: int = 40
    """Epochs between two cuts of the learning rate."""
    lr_gamma: float = 0.5
    """Factor of each cut of the learning rate."""
    lr_minimum: float = 0.0
    """Lower limit of the learning rate."""
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
        check_types(self, error=TrainError)
        for name in ("batch_size", "epochs", "lr_step_epochs", "patience", "checkpoint_every",
                     "validate_every", "log_every"):  # fmt: skip
            check(self, name, getattr(self, name) >= 1, ">= 1")
        check(self, "steps", self.steps is None or self.steps >= 1, ">= 1")
        check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        check(self, "learning_rate", self.learning_rate > 0, "> 0")
        check(self, "checkpoint_minutes", self.checkpoint_minutes > 0, "> 0")
        check(self, "lr_gamma", 0 < self.lr_gamma <= 1, "in (0, 1]")
        above = 0 <= self.lr_minimum <= self.learning_rate
        check(self, "lr_minimum", above, "in [0, learning_rate]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(LoopConfig):
    """Settings of pretraining. The defaults are the paper's where it gives a number.

    `batch_size` counts crops; `epochs` and `steps` include the warm-up, and each phase starts again
    with `learning_rate`.
    """

    pretext: PretextName = "restoration"
    """Pretext task learned besides the classes; "restoration" is the task of Models Genesis and of
    Semantic Genesis."""
    classify: bool = True
    """Learn to classify crops by pseudo-label."""
    net: NetName | None = "genesis"
    """Net to train: "genesis" is the U-Net of Models Genesis and of the paper; "resenc-s",
    "resenc-m" and "resenc-l" are nnU-Net's residual-encoder U-Net with 4, 5 and 6 resolutions. From
    Python, `pretrain(..., net=...)` takes a net of your own instead."""
    width: int = 32
    """Channels of the first convolution; all others scale with it. 32 is the paper's and
    nnU-Net's."""
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
    crops, as published; 1 with one that classifies."""
    shuffle_blocks: int = 10_000
    """Blocks of one local shuffling; 10000 in Models Genesis, 5 in the published code."""
    compile: bool = False
    """Compile the net with torch.compile: faster steps on a GPU, after minutes of compiling."""
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
    fraction: float = 1.0
    """Share of the training patients to use, drawn by the seed. Smaller shares are subsets of
    larger ones."""
    validation_batches: int | None = None
    """Maximum number of validation batches, spread evenly over all rows. Default: no limit."""
    skip_corrupt: bool = False
    """Skip corrupt crops and count them, instead of stopping."""
    init: str | None = None
    """Weights to start from: a run, a checkpoint or export of semgen, or an official Semantic
    Genesis or Models Genesis checkpoint. Default: random weights."""
    init_part: Part = "all"
    """Part of the weights in `init` to load; "unet" is encoder and decoder."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # super() does not know classes with slots
        for name in ("width", "accumulate", "threads"):
            check(self, name, getattr(self, name) >= 1, ">= 1")
        for name, least in (("validation_batches", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            check(self, name, value is None or value >= least, f">= {least}")
        check(self, "shuffle_blocks", self.shuffle_blocks >= 0, ">= 0")
        for name in ("pretext_weight", "classification_weight"):
            value = getattr(self, name)
            check(self, name, value is None or value >= 0, ">= 0")
        for name in ("classes", "scales"):
            check(self, name, getattr(self, name) != (), "at least one number, or None for all")
        check(self, "fraction", 0 < self.fraction <= 1, "in (0, 1]")
        check(self, "accumulate", self.accumulate <= self.batch_size, "<= batch_size")
        if self.pretext == "none" and not self.classify:
            raise TrainError('nothing to learn: pretext "none" needs classify')


def check(config: LoopConfig, name: str, holds: bool, rule: str) -> None:
    """Raise TrainError that says what a setting must be, unless it holds."""
    require(holds, name, rule, getattr(config, name), error=TrainError)


def find_differences(saved: dict[str, Any], wanted: LoopConfig) -> list[str]:
    """Settings that do not allow resuming, as "name: saved -> wanted"."""
    fixed = {name: value for name, value in to_json(wanted).items() if name not in FREE_TO_CHANGE}
    return differences(fixed, {name: saved.get(name, _UNRECORDED.get(name)) for name in fixed})
