"""Settings of fine-tuning, checked when made. The defaults are the published protocol's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from trainer.config import LOOP_HEADINGS, MOST_WIDTH, LoopConfig, NetName, Schedule, check

Intensity = Literal["auto", "ct", "per-image", "unit", "ct-zscore", "zscore"]
Loss = Literal["auto", "dice", "dice+cross-entropy", "cross-entropy"]


HEADINGS: Final = LOOP_HEADINGS | {
    "init": "Starting weights and net",
    "shape": "Images",
    "loss": "Loss and patches",
    "overlap": "Test and prediction",
    "label_fraction": "Patients for training, validation and test",
    "threads": "Speed",
    "epochs": "Optimisation",
}
"""Headings of the settings in --help, by the first setting below each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(LoopConfig):
    """Settings of fine-tuning."""

    batch_size: int = 16
    """Patches of one optimiser step; for classification, cases."""
    lr_schedule: Schedule = "plateau"
    lr_step_epochs: int = 6
    lr_minimum: float = 1e-6
    init: str = "scratch"
    """Where to start: "scratch" for random weights, a run, a weights file of semgen, an official
    Genesis checkpoint, a checkpoint or published folder of nnU-Net or nnssl, medicalnet:FILE or
    i3d:FILE."""
    init_part: Literal["unet", "encoder"] = "unet"
    """Part of a U-Net's weights to load; "unet" is the encoder, and the decoder if the file has
    one."""
    net: NetName = "genesis"
    """Net if `init` is scratch: "genesis" is the U-Net of Models Genesis; "resenc-s", "resenc-m"
    and "resenc-l" are nnU-Net's. A weights file sets its own."""
    width: int = 32
    """Channels of the first convolution if `init` is scratch. A weights file sets its own."""
    shape: tuple[int, int, int] = (32, 64, 64)
    """Voxels of the net's input."""
    spacing_mm: tuple[float, float, float] | None = None
    """Voxel spacing to which images are resampled, in mm. Default: to segment, the median of all
    cases; to classify, each image is resized to `shape`."""
    intensity: Intensity = "auto"
    """How the net sees values. Mapped to 0..1: "ct" by `window_hu`, "per-image" by each image's
    0.5th and 99.5th percentile, "unit" not at all (8-bit values are divided by 255). Z-scores,
    (value - mean) / standard deviation of the image: "ct-zscore" clipped to `window_hu`, "zscore"
    not clipped. "auto": as the task defines it (name of the channel, or column `intensity`); if the
    weights were pretrained on z-scores, "ct-zscore" for "ct" and "zscore" for "per-image"."""
    channel: int | None = None
    """Channel to use of images with several channels, from 0. A manifest's column `channel` takes
    precedence."""
    window_hu: tuple[float, float] | None = None
    """HU range that is mapped to 0..1, or to which HU are clipped. Default: the one used for
    pretraining, or -1000,1000."""
    loss: Loss = "auto"
    """Loss; cross-entropy is binary where there are two classes. "auto" is dice to segment and
    cross-entropy to classify."""
    patches_per_case: int = 8
    """Patches drawn per case and epoch."""
    foreground: float = 0.5
    """Share of patches that are centred on a labeled voxel; the others are drawn anywhere."""
    mirror: bool = False
    """Mirror training examples at random along each axis."""
    overlap: float = 0.5
    """Overlap of the sliding windows along each axis, as a share of the window."""
    label_fraction: float = 1.0
    """Share of the training patients to use. Smaller shares are subsets of larger ones."""
    validation_fraction: float = 0.2
    """Share of patients for validation, unless the task assigns them."""
    test_fraction: float = 0.2
    """Share of patients for testing, unless the task assigns them or `folds` is given."""
    folds: int | None = None
    """Number of cross-validation folds, by patient. Default: one split by `test_fraction`."""
    fold: int = 0
    """Fold to test on, from 0."""
    split_seed: int = 0
    """Seed of the split into training, validation and test patients. All other draws use `seed`."""
    threads: int = 2
    """Threads that read patches."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # super() does not know classes with slots
        for name in ("width", "patches_per_case", "threads"):
            check(self, name, getattr(self, name) >= 1, ">= 1")
        check(self, "width", self.width <= MOST_WIDTH, f"<= {MOST_WIDTH}")
        for name in ("foreground", "validation_fraction", "test_fraction"):
            check(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        check(self, "label_fraction", 0 < self.label_fraction <= 1, "in (0, 1]")
        check(self, "split_seed", self.split_seed >= 0, ">= 0")
        check(self, "overlap", 0 <= self.overlap < 1, "in [0, 1)")
        check(self, "shape", len(self.shape) == 3 and min(self.shape) >= 8, "three sides >= 8")
        spacing = self.spacing_mm
        fits = spacing is None or (len(spacing) == 3 and min(spacing) > 0)
        check(self, "spacing_mm", fits, "three positive numbers z, y, x")
        window = self.window_hu
        check(self, "window_hu", window is None or window[0] < window[1], "low < high")
        check(self, "channel", self.channel is None or self.channel >= 0, ">= 0")
        check(self, "folds", self.folds is None or self.folds >= 2, ">= 2")
        check(self, "fold", 0 <= self.fold < (self.folds or 1), "in 0 to folds - 1")
