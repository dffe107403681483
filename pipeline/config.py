"""Every setting of `prepare`: defaults, presets, one TOML file, checks.

The resolved settings are written into the store, so whatever is here shapes its content;
workers, scheduler and paths do not and live elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from store.errors import ConfigError
from store.settings import build, check_types, read_toml

FRAMES: Final = ("body", "scan", "voxel")
Triple: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """How scans are embedded; see pipeline/autoencoder.py."""

    latent: int = 512
    """Numbers in an embedding."""
    width: int = 8
    """Channels of the first convolution; they double with each halving of the grid."""
    learning_rate: float = 1e-3
    """Adam's; halved after `lr_patience` epochs without a better held-out loss."""
    batch_size: int = 8
    """Thumbnails per step."""
    max_epochs: int = 400
    """Passes over the training thumbnails at most."""
    max_steps: int = 1500
    """Optimiser steps at most, whatever the number of scans."""
    lr_patience: int = 20
    """Epochs without a better held-out loss before the learning rate halves."""
    patience: int = 50
    """Epochs without a better held-out loss before training stops."""
    threads: int = 2
    """CPU threads; fixed, because the sums' order and so the last bits depend on it."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the setting, what is allowed and what came."""
        check_types(self, prefix="autoencoder.")
        for name in ("latent", "batch_size", "max_epochs", "max_steps", "threads"):
            _check(self, name, low=1)
        for name in ("lr_patience", "patience"):
            _check(self, name, low=0)
        width, rate = self.width, self.learning_rate
        _require(width >= 4 and width % 4 == 0, "autoencoder.width", "a multiple of 4", width)
        _require(rate > 0, "autoencoder.learning_rate", "> 0", rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Settings of one store. Axes are z, y, x everywhere."""

    seed: int = 0
    """Every random draw is keyed by it."""
    classes: int = 200
    """Classes wanted; fewer are found when the archive has no room for more."""
    neighbours: int = 200
    """Members of a class among training scans, its reference included."""
    validation_neighbours: int = 30
    """Members of a class among validation scans."""
    validation_fraction: float = 0.1
    """Share of persons whose scans are kept for validation."""
    min_member_share: float = 0.5
    """A class with fewer members than this share of the possible ones is redrawn."""

    frame: str = "body"
    """What a class's coordinate is measured in: "body", "scan" or "voxel"."""
    shape: tuple[int, int, int] = (32, 64, 64)
    """Voxels of a crop."""
    spacing_mm: Triple | str = (1.25, 0.75, 0.75)
    """Grid of the base crop in mm, or "native": each scan's own voxels."""
    window_hu: tuple[int, int] = (-1000, 1000)
    """Crops and thumbnails are clipped to it."""
    scales: int = 3
    """Resolutions of a training crop: 1 is the base crop alone, 3 adds two drawn ones."""
    side_steps: tuple[int, int] = (50, 80)
    """In-plane side of a drawn resolution in base steps, [low, high)."""
    shift_steps: tuple[int, int] = (-10, 10)
    """In-plane shift of a drawn resolution in base steps, [low, high)."""

    border: Triple = (0.0, 0.0, 0.0)
    """Distance of a reference's base crop from the scan's edge, in its voxels."""
    separation_steps: float = 0.0
    """Least distance between two classes' centres along the farthest axis, in base steps."""
    max_overlap: float = 0.25
    """Largest share of a base crop that another class's may cover in any scan."""
    tries: int = 200
    """Coordinates tried for one reference before the next reference is drawn."""
    tissue_hu: int = -150
    """A voxel at or above this is tissue."""
    tissue_depth: int = 1
    """Slices (towards the head) looked at for tissue, this voxel's included."""
    min_tissue: float = 0.0
    """Least share of tissue in a reference's base crop."""
    max_tissue: float = 1.0
    """Largest share of tissue in a reference's base crop."""
    air_hu: int = -950
    """A voxel below this is nothing."""
    min_content: float = 0.75
    """Least share of a reference's base crop that is not nothing."""

    index: str = "Flat"
    """FAISS index_factory string; "Flat" is exact."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """How scans are embedded."""

    one_per_study: bool = True
    """Of several usable DICOM series of a study take the thinnest axial one only."""
    min_slices: int = 16
    """Scans with fewer slices (or rows, or columns) are rejected."""
    max_voxels: int = 1_000_000_000
    """Scans whose header claims more voxels are rejected before they are read."""
    spacing_tolerance: float = 0.1
    """Largest distance of a DICOM slice from its place on an even grid, as a share of the gap."""
    max_oblique_deg: float = 15.0
    """Largest angle between a scan's axes and the patient's."""
    max_read_seconds: int = 600
    """A series whose reading takes longer is rejected."""
    rows_per_shard: int = 64
    """Crops in one shard file."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the setting, what is allowed and what came."""
        check_types(self)
        for name in (
            "classes",
            "neighbours",
            "tries",
            "tissue_depth",
            "max_voxels",
            "max_read_seconds",
        ):
            _check(self, name, low=1)
        _check(self, "min_slices", low=2)
        for name in ("seed", "validation_neighbours", "separation_steps", "spacing_tolerance"):
            _check(self, name, low=0)
        for name in ("min_member_share", "max_overlap", "min_tissue", "max_tissue", "min_content"):
            _check(self, name, low=0, high=1)
        _check(self, "validation_fraction", low=0, high=0.9)
        _check(self, "max_oblique_deg", low=0, high=45)
        _check(self, "scales", low=1, high=3)
        _check(self, "rows_per_shard", low=1)
        _require(self.frame in FRAMES, "frame", f"one of {', '.join(FRAMES)}", self.frame)
        shape = self.shape
        _require(
            min(shape) >= 8 and not any(n % 8 for n in shape), "shape", "multiples of 8", shape
        )
        spacing = self.spacing_mm
        _require(
            spacing == "native" if isinstance(spacing, str) else all(0 < s < 100 for s in spacing),
            "spacing_mm",
            'three lengths in mm, or "native"',
            spacing,
        )
        for name in ("window_hu", "side_steps", "shift_steps"):
            low, high = getattr(self, name)
            _require(low < high, name, "low, high", (low, high))
        _require(self.side_steps[0] >= 1, "side_steps", ">= 1", self.side_steps)
        _require(min(self.border) >= 0, "border", ">= 0", self.border)
        _require(
            self.min_tissue <= self.max_tissue,
            "min_tissue",
            f"<= max_tissue ({self.max_tissue})",
            self.min_tissue,
        )

    def step_mm(self, spacing_mm: NDArray[Any]) -> NDArray[Any]:
        """The base crop's step (..., 3) in scans of the given spacing (..., 3)."""
        if isinstance(self.spacing_mm, str):
            return spacing_mm
        return np.broadcast_to(np.asarray(self.spacing_mm), spacing_mm.shape)

    def least_members(self, num_train: int) -> int:
        """Training scans that a class needs, its reference included, of `num_train`."""
        return max(2, round(self.min_member_share * min(self.neighbours, num_train)))

    def to_json(self) -> dict[str, Any]:
        """The resolved settings as plain JSON values."""
        return {
            f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "autoencoder"
        } | {"autoencoder": {k: _plain(v) for k, v in dataclasses.asdict(self.autoencoder).items()}}


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "classes": 44,
        "frame": "voxel",
        "spacing_mm": "native",
        "border": (30.0, 100.0, 100.0),
        "separation_steps": 5.0,
        "max_overlap": 1.0,
        "tissue_depth": 3,
        "max_tissue": 0.15,
        "min_content": 0.0,
    },
}
"""Named sets of settings; "paper" is METHOD as published (docs/method.md says what differs)."""


def load_config(
    file: Path | None = None, *, preset: str = "default", overrides: Mapping[str, Any] | None = None
) -> PrepareConfig:
    """Preset, then the TOML file, then the overrides (command line); None overrides nothing.

    Raises ConfigError on an unknown key, naming the nearest known one.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    values: dict[str, Any] = dict(PRESETS[preset])
    if file is not None:
        values.update(read_toml(file))
    values.update({k: v for k, v in (overrides or {}).items() if v is not None})
    nested = values.pop("autoencoder", {})
    if not isinstance(nested, Mapping):
        raise ConfigError(f"autoencoder must be a table [autoencoder], got {nested!r}")
    autoencoder = build(AutoencoderConfig, nested, prefix="autoencoder.")
    return build(PrepareConfig, {**values, "autoencoder": autoencoder})


def config_from_json(values: Mapping[str, Any]) -> PrepareConfig:
    """The settings that `to_json` wrote."""
    return load_config(overrides=values)


def _check(config: object, name: str, *, low: float, high: float = math.inf) -> None:
    value = getattr(config, name)
    rule = f">= {low}" + (f" and <= {high}" if high < math.inf else "")
    _require(low <= value <= high, name, rule, value)


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
