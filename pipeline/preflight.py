"""What must hold before a job begins, so that it fails at once and in one line."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from pipeline.catalogue import read_inputs, read_rejections
from pipeline.config import PrepareConfig
from store.format import StoreError
from store.reader import PatchStore
from store.settings import differences

_SURVEY_SETTINGS = (
    "frame",
    "window_hu",
    "min_slices",
    "max_voxels",
    "max_oblique_deg",
    "spacing_tolerance",
)
"""Settings that decide which series are accepted and what the survey notes of them."""


def is_begun(store: Path) -> bool:
    """Whether something lies there, but for what a kill during the store's creation leaves."""
    if not store.is_dir():
        return store.exists()
    return any(
        not (path.name.startswith("zarr.") and path.suffix == ".partial")
        for path in store.iterdir()
    )


def digest_inputs(**files: Path | None) -> dict[str, str]:
    """SHA-256 of the files that shape a store beside its settings, "" for those not given."""
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
        for name, file in files.items()
    }


def check_same_job(store: PatchStore, config: PrepareConfig, inputs: dict[str, str]) -> None:
    """StoreError when a store was begun with other settings or other inputs."""
    changed = differences(config.to_json(), store.config)
    if changed:
        raise StoreError(
            f"{store.path}: begun with other settings ({'; '.join(changed)});"
            " use those, or give another folder"
        )
    with contextlib.suppress(StoreError):  # without its catalogue: nothing to compare with
        changed = differences(inputs, read_inputs(store.path) or inputs)
    if changed:
        names = " and ".join(f"--{name}" for name in inputs if any(name in c for c in changed))
        raise StoreError(
            f"{store.path}: begun with another {names}, or without; use the same, or give another"
            " folder"
        )


def check_extension(old: Path, config: PrepareConfig) -> None:
    """StoreError unless the survey of `old` is what a survey under these settings would find."""
    read_rejections(old)  # StoreError without its private catalogue
    theirs = PatchStore(old).config
    changed = differences(
        {name: config.to_json()[name] for name in _SURVEY_SETTINGS},
        {name: theirs[name] for name in _SURVEY_SETTINGS},
    )
    if changed:
        raise StoreError(f"{old}: surveyed with other settings ({'; '.join(changed)})")
