"""Checks before a job starts: its inputs, what exists at STORE, whether the job may continue it."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.archive.folders import resolve_archive
from pipeline.archive.lookup import (
    catalogue_folder,
    check_catalogue_folder,
    has_catalogue,
    read_archive,
    read_inputs,
    read_rejections,
)
from pipeline.archive.manifest import Manifest
from pipeline.config import BODY_SIZES, PrepareConfig
from store.errors import check_local
from store.format import AUTOENCODER_FILE, FORMAT, SURVEY_VERSION, StoreError, survey_version
from store.reader import PatchStore
from store.settings import differences, to_json

_SURVEY_SETTINGS = (
    "frame",
    "window_hu",
    "min_slices",
    "max_voxels",
    "max_oblique_deg",
    "spacing_tolerance",
)
"""Settings that affect which series are accepted, and the results of the survey."""


def find_state(store: Path) -> str | None:
    """State of the store, "building" or "complete"; None where there is none yet.

    Temporary files of a job killed while it created the store do not count. StoreError where
    something else is there.
    """
    if not store.exists() or (store.is_dir() and all(map(_is_partial, store.iterdir()))):
        return None
    return PatchStore(store, allow_building=True).state


def _is_partial(path: Path) -> bool:
    return path.name.startswith("zarr.") and path.suffix == ".partial"


def find_weights(autoencoder: Path) -> Path:
    """The given file of weights, or that of the given store."""
    if not autoencoder.is_dir():
        return autoencoder
    if "embed" not in PatchStore(autoencoder, allow_building=True).stages:
        raise StoreError(
            f"{autoencoder}: has no autoencoder yet; finish preparing it, or give a file of weights"
        )
    return autoencoder / AUTOENCODER_FILE


def digest_inputs(**files: Path | None) -> dict[str, str]:
    """SHA-256 (hex) of a job's input files by name, "" for those not given."""
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
        for name, file in files.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A checked request to prepare a store."""

    name: Path
    """The store's path as the user gave it."""
    path: Path
    """The same, absolute and without links: one lock and one catalogue for all spellings."""
    config: PrepareConfig
    state: str | None
    """Of the store: "building", "complete", or None where there is no store yet."""
    archive: list[Path]
    """In the order of the first command for this store."""
    archive_checked: bool
    """False where the catalogue, and so the store's archive, is unknown."""
    archive_moved: bool
    """Whether the archive is elsewhere than the store's catalogue says."""
    inputs: dict[str, str]
    """Digests of manifest and autoencoder."""
    manifest: Manifest | None
    weights: Path | None
    extend: Path | None


def check_job(
    archive: str | Path | Sequence[str | Path],
    store: str | Path,
    config: PrepareConfig,
    *,
    manifest: str | Path | None,
    autoencoder: str | Path | None,
    extend: str | Path | None,
    archive_moved: bool,
) -> Job:
    """Check everything that can be checked before any work; see `pipeline.job.prepare`."""
    check_local(store)
    path = Path(os.path.realpath(store))
    given = resolve_archive(archive)
    old = None if extend is None else Path(extend)
    if old is not None and os.path.realpath(old) == str(path):
        raise StoreError(
            f"{path}: STORE and --extend are the same store; give a new folder as STORE"
        )
    weights, latent = None, config.autoencoder.latent
    if autoencoder is not None:
        from pipeline.autoencoder import load_autoencoder

        weights = find_weights(Path(autoencoder))
        latent = load_autoencoder(weights).latent  # also checks the file
    listed = None if manifest is None else Path(manifest)
    inputs = digest_inputs(manifest=listed, autoencoder=weights)
    state, known = find_state(path), []
    if state is None:
        check_catalogue_folder(path)
    if state is None and archive_moved:
        raise StoreError(
            f"{path}: this store does not exist yet; prepare it without --archive-moved"
        )
    matched = given
    if state is not None:
        existing = PatchStore(path, allow_building=True)
        check_same_job(existing, config, inputs)
        known = read_archive(path) if has_catalogue(path) else []
        if known:
            matched = match_archive(given, known, existing, moved=archive_moved)
    complete = state == "complete"
    if not complete:
        from pipeline.neighbours import check_index

        check_index(config.index, latent + BODY_SIZES)
    if old is not None and not complete:
        check_extension(old, config)
    return Job(
        name=Path(store),
        path=path,
        config=config,
        state=state,
        archive=matched,
        archive_checked=state is None or bool(known),
        archive_moved=bool(known) and matched != known,
        inputs=inputs,
        manifest=None if listed is None or complete else Manifest(listed, matched),
        weights=weights,
        extend=old,
    )


def check_same_job(store: PatchStore, config: PrepareConfig, inputs: dict[str, str]) -> None:
    """StoreError when a store was started with other settings or other inputs.

    Of a complete store without its catalogue, only the settings are compared.
    """
    if store.format != FORMAT:
        use = "it can be used as it is" if store.state == "complete" else "it cannot be finished"
        raise StoreError(
            f"{store.path}: {store.state}, of store format {store.format}, which this version of"
            f" semgen does not write; {use}. To prepare the archive again, give another folder"
        )
    changed = differences(to_json(config), store.config)
    if changed:
        raise StoreError(
            f"{store.path}: started with other settings ({'; '.join(changed)});"
            " use those, or give another folder"
        )
    surveyed = store.state == "building" and "survey" in store.stages
    if surveyed and survey_version(store.stages) != SURVEY_VERSION:
        raise StoreError(
            f"{store.path}: started by another version of semgen; finish it with that one, or"
            " delete the store and prepare it again"
        )
    if not has_catalogue(store.path):
        if store.state == "complete":
            return
        raise StoreError(
            f"{store.path}: not finished, and its private catalogue"
            f" ({catalogue_folder(store.path)}) is missing, or not readable by you; move it back"
            " beside the store, or delete the store and prepare it again"
        )
    changed = differences(inputs, read_inputs(store.path))
    if changed:
        names = " and ".join(f"--{name}" for name in inputs if any(name in c for c in changed))
        raise StoreError(
            f"{store.path}: started with a different {names}, or with none; give the original file"
            " (or none), or a new STORE"
        )


def match_archive(
    archive: list[Path], known: list[Path], store: PatchStore, *, moved: bool
) -> list[Path]:
    """The archive in the order of the store's first command; StoreError for another archive.

    known
        The archive in the store's catalogue.
    moved
        Whether the `known` folders and files are now those of `archive`, in the same order.
    """
    if set(archive) == set(known):
        return known
    if moved:
        if len(archive) != len(known):
            raise StoreError(
                f"{store.path}: made from {_names(known)}; with --archive-moved, give the same"
                " number of folders or files, in the same order"
            )
        return archive
    new = [path for path in archive if path not in known]
    missing = [path for path in known if path not in archive]
    state = "complete" if store.state == "complete" else "not finished"
    text = f"{store.path}: {state}, and made from {_names(known)}"
    if not new:
        raise StoreError(f"{text}; give all of these; the command gives only {_names(archive)}")
    text += f", not from {_names(new)}"
    if len(missing) == len(new):
        text += "; if the same scans were moved there, add --archive-moved"
    if store.state == "complete":
        raise StoreError(
            f"{text}; to add scans, prepare a new store: semgen prepare {_typed([*known, *new])}"
            f" NEW_STORE --extend {_typed([store.path])}"
        )
    raise StoreError(f"{text}; name the same archive, or give another folder for a new store")


def _names(paths: list[Path]) -> str:
    return " and ".join(map(str, paths))


def _typed(paths: list[Path]) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)


def check_extension(old: Path, config: PrepareConfig) -> None:
    """StoreError unless a survey with these settings would have the results of `old`'s survey."""
    store = PatchStore(old)
    read_rejections(old)  # StoreError without its private catalogue
    changed = differences(
        {name: to_json(config)[name] for name in _SURVEY_SETTINGS},
        {name: store.config[name] for name in _SURVEY_SETTINGS},
    )
    if changed:
        raise StoreError(
            f"{old}: surveyed with other settings ({'; '.join(changed)}); prepare the new store"
            " without --extend, or with the same settings"
        )
    if survey_version(store.stages) != SURVEY_VERSION:
        raise StoreError(
            f"{old}: surveyed by another version of semgen, which found other frame boxes or scans;"
            " prepare the new store without --extend"
        )
