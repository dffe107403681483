"""List an archive's series by their headers, in this process."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.archive.catalogue import Catalogue, ListedSeries
from pipeline.archive.folders import resolve_archive
from pipeline.archive.manifest import Manifest
from pipeline.config import PrepareConfig
from pipeline.stages.survey import survey_headers
from store.progress import SILENT


def list_series(
    archive: Path | Sequence[Path], config: PrepareConfig, manifest: Path | None = None
) -> list[ListedSeries]:
    """What a dry run lists."""
    roots = resolve_archive(archive)
    listed = Manifest(manifest, roots) if manifest else None
    with TemporaryDirectory() as folder, contextlib.closing(Catalogue(Path(folder))) as catalogue:
        survey_headers(None, roots, catalogue, config, listed, SILENT)
        return list(catalogue.listing())
