"""What must hold before a job begins, so that it fails at once and in one line."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.archive.folders import ArchiveError
from pipeline.archive.lookup import (
    catalogue_folder,
    has_catalogue,
    read_archive,
    read_inputs,
    read_rejections,
)
from pipeline.config import PrepareConfig
from store.errors import SemgenError, check_local
from store.format import AUTOENCODER_FILE, SURVEY_VERSION, StoreError
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
"""Settings that decide which series are accepted and what the survey notes of them."""


_ROUNDING_MM = 1e-6


class PrepareError(SemgenError):
    """The job cannot go on; the message says why and what to do."""


def find_state(store: Path) -> str | None:
    """State of the store that lies there, "building" or "complete"; None where none was begun.

    What a kill during a store's creation leaves does not count. StoreError where it is no store.
    """
    if not store.exists() or (store.is_dir() and all(map(_is_partial, store.iterdir()))):
        return None
    return PatchStore(store, allow_building=True).state


def _is_partial(path: Path) -> bool:
    return path.name.startswith("zarr.") and path.suffix == ".partial"


def resolve_archive(archive: Sequence[Path]) -> list[Path]:
    """Each folder and file once, absolute and without links, so that spellings compare equal.

    A linked file keeps its own name: its target's may not tell what it is.
    """
    resolved = []
    for path in archive:
        check_local(path)
        if not path.exists():
            raise ArchiveError(f"{path}: no such file or folder")
        folder, name = (path, "") if path.is_dir() else (path.parent, path.name)
        resolved.append(Path(os.path.realpath(folder)) / name)
    return list(dict.fromkeys(resolved))


def find_weights(autoencoder: Path) -> Path:
    """The file of weights that was given, or that of the store that was given."""
    if not autoencoder.is_dir():
        return autoencoder
    if "embed" not in PatchStore(autoencoder, allow_building=True).stages:
        raise StoreError(
            f"{autoencoder}: has no autoencoder yet; finish preparing it, or give a file of weights"
        )
    return autoencoder / AUTOENCODER_FILE


def digest_inputs(**files: Path | None) -> dict[str, str]:
    """SHA-256 of the files that shape a store beside its settings, "" for those not given."""
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
        for name, file in files.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What lies at STORE before a job, and the archive that it is to be made from.

    Attributes
    ----------
    state
        "building", "complete", or None where nothing was begun.
    archive
        In the order in which the store's first command named it.
    archive_checked
        Whether it is the archive that the store was begun with, or there was none.
    archive_moved
        Whether it lies elsewhere than the store's catalogue says.
    """

    state: str | None
    archive: list[Path]
    archive_checked: bool = True
    archive_moved: bool = False


def find_job(
    store: Path,
    archive: list[Path],
    config: PrepareConfig,
    inputs: dict[str, str],
    *,
    archive_moved: bool,
) -> Found:
    """Look at what lies there; StoreError unless the job that is asked for may go on with it."""
    state = find_state(store)
    if state is None:
        if archive_moved:
            raise StoreError(f"{store}: not begun yet; prepare it without --archive-moved")
        return Found(state=state, archive=archive)
    existing = PatchStore(store, allow_building=True)
    check_same_job(existing, config, inputs)
    known = read_archive(store) if has_catalogue(store) else []
    if not known:
        return Found(state=state, archive=archive, archive_checked=False)
    archive = match_archive(archive, known, existing, moved=archive_moved)
    return Found(state=state, archive=archive, archive_moved=archive != known)


def check_same_job(store: PatchStore, config: PrepareConfig, inputs: dict[str, str]) -> None:
    """StoreError when a store was begun with other settings or other inputs.

    A complete store without its catalogue is held against the settings alone.
    """
    changed = differences(to_json(config), store.config)
    if changed:
        raise StoreError(
            f"{store.path}: begun with other settings ({'; '.join(changed)});"
            " use those, or give another folder"
        )
    surveyed = store.state == "building" and "survey" in store.stages
    if surveyed and survey_version(store) != SURVEY_VERSION:
        raise StoreError(
            f"{store.path}: begun by another version of semgen; finish it with that one, or"
            " delete the store and prepare it again"
        )
    if not has_catalogue(store.path):
        if store.state == "complete":
            return
        raise StoreError(
            f"{store.path}: not finished, and its private catalogue"
            f" ({catalogue_folder(store.path)}) is missing, or you may not read it; move it back"
            " beside the store, or delete the store and prepare it again"
        )
    changed = differences(inputs, read_inputs(store.path))
    if changed:
        names = " and ".join(f"--{name}" for name in inputs if any(name in c for c in changed))
        raise StoreError(
            f"{store.path}: begun with another {names}, or without; use the same, or give another"
            " folder"
        )


def match_archive(
    archive: list[Path], known: list[Path], store: PatchStore, *, moved: bool
) -> list[Path]:
    """The same archive in the order in which the store's first command named it.

    known
        What the store's catalogue has kept of it.
    moved
        Whether `archive` is where the `known` ones, in this order, lie now.

    Raises StoreError when it is another archive.
    """
    if set(archive) == set(known):
        return known
    if moved:
        if len(archive) != len(known):
            raise StoreError(
                f"{store.path}: made from {_names(known)}; with --archive-moved name as many"
                " folders or files, in this order"
            )
        return archive
    new = [path for path in archive if path not in known]
    missing = [path for path in known if path not in archive]
    state = "complete" if store.state == "complete" else "not finished"
    text = f"{store.path}: {state}, and made from {_names(known)}"
    if not new:
        raise StoreError(f"{text}; name all of them, not only {_names(archive)}")
    text += f", not from {_names(new)}"
    if len(missing) == len(new):
        text += "; if the same scans lie there now, add --archive-moved"
    if store.state == "complete":
        raise StoreError(
            f"{text}; to add scans, prepare a new store: semgen prepare {_typed([*known, *new])}"
            f" NEW_STORE --extend {store.path}"
        )
    raise StoreError(f"{text}; name the same archive, or give another folder for a new store")


def _names(paths: list[Path]) -> str:
    return " and ".join(map(str, paths))


def _typed(paths: list[Path]) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)


def check_extension(old: Path, config: PrepareConfig) -> None:
    """StoreError unless the survey of `old` is what a survey under these settings would find."""
    read_rejections(old)  # StoreError without its private catalogue
    store = PatchStore(old)
    changed = differences(
        {name: to_json(config)[name] for name in _SURVEY_SETTINGS},
        {name: store.config[name] for name in _SURVEY_SETTINGS},
    )
    if changed:
        raise StoreError(f"{old}: surveyed with other settings ({'; '.join(changed)})")
    if survey_version(store) != SURVEY_VERSION:
        raise StoreError(
            f"{old}: surveyed by another version of semgen, which found other frame boxes or scans;"
            " prepare the new store without --extend"
        )


def survey_version(store: PatchStore) -> int:
    """Version of a store's survey, which must be finished."""
    return int(store.stages["survey"].get("version", 1))
