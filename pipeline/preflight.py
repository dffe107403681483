"""Checks before a job starts: what exists at STORE, and whether the job may continue it."""

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
"""Settings that affect which series are accepted, and the results of the survey."""


class PrepareError(SemgenError):
    """The job cannot continue; the message says why and what to do."""


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
class Found:
    """State of a store before a job, and its archive."""

    state: str | None
    """"building", "complete", or None where there is no store yet."""
    archive: list[Path]
    """In the order of the first command for this store."""
    archive_checked: bool = True
    """False where the catalogue, and so the store's archive, is unknown."""
    archive_moved: bool = False
    """Whether the archive is elsewhere than the store's catalogue says."""


def find_job(
    store: Path,
    archive: list[Path],
    config: PrepareConfig,
    inputs: dict[str, str],
    *,
    archive_moved: bool,
) -> Found:
    """State of the store; StoreError unless a job like this one may continue it."""
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

    Of a complete store without its catalogue, only the settings are compared.
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
            f" ({catalogue_folder(store.path)}) is missing, or not readable by you; move it back"
            " beside the store, or delete the store and prepare it again"
        )
    changed = differences(inputs, read_inputs(store.path))
    if changed:
        names = " and ".join(f"--{name}" for name in inputs if any(name in c for c in changed))
        raise StoreError(
            f"{store.path}: begun with another {names}, or without one; use the same, or"
            " give another folder"
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
                f"{store.path}: made from {_names(known)}; with --archive-moved, name as many"
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
    """StoreError unless a survey with these settings would have the results of `old`'s survey."""
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
    """Version of a store's finished survey; 1 where none was recorded."""
    return int(store.stages["survey"].get("version", 1))
