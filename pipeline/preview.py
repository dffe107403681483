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
from pipeline.archive.manifest import Manifest
from pipeline.batch import ClusterConfig
from pipeline.cluster import connect, resolve_workers
from pipeline.config import PrepareConfig
from pipeline.estimate import Estimate, estimate
from pipeline.isolation import ProcessEnded
from pipeline.preflight import check_job
from pipeline.sample import SAMPLED_SCANS, Sample, sample_scan
from pipeline.stages.survey import rejection_reason, survey_headers
from pipeline.tasks import num_threads, run_bounded
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
    store: str | Path,
    config: PrepareConfig,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    scheduler_file: str | Path | None = None,
    cluster: ClusterConfig | str | Path | None = None,
    manifest: str | Path | None = None,
    autoencoder: str | Path | None = None,
    extend: str | Path | None = None,
    archive_moved: bool = False,
    progress: Progress = SILENT,
) -> Preview:
    """List what `prepare` would do with each series, and estimate the job; writes nothing.

    Reads the headers of all series, and a few scans as a sample. Arguments are those of `prepare`,
    and are checked as there; no jobs are started on a `cluster`, but their workers are counted.
    """
    job = check_job(
        archive, store, config, manifest=manifest, autoencoder=autoencoder, extend=extend,
        archive_moved=archive_moved,
    )  # fmt: skip
    listed = job.manifest
    if manifest and not listed:  # of a store that is complete
        listed = Manifest(Path(manifest), job.archive)
    scheduler, jobs = resolve_workers(
        workers=workers, scheduler=scheduler, scheduler_file=scheduler_file, cluster=cluster
    )
    with connect(workers, scheduler, progress) as client, _scratch() as catalogue:
        survey_headers(client, job.archive, catalogue, config, listed, progress)
        samples = _sample(client, catalogue, config, progress)
        series = list(catalogue.listing())
        return Preview(
            series=series,
            estimate=estimate(
                [one for one in series if one.reason is None],
                samples,
                config,
                num_patients=catalogue.count_patients(),
                num_workers=jobs.max_jobs * jobs.workers_per_job if jobs else num_threads(client),
                trains=autoencoder is None,
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
            ended = isinstance(result, ProcessEnded)
            samples.append(Sample(reason=rejection_reason(result)) if ended else result)
            advance(1)
    return samples
