"""Every setting of `prepare`: defaults, presets, one TOML file, checks.

The resolved settings are written into the store, so whatever is here shapes its content;
workers, scheduler and paths do not and live elsewhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from store.errors import ConfigError
from store.settings import build, check_types, read_toml, require

Frame = Literal["body", "scan", "voxel"]
Place = Literal["match", "frame"]
NearDuplicates = Literal["same-split", "warn", "off"]
_BY_SHAPE: Any = None
"""Default of a setting that is chosen by `shape`: see `PrepareConfig.__post_init__`."""
_SIDE_SHARES, _SHIFT_SHARE = (50 / 64, 80 / 64), 10 / 64
"""Side and shift of a randomly drawn scale, as shares of the crop's in-plane side (the paper's)."""
_MAX_ROWS, _SHARD_BYTES = 64, 2**24
"""Crops of a shard, and their bytes before they are compressed: what a worker holds."""
_MOST_BYTES = 2**30
"""The same if `rows_per_shard` is given."""
BODY_SIZES = 2
"""Numbers of an embedding for the size of the body, after the latent vector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """How scans are embedded; see pipeline/autoencoder.py."""

    latent: int = 510
    """Length of the latent vector. An embedding has two more numbers, for the size of the body; 512
    in all, which product quantisers of FAISS can divide."""
    width: int = 8
    """Channels of the first convolution; doubled at each level. A multiple of 4."""
    learning_rate: float = 1e-3
    """Initial learning rate of Adam."""
    batch_size: int = 8
    """Thumbnails per step."""
    max_epochs: int = 400
    """Maximum number of epochs."""
    max_steps: int = 1500
    """Maximum number of optimiser steps."""
    lr_patience: int = 20
    """Epochs without a better validation loss after which the learning rate is halved."""
    patience: int = 50
    """Epochs without a better validation loss after which training stops."""
    threads: int = 2
    """CPU threads. Another number gives slightly different weights."""

    def __post_init__(self) -> None:
        """Raise ConfigError naming the setting, the allowed and the given value."""
        check_types(self, prefix="autoencoder.")
        for name in ("latent", "batch_size", "max_epochs", "max_steps", "patience", "threads"):
            _check(self, name, low=1, prefix="autoencoder.")
        _check(self, "lr_patience", low=0, prefix="autoencoder.")
        width, rate = self.width, self.learning_rate
        require(width >= 4 and width % 4 == 0, "autoencoder.width", "a multiple of 4", width)
        require(rate > 0, "autoencoder.learning_rate", "> 0", rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Settings of one store. Axes are z, y, x everywhere."""

    seed: int = 0
    """Seed of every random draw."""
    classes: int = 200
    """Maximum number of classes to discover; fewer if no further class fits the limits below."""
    neighbours: int = 200
    """Maximum number of members of a class among the training scans, its reference included."""
    validation_neighbours: int = 30
    """Maximum number of members of a class among the validation scans."""
    max_member_share: float = 0.5
    """Only this share of the scans, those most similar to the reference, can be members of its
    class."""
    validation_fraction: float = 0.1
    """Share of patients whose scans are used for validation, 0 to 0.9. If it is not 0, at least
    one patient is used."""
    near_duplicates: NearDuplicates = "same-split"
    """Scans of different patients that are almost the same, such as a resampled copy or another
    reconstruction of one acquisition: "same-split" (they count as scans of one patient, so both are
    used for training or both for validation), "warn" (they are only reported) or "off" (not
    searched for)."""
    min_member_share: float = 0.25
    """Minimum number of members among the training scans, as a share of the maximum; at least two.
    Coordinates with fewer are discarded."""

    place: Place = "match"
    """Where a class lies in other scans than its reference: "match" (the same anatomy is searched
    for, and a scan in which it is not found is no member) or "frame" (the same coordinate)."""
    min_score: float = 0.4
    """Minimum score of a match, at most 1: how similar the surroundings of both places are."""
    max_cycle_mm: float = 10.0
    """Maximum distance in mm from the reference's place after matching to a scan and back, 0 to
    10."""
    candidates_per_member: float = 3.0
    """Maximum number of scans in which a class is searched for, as a multiple of its maximum number
    of members. The most similar scans are tried first."""
    frame: Frame = "body"
    """Coordinate system of a class's centre: "body" (fractions of the body's extent in y and x and
    of the scan in z), "scan" (fractions of the scan) or "voxel" (voxel indices)."""
    shape: tuple[int, int, int] = (32, 64, 64)
    """Voxels of a crop; each a multiple of 8."""
    spacing_mm: tuple[float, float, float] | Literal["native"] = (1.25, 0.75, 0.75)
    """Voxel spacing of the base crop in mm, or "native" for each scan's own spacing."""
    window_hu: tuple[int, int] = (-1000, 1000)
    """HU range to which crops and thumbnails are clipped."""
    scales: int = 3
    """Scales of a training crop, 1 to 3: the base crop, and up to two larger or smaller ones drawn
    at random."""
    side_steps: tuple[int, int] = _BY_SHAPE
    """Smaller in-plane side of a randomly drawn scale, in voxels of the base crop: first number
    included, second excluded. Default: 25/32 and 5/4 of the base crop's smaller side: 50,80 of 64
    voxels, 75,120 of 96."""
    shift_steps: tuple[int, int] = _BY_SHAPE
    """In-plane shift of a randomly drawn scale, in voxels of the base crop: first number
    included, second excluded. Default: 5/32 of the base crop's smaller side: -10,10 of 64 voxels,
    -15,15 of 96."""

    border: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Minimum distance of a reference's base crop from the edge of its scan, in voxels of the
    scan."""
    separation_steps: float = 0.0
    """Minimum distance between two class centres along at least one axis (z, y or x), in voxels of
    the base crop. 0: no minimum."""
    max_overlap: float = 0.25
    """Maximum share of a base crop that another class may cover in the same scan; 1 allows all."""
    tries: int = 200
    """Random coordinates drawn in one reference before the next reference is drawn."""
    tissue_hu: int = -150
    """HU from which a voxel counts as tissue."""
    tissue_depth: int = 1
    """Number of slices searched for tissue: a voxel counts as tissue if its own slice, or one of
    the next slices towards the head, has tissue at this position. 1: its own slice only."""
    min_tissue: float = 0.0
    """Minimum share of tissue in a reference's base crop."""
    max_tissue: float = 1.0
    """Maximum share of tissue in a reference's base crop."""
    min_body: float = 0.75
    """Minimum share of the patient's body in a reference's base crop. Air that the body encloses
    counts as body; table, blankets and air outside do not."""

    index: str = "Flat"
    """FAISS index_factory string. "Flat" is exact; with another index, fewer neighbours may be
    found, but distances are exact too."""

    one_per_study: bool = True
    """Of several usable DICOM series of a study, use only the axial one with the thinnest
    slices."""
    min_slices: int = 16
    """Minimum number of slices, rows and columns of a scan."""
    max_voxels: int = 1_000_000_000
    """Maximum number of voxels of a scan, checked before it is read."""
    spacing_tolerance: float = 0.1
    """Maximum deviation of a DICOM slice from an even grid, as a share of the slice spacing."""
    max_oblique_deg: float = 15.0
    """Maximum angle between a scan's axes and the patient's axes, in degrees."""
    max_read_seconds: int = 600
    """Maximum time for reading one series, in seconds."""
    rows_per_shard: int = _BY_SHAPE
    """Crops in one shard file. Default: as many as 16 MiB hold uncompressed, at most 64; 9 of
    96 x 96 x 96 voxels."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Table [autoencoder]: how scans are embedded."""

    def __post_init__(self) -> None:
        """Fill in what is chosen by `shape`, and check.

        Raises ConfigError naming the setting, the allowed and the given value.
        """
        with contextlib.suppress(TypeError, ValueError):  # a shape that is refused below
            self._choose_by_shape()
        check_types(self)
        for name in ("classes", "tries", "max_voxels"):
            _check(self, name, low=1)
        _check(self, "neighbours", low=2, high=10**6)
        _check(self, "tissue_depth", low=1, high=1000)
        _check(self, "max_read_seconds", low=1, high=10**6)
        _check(self, "min_slices", low=2)
        for name in ("seed", "separation_steps", "spacing_tolerance"):
            _check(self, name, low=0)
        _check(self, "validation_neighbours", low=0, high=10**6)
        for name in (
            "min_member_share",
            "max_member_share",
            "max_overlap",
            "min_tissue",
            "max_tissue",
            "min_body",
        ):
            _check(self, name, low=0, high=1)
        _check(self, "min_score", low=-1, high=1)
        _check(self, "max_cycle_mm", low=0, high=10)
        _check(self, "candidates_per_member", low=1)
        _check(self, "validation_fraction", low=0, high=0.9)
        _check(self, "max_oblique_deg", low=0, high=45)
        _check(self, "scales", low=1, high=3)
        shape = self.shape
        require(min(shape) >= 8 and not any(n % 8 for n in shape), "shape", "multiples of 8", shape)
        most = max(1, _MOST_BYTES // (2 * math.prod(shape)))
        _check(self, "rows_per_shard", low=1, high=most)
        if self.spacing_mm != "native":
            fits = all(0 < side < 100 for side in self.spacing_mm)
            require(fits, "spacing_mm", "above 0 and below 100", self.spacing_mm)
        for name in ("window_hu", "side_steps", "shift_steps"):
            low, high = getattr(self, name)
            require(low < high, name, "low, high", (low, high))
        require(self.side_steps[0] >= 1, "side_steps", ">= 1", self.side_steps)
        require(min(self.border) >= 0, "border", ">= 0", self.border)
        require(
            self.min_tissue <= self.max_tissue,
            "min_tissue",
            f"<= max_tissue ({self.max_tissue})",
            self.min_tissue,
        )

    def _choose_by_shape(self) -> None:
        z, y, x = self.shape
        side, row_bytes = min(y, x), 2 * z * y * x
        shift = round(_SHIFT_SHARE * side)
        chosen = {
            "side_steps": tuple(round(share * side) for share in _SIDE_SHARES),
            "shift_steps": (-shift, shift),
            "rows_per_shard": min(_MAX_ROWS, max(1, _SHARD_BYTES // max(1, row_bytes))),
        }
        for name, value in chosen.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # settings are frozen


HEADINGS: Final = {
    "seed": "Classes and their members",
    "place": "Where a class lies in a scan",
    "shape": "Crops",
    "border": "Which positions become classes",
    "index": "Search for similar scans",
    "min_slices": "Which series are used",
    "rows_per_shard": "Files of the store",
    "one_per_study": "Which series are used",
}
"""Headings of the settings in --help, by the first setting below each."""
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "classes": 44,
        "max_member_share": 1.0,
        "min_member_share": 0.5,
        "place": "frame",
        "frame": "voxel",
        "spacing_mm": "native",
        "border": (30.0, 100.0, 100.0),
        "separation_steps": 5.0,
        "max_overlap": 1.0,
        "tissue_depth": 3,
        "max_tissue": 0.15,
        "min_body": 0.5,
    },
    "demo": {
        "classes": 10,
        "neighbours": 8,
        "validation_neighbours": 3,
        "validation_fraction": 0.2,
        "shape": (16, 32, 32),
        "spacing_mm": (3.0, 2.0, 2.0),
        "autoencoder": {"width": 8, "max_steps": 150},
    },
}
"""Named sets of settings: "paper" is the method as published (docs/method.md), "demo" is for the
few small scans of `semgen demo`."""


def load_config(
    file: str | Path | None = None,
    *,
    preset: str = "default",
    overrides: Mapping[str, Any] | None = None,
) -> PrepareConfig:
    """Preset, then the TOML file, then the overrides (command line); None overrides nothing.

    Raises ConfigError on an unknown key, naming the nearest known one.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    values = dict(PRESETS[preset])
    given = read_toml(file) if file is not None else {}
    given |= {name: value for name, value in (overrides or {}).items() if value is not None}
    tables = values.get("autoencoder", {}), given.get("autoencoder", {})
    if all(isinstance(table, Mapping) for table in tables):  # else `build` refuses it
        given["autoencoder"] = {**tables[0], **tables[1]}
    return build(PrepareConfig, values | given)


def _check(
    config: object, name: str, *, low: float, high: float = math.inf, prefix: str = ""
) -> None:
    value = getattr(config, name)
    rule = f">= {low}" + (f" and <= {high}" if high < math.inf else "")
    require(low <= value <= high, prefix + name, rule, value)
