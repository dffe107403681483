"""What `prepare` would do with an archive, by headers and a sample; `prepare --dry-run`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from distributed import Client

from pipeline.archive.catalogue import Catalogue, ListedSeries
from pipeline.archive.folders import resolve_archive
from pipeline.archive.manifest import Manifest
from pipeline.archive.series import CRASHED
from pipeline.cluster import check_scheduler, connect, num_threads, run_bounded
from pipeline.config import PrepareConfig
from pipeline.estimate import Estimate, estimate
from pipeline.sample import SAMPLED_SCANS, Sample, sample_scan
from pipeline.stages.survey import survey_headers
from store.inspect import format_counts, format_reason
from store.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """The series of an archive, and what a job would make of them."""

    series: list[ListedSeries]
    estimate: Estimate | None
    """None where no scan can be used, by headers or in the sample."""

    def __str__(self) -> str:
        """Lines of text, for a terminal: paths, too."""
        counts = Counter(one.reason or "to read" for one in self.series)
        lines = [_line(one) for one in self.series]
        lines.append(f"{counts.total()} series: {format_counts(dict(counts.most_common()))}")
        return "\n".join([*lines, *([str(self.estimate)] if self.estimate else [])])


def _line(one: ListedSeries) -> str:
    if one.reason:
        state = f"rejected: {format_reason(one.reason, one.detail)}"
    else:
        size, spacing = (" x ".join(f"{n:.3g}" for n in row) for row in (one.size, one.spacing_mm))
        state = f"to read, {size} voxels of {spacing} mm"
    return f"{one.file} ({one.files} files): {state}"


def preview(
    archive: str | Path | Sequence[str | Path],
    config: PrepareConfig,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    manifest: str | Path | None = None,
    trains: bool = True,
    progress: Progress = SILENT,
) -> Preview:
    """List what `prepare` would do with each series, and estimate the job; writes nothing.

    Reads the headers of all series, and a few scans as a sample. Arguments are those of `prepare`.

    trains
        Whether the job trains its autoencoder.
    """
    roots = resolve_archive(archive)
    listed = Manifest(Path(manifest), roots) if manifest else None
    if scheduler is not None:
        check_scheduler(scheduler)
    with connect(workers, scheduler, progress) as client, _scratch() as catalogue:
        survey_headers(client, roots, catalogue, config, listed, progress)
        samples = _sample(client, catalogue, config, progress)
        series = list(catalogue.listing())
        return Preview(
            series=series,
            estimate=estimate(
                [one for one in series if one.reason is None],
                samples,
                config,
                num_patients=catalogue.count_patients(),
                num_workers=num_threads(client),
                trains=trains,
            ),
        )


@contextlib.contextmanager
def _scratch() -> Iterator[Catalogue]:
    """A catalogue that is deleted at the end."""
    with (
        TemporaryDirectory() as folder,
        contextlib.closing(Catalogue(Path(folder) / "catalogue")) as catalogue,
    ):
        yield catalogue


def _sample(
    client: Client, catalogue: Catalogue, config: PrepareConfig, progress: Progress
) -> list[Sample]:
    """What a few scans took, chosen at random but always the same ones."""
    chosen = list(catalogue.usable(SAMPLED_SCANS))
    samples = []
    with progress.stage("sample", len(chosen), "scans") as advance:
        for _, result in run_bounded(client, sample_scan, chosen, config):
            crashed = isinstance(result, BaseException)
            samples.append(Sample(reason=CRASHED) if crashed else result)
            advance(1)
    return samples
