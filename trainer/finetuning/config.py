"""Settings of fine-tuning, checked when made. The defaults are the published protocol's."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import LoopConfig, require, require_one_of

INTENSITIES = ("auto", "ct", "per-image", "unit")
LOSSES = ("auto", "dice", "dice+cross-entropy", "cross-entropy")
INIT_PARTS = ("unet", "encoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(LoopConfig):
    """How to fine-tune."""

    batch_size: int = 16
    """Patches (or, classifying, cases) of one optimiser step."""
    lr_schedule: str = "plateau"
    lr_step_epochs: int = 6
    lr_minimum: float = 1e-6
    init: str = "scratch"
    """What to start from: "scratch", a run, a file of weights of ours or an official Genesis
    checkpoint, "medicalnet:FILE" or "i3d:FILE"."""
    init_part: str = "unet"
    """Of a U-Net take the "unet", its decoder too where the file has one, or the "encoder"."""
    width: int = 32
    """Channels of the first convolution from scratch; a file has its own."""
    shape: tuple[int, int, int] = (32, 64, 64)
    """(Z, Y, X) voxels of the net's input."""
    spacing_mm: tuple[float, float, float] | None = None
    """(z, y, x) of the grid that images are brought to; None takes the median of all cases
    (classifying: none, each image is brought to `shape`)."""
    intensity: str = "auto"
    """"ct" maps the window to 0..1, "per-image" each image's 0.5th and 99.5th percentile; "unit"
    takes values from 0 to 1 as they are, and 8-bit ones from 0 to 255; "auto" goes by what the
    task says it is."""
    channel: int | None = None
    """Which channel of images that have several, from 0; a manifest's column `channel` comes
    first. None: the task's images must have one."""
    window_hu: tuple[float, float] | None = None
    """Of CT; None takes what the start was pretrained with, or -1000 to 1000."""
    loss: str = "auto"
    """"dice", "dice+cross-entropy" or "cross-entropy" (binary where there are two classes);
    "auto": dice to segment, cross-entropy to classify."""
    patches_per_case: int = 8
    """Patches that an epoch draws from each training case."""
    foreground: float = 0.5
    """Share of patches that are centred on a voxel of some label; the others lie anywhere."""
    mirror: bool = False
    """Whether to mirror training examples at random, along each axis."""
    overlap: float = 0.5
    """Of windows that slide over a whole image, along each axis."""
    label_fraction: float = 1.0
    """Share of the training patients to use; smaller ones are parts of larger."""
    validation_fraction: float = 0.2
    """Share of patients, of those that the task does not deal out itself."""
    test_fraction: float = 0.2
    folds: int | None = None
    """Deal the patients into so many parts for testing, one a fold, instead of `test_fraction`."""
    fold: int = 0
    split_seed: int = 0
    """Of who is in which split; `seed` is of all other draws."""
    threads: int = 2
    """Threads that read patches ahead."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # super() does not know classes with slots
        for name in ("width", "patches_per_case", "threads"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("foreground", "validation_fraction", "test_fraction"):
            require(self, name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        require(self, "label_fraction", 0 < self.label_fraction <= 1, "in (0, 1]")
        require(self, "overlap", 0 <= self.overlap < 1, "in [0, 1)")
        require(self, "shape", len(self.shape) == 3 and min(self.shape) >= 8, "three sides >= 8")
        spacing = self.spacing_mm
        fits = spacing is None or (len(spacing) == 3 and min(spacing) > 0)
        require(self, "spacing_mm", fits, "three positive numbers z, y, x")
        window = self.window_hu
        require(self, "window_hu", window is None or window[0] < window[1], "low < high")
        require(self, "channel", self.channel is None or self.channel >= 0, ">= 0")
        require(self, "folds", self.folds is None or self.folds >= 2, ">= 2")
        require(self, "fold", 0 <= self.fold < (self.folds or 1), "in 0 to folds - 1")
        for name, allowed in (("intensity", INTENSITIES), ("loss", LOSSES),
                              ("init_part", INIT_PARTS)):  # fmt: skip
            require_one_of(self, name, allowed)
