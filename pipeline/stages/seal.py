"""Stage seal: compute the fingerprint; the store is complete."""

from __future__ import annotations

from pipeline.archive.catalogue import Catalogue
from store.atomic import delete_partial_files
from store.progress import Progress
from store.writer import StoreWriter


def seal_store(
    writer: StoreWriter, catalogue: Catalogue, digests: dict[str, list[str]], progress: Progress
) -> None:
    """Run the stage, and delete what only an unfinished job needs.

    digests
        Of every shard, by array.
    """
    with progress.stage("seal", 1, "store") as advance:
        delete_partial_files(writer.path)
        writer.seal(digests)
        catalogue.tidy()
        advance(1)
