"""List an archive's series by their headers, in this process."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from pipeline.archive.catalogue import Catalogue, ListedSeries
from pipeline.archive.folders import resolve_archive
from pipeline.archive.manifest import Manifest
from pipeline.config import PrepareConfig
from pipeline.stages import survey
from store.progress import SILENT


def list_series(
    archive: Path | Sequence[Path], config: PrepareConfig, manifest: Path | None = None
) -> list[ListedSeries]:
    """What a dry run lists; no workers are started."""
    roots = resolve_archive(archive)
    listed = Manifest(manifest, roots) if manifest else None
    with (
        TemporaryDirectory() as folder,
        contextlib.closing(Catalogue(Path(folder))) as catalogue,
        patch.object(survey, "run_bounded", _run_here),
    ):
        survey.survey_headers(None, roots, catalogue, config, listed, SILENT)  # type: ignore[arg-type]
        return list(catalogue.listing())


def _run_here(
    client: None, function: Callable[..., Any], items: Iterable[Any], *arguments: Any
) -> Iterator[tuple[Any, Any]]:
    return ((item, function(item, *arguments)) for item in items)
