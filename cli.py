"""The command line: parse, call one function, turn errors into one line and an exit status.

Heavy imports stand inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipeline.config import PrepareConfig
    from pipeline.summary import Summary
    from store import PatchStore
    from store.quality import Quality
    from trainer import Event, TrainConfig, TrainSummary

# Threads that wait by spinning make every step many times slower where other processes use the same
# cores (benchmarks/shared_machine.py). OpenMP reads this when torch or FAISS is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_PLAIN_SECONDS = 10.0


class _Path(click.Path):
    """A file or folder; a URL is refused, for it would name a folder such as s3:/bucket."""

    def __init__(self, **rules: bool) -> None:
        super().__init__(path_type=Path, **rules)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if ":" in str(value):
            from store.errors import check_local

            check_local(value)
        return super().convert(value, param, ctx)


_FILE = _Path(exists=True, dir_okay=False)
_FOLDER = _Path(file_okay=False)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers and ranges of them, such as 0-9,12."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        found: list[int] = []
        if isinstance(value, tuple):
            return value
        for part in filter(None, str(value).split(",")):
            first, _, last = part.partition("-")
            if not (first.isdecimal() and (last.isdecimal() or not last)):
                self.fail(f"{value!r}: give numbers such as 3 or 0-9,12", param, ctx)
            if last and int(last) < int(first):
                self.fail(f"{part!r} is no range; the first number must be the smaller", param, ctx)
            found += range(int(first), int(last or first) + 1)
        return tuple(dict.fromkeys(found))


class _Named(click.ParamType):  # type: ignore[type-arg]
    """CLASS=TEXT."""

    name = "class=text"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, str]:
        number, equals, text = str(value).partition("=")
        if not (number.isdecimal() and equals):
            self.fail(f'{value!r}: give a class and a text, such as 3="left lung"', param, ctx)
        return int(number), text


class _Vector(click.ParamType):  # type: ignore[type-arg]
    """As many numbers as names, or a word instead."""

    def __init__(
        self, name: str, example: str, *, number: type = float, word: str | None = None
    ) -> None:
        self.name, self.example, self.number, self.word = name, example, number, word

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...] | str:
        if self.word and value == self.word:
            return self.word
        try:
            numbers = tuple(self.number(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != len(self.name.split(",")):
            word = f", or {self.word}" if self.word else ""
            self.fail(f"{value!r}: give {self.name} such as {self.example}{word}", param, ctx)
        return numbers


_NUMBERS, _NAMED = _Numbers(), _Named()


class _Group(click.Group):
    """Commands in the order of use; expected errors become one line and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough; click ends quietly
        except (KeyboardInterrupt, RuntimeError) as error:
            if not _is_interrupt(error):
                raise
            raise click.ClickException(
                "interrupted; run the same command again to resume"
            ) from error
        except Exception as error:
            text = _explain(error)
            if text is None or ctx.params["debug"]:
                raise  # a bug keeps its traceback
            raise click.ClickException(text) from error


def _explain(error: Exception) -> str | None:
    """One line for an error that is meant for the user; None for a bug."""
    from store.errors import SemgenError

    if isinstance(error, SemgenError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # the system's: rights, disks, networks
        text = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
        if error.errno == errno.ENOSPC:
            text += "; free disk space, then run the same command again to resume"
        return text
    return None


def _is_interrupt(error: BaseException | None) -> bool:
    """Ctrl-C, or what a lock makes of it when it comes while the lock changes hands."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, RuntimeError) and _is_interrupt(error.__context__)
    )


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="semgen", prog_name="semgen")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
def main(debug: bool) -> None:
    """Turn an archive of unlabeled CT scans into a labeled patch store and pretrained 3-D models.

    \b
    semgen demo                     see it work, in about two minutes
    semgen prepare ARCHIVE STORE    discover classes, cut crops; run again to resume
    semgen inspect STORE            what was found
    semgen report STORE OUT.html    the discovered classes, to look at
    semgen browse STORE             the same, with editing
    semgen classes STORE            name classes, exclude some
    semgen pretrain STORE RUN       train; run again to resume
    semgen export RUN FILE          weights for your own task
    semgen finetune TASK RUN        train on your own labels, and test
    semgen task KIND DOWNLOAD OUT   a task from a public data set
    semgen predict RUN INPUT OUT    answer about new images
    semgen compare PLAN OUT         which start helps which task, with statistics
    """  # noqa: D301 (\b is click's mark for text not to be wrapped)


def _demo_recipe() -> tuple[int, PrepareConfig, TrainConfig]:
    """How many patients the demo makes, and how it prepares them and pretrains."""
    from pipeline.config import AutoencoderConfig, PrepareConfig
    from trainer import TrainConfig

    preparing = PrepareConfig(
        classes=10,
        neighbours=8,
        validation_neighbours=3,
        validation_fraction=0.2,
        shape=(16, 32, 32),
        spacing_mm=(3.0, 2.0, 2.0),
        side_steps=(25, 40),
        shift_steps=(-5, 5),
        autoencoder=AutoencoderConfig(width=8, max_steps=150),
    )
    return (
        24,
        preparing,
        TrainConfig(width=4, batch_size=12, epochs=16, warmup_epochs=6, log_every=5),
    )


@main.command()
@click.argument("directory", type=_FOLDER, default=Path("semgen-demo"))
def demo(directory: Path) -> None:
    """See it work on synthetic patients, in about two minutes.

    Makes phantom patients as files, prepares them, pretrains briefly, says what to look at.
    DIRECTORY (default semgen-demo) gets archive/, store/ and run/. Run again to resume.
    """
    from pipeline.job import prepare as prepare_store
    from pipeline.phantom.files import write_archive
    from store import PatchStore
    from store.report import write_report
    from trainer import pretrain

    patients, config, training = _demo_recipe()
    archive, store, run = directory / "archive", directory / "store", directory / "run"
    reporter = _Reporter()
    if not (archive / "landmarks.json").exists():
        write_archive(
            archive, patients=patients, format="mixed", seed=1, matrix=128, progress=reporter
        )
        # one broken series, as every real archive has
        (archive / "broken.nii.gz").write_bytes(b"this is not an image" * 100)
    summary = prepare_store([archive], store, config, progress=reporter)
    _print_summary(summary, store)
    page = directory / "report.html"
    opened = PatchStore(store)
    quality = _load_quality(opened)
    with reporter.stage("report", opened.num_classes, "classes") as advance:
        write_report(opened, quality, page, progress=advance)
    click.echo()
    with _training_events() as on_event:
        done = pretrain(store, run, training, on_event=on_event)
    _print_training(done)
    click.echo(
        f"\nMade: {archive}/ ({summary.accepted + sum(summary.rejected.values())} series, one"
        f" broken on purpose), {store}/ ({summary.classes} classes), {run}/ (weights)."
        f"\nLook at: {page} (the classes, in a browser)"
        f"\n         {run / 'samples.png'} (perturbed, restored, original)"
        f"\n         {_tool('semgen')} inspect {store}"
        f"\n         {_tool('tensorboard')} --logdir {run / 'tensorboard'}"
        f"\nThen with your own scans: {_tool('semgen')} prepare ARCHIVE STORE"
    )


@main.command()
@click.argument("directory", type=_FOLDER)
@click.option("--patients", type=click.IntRange(1), default=12, show_default=True)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["nifti", "dicom", "mixed"]),
    default="nifti",
    show_default=True,
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--matrix",
    type=click.IntRange(64),
    default=256,
    show_default=True,
    help="Voxels along the rows and columns of a slice.",
)
def phantom(directory: Path, patients: int, file_format: Any, seed: int, matrix: int) -> None:
    """Write a synthetic archive with known anatomy.

    DIRECTORY gets one scan a patient, and landmarks.json with the truth.
    """
    from pipeline.phantom.files import write_archive

    write_archive(
        directory,
        patients=patients,
        format=file_format,
        seed=seed,
        matrix=matrix,
        progress=_Reporter(),
    )
    click.echo(
        f"{patients} patients in {directory}\nNext: {_tool('semgen')} prepare {directory} STORE"
    )


@main.command()
@click.argument("paths", nargs=-1, required=True, type=_Path(), metavar="ARCHIVE... STORE")
@click.option(
    "--preset",
    type=click.Choice(["default", "paper"]),
    default="default",
    show_default=True,
    help="paper: the published settings.",
)
@click.option(
    "--config",
    "config_file",
    type=_FILE,
    help="TOML file with any settings (docs/configuration.md).",
)
@click.option("--classes", type=int, help="Classes wanted.  [200]")
@click.option("--neighbours", type=int, help="Training scans per class.  [200]")
@click.option("--validation-neighbours", type=int, help="Validation scans per class.  [30]")
@click.option("--validation-fraction", type=float, help="Share of persons for validation.  [0.1]")
@click.option(
    "--frame",
    type=click.Choice(["body", "scan", "voxel"]),
    help="What coordinates are measured in.  [body]",
)
@click.option(
    "--spacing",
    type=_Vector("z,y,x", "1.25,0.75,0.75", word="native"),
    metavar="Z,Y,X|native",
    help="Crop grid in mm.  [1.25,0.75,0.75]",
)
@click.option("--seed", type=int, help="Key of every random draw.  [0]")
@click.option(
    "--one-per-study/--all-series",
    default=None,
    help="Of several usable DICOM series of a study take the thinnest, or all.  [one]",
)
@click.option(
    "--manifest",
    type=_FILE,
    help="CSV with columns path, patient, split: what to use, and as what.",
)
@click.option(
    "--extend",
    type=_FOLDER,
    metavar="OLD_STORE",
    help="Use the survey of an earlier store of this archive again.",
)
@click.option(
    "--autoencoder",
    type=_Path(exists=True),
    metavar="STORE|FILE",
    help="Embed with the weights of another store, or of a file, instead of training.",
)
@click.option(
    "--archive-moved",
    is_flag=True,
    help="The archive that STORE was begun with lies at ARCHIVE now.",
)
@click.option("--workers", type=click.IntRange(1), help="Worker processes.  [one a core]")
@click.option("--scheduler", metavar="ADDRESS", help="Use a running Dask cluster.")
@click.option("--dry-run", is_flag=True, help="List what would be read, make nothing.")
@click.option("--json", "as_json", is_flag=True, help="Summary as JSON on standard output.")
def prepare(
    paths: tuple[Path, ...],
    preset: str,
    config_file: Path | None,
    autoencoder: Path | None,
    manifest: Path | None,
    extend: Path | None,
    archive_moved: bool,
    workers: int | None,
    scheduler: str | None,
    dry_run: bool,
    as_json: bool,
    spacing: Any,
    **settings: Any,
) -> None:
    """Discover classes in ARCHIVE and cut crops into STORE.

    ARCHIVE is any number of folders and files of CT scans: DICOM, NIfTI, MetaImage, NRRD. Run the
    same command again to resume after any interruption. Which file became which scan is in
    STORE.catalogue, readable by you only.
    """
    from pipeline.config import load_config

    if len(paths) < 2:
        raise click.UsageError("give at least one ARCHIVE, then STORE")
    *archive, store = paths
    config = load_config(config_file, preset=preset, overrides={**settings, "spacing_mm": spacing})
    if dry_run:
        _print_dry_run(archive, config, manifest, as_json=as_json)
        return
    from pipeline.job import prepare as prepare_store

    summary = prepare_store(
        archive,
        store,
        config,
        workers=workers,
        scheduler=scheduler,
        autoencoder=autoencoder,
        manifest=manifest,
        extend=extend,
        archive_moved=archive_moved,
        progress=_Reporter(),
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary)))
    else:
        _print_summary(summary, store)


def _print_dry_run(
    archive: Sequence[Path], config: Any, manifest: Path | None, *, as_json: bool
) -> None:
    from collections import Counter

    from pipeline.stages.survey import list_series

    counts: Counter[str] = Counter()
    rows = []
    for file, num_files, reason, detail in list_series(archive, config, manifest):
        counts[reason or "to read"] += 1
        if as_json:
            rows.append({"file": file, "files": num_files, "reason": reason, "detail": detail})
        else:
            because = f" ({detail.splitlines()[-1]})" if detail else ""
            state = f"rejected: {reason}{because}" if reason else "to read"
            click.echo(f"{file} ({num_files} files): {state}")
    if as_json:
        click.echo(json.dumps(rows))
    else:
        told = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        click.echo(f"{counts.total()} series: {told}")


def _print_summary(summary: Summary, store: Path) -> None:
    rejected = sum(summary.rejected.values())
    reasons = ", ".join(f"{n} {reason}" for reason, n in summary.rejected.items())
    if summary.already_complete:
        unchecked = (
            " Whether it was made from this archive is not known: its private catalogue is missing,"
            " unreadable, or of an older version."
        )
        click.echo(
            f"{store} is complete; nothing to do.{'' if summary.archive_checked else unchecked}"
        )
    because = f" ({reasons})" if reasons else ""
    click.echo(f"scans    {summary.accepted} accepted, {rejected} rejected{because}")
    short = ""
    if summary.classes < summary.classes_wanted:
        short = f" of {summary.classes_wanted} wanted: no more fit without overlap"
    click.echo(f"classes  {summary.classes}{short}; {summary.members} memberships")
    click.echo(
        f"crops    {summary.crops['train']} train, {summary.crops['validation']} validation;"
        f" {_size(summary.bytes)}"
    )
    if summary.seconds:
        times = ", ".join(f"{name} {_duration(s)}" for name, s in summary.seconds.items())
        click.echo(f"time     {times}")
    click.echo(f"store    {store}, fingerprint {summary.fingerprint[:16]}")
    click.echo(
        f"Next: {_tool('semgen')} report {store} classes.html\n"
        f"      {_tool('semgen')} pretrain {store} RUN"
    )


@main.command()
@click.argument("store", type=_FOLDER)
@click.option("--class", "label", type=click.IntRange(0), help="One class and its members.")
@click.option(
    "--paths",
    is_flag=True,
    help="Name the first file of each scan and of each rejected series, from STORE.catalogue.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(store: Path, label: int | None, paths: bool, as_json: bool) -> None:
    """Show scans, rejections, classes and crops of STORE."""
    from pipeline.archive.lookup import read_rejections, read_sources
    from store import PatchStore
    from store.inspect import describe_class, describe_store, scan_name

    opened = PatchStore(store, allow_building=True)
    if label is None:
        facts = describe_store(opened)
        if paths:
            sources = read_sources(store) if "survey" in opened.stages else {}
            facts["scan_files"] = [
                {"scan": scan_name(opened, row), "file": file}
                for row, file in sorted(sources.items())
            ]
            facts["rejected_files"] = [
                {"file": file, "reason": reason, "detail": detail}
                for file, reason, detail in read_rejections(store)
            ]
    else:
        facts = describe_class(opened, label)
        if paths:
            sources = read_sources(store)
            for member in facts["members"]:
                member["file"] = sources[int(opened.split(member["split"]).scan[member["row"]])]
    if as_json:
        click.echo(json.dumps(facts))
    elif label is None:
        _print_store(store, facts)
    else:
        if opened.state == "complete" and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from store.report.terminal import draw_class

            click.echo(draw_class(opened, facts["class"]))
        _print_class(facts)


def _print_store(path: Path, facts: dict[str, Any]) -> None:
    fingerprint = (facts["fingerprint"] or "-")[:16]
    click.echo(f"{path}: {facts['state']}, format {facts['format']}, fingerprint {fingerprint}")
    rejected = ", ".join(f"{n} {reason}" for reason, n in facts["rejected"].items()) or "none"
    click.echo(f"scans: {facts['scans']} of {facts['patients']} patients; rejected: {rejected}")
    for one in facts.get("scan_files", ()):
        click.echo(f"  {one['file']}: scan {one['scan']}")
    for one in facts.get("rejected_files", ()):
        detail = f" ({one['detail'].splitlines()[-1]})" if one["detail"] else ""
        click.echo(f"  {one['file']}: {one['reason']}{detail}")
    crops = facts["crops"]
    click.echo(
        f"crops: {crops['train']} train, {crops['validation']} validation, {facts['shape']} voxels"
        f" of {facts['spacing_mm']} mm, frame {facts['frame']}"
    )
    if facts["classes"]:
        click.echo("class  reference         centre (z, y, x)       members  validation  distance")
    for row in facts["classes"]:
        centre = ", ".join(f"{c:.3g}" for c in row["centre"])
        click.echo(
            f"{row['class']:5d}  {row['reference']}  {centre:21s}  {row['members']:7d}"
            f"  {row['validation_members']:10d}  {row['median_distance']:8.3g}"
        )


def _print_class(facts: dict[str, Any]) -> None:
    centre = ", ".join(f"{c:.4g}" for c in facts["centre"])
    click.echo(f"class {facts['class']}: centre ({centre}) in frame units, z y x")
    click.echo("split       scan              distance  centre in mm (z, y, x)")
    for row in facts["members"]:
        place = ", ".join(f"{p:.1f}" for p in row["centre_mm"])
        file = f"  {row['file']}" if "file" in row else ""
        click.echo(f"{row['split']:10s}  {row['scan']}  {row['distance']:8.4g}  {place}{file}")


@main.command()
@click.argument("store", type=_FOLDER)
@click.argument("out", type=_Path(dir_okay=False))
def report(store: Path, out: Path) -> None:
    """Write the discovered classes of STORE as one page, OUT.html.

    It opens in any browser, needs no network, and holds no path, name or header text.
    """
    from store import PatchStore
    from store.report import write_report

    opened = PatchStore(store)
    quality = _load_quality(opened)
    with _Reporter().stage("report", opened.num_classes, "classes") as advance:
        size = write_report(opened, quality, out, progress=advance)
    click.echo(f"{out}: {opened.num_classes} classes, {_size(size)}; open it in a browser")


@main.command()
@click.argument("store", type=_FOLDER)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="[any free one]")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Network interface to bind to."
)
@click.option("--open/--no-open", "opens", default=True, help="Open a browser.  [open]")
def browse(store: Path, port: int, host: str, opens: bool) -> None:
    """Look at the classes of STORE in a browser; name them, exclude them.

    Changes are saved at once, as by semgen classes. Listens on localhost only, unless --host says
    otherwise; the URL contains an access token. Press Ctrl-C to stop.
    """
    import asyncio
    import webbrowser

    from store import PatchStore
    from store.report.serve import serve

    opened = PatchStore(store)
    quality = _load_quality(opened)

    def tell(address: str) -> None:
        click.echo(f"{address}\nPress Ctrl-C to stop.")
        if opens:
            webbrowser.open(address)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(opened, quality, host=host, port=port, on_start=tell))


@main.command()
@click.argument("store", type=_FOLDER)
@click.option("--name", "names", type=_NAMED, multiple=True, help='Such as 3="left lung".')
@click.option("--note", "notes", type=_NAMED, multiple=True, help='Such as 3="two organs".')
@click.option(
    "--exclude",
    type=_NUMBERS,
    multiple=True,
    help="Leave classes out of training, such as 7 or 2-4,7.",
)
@click.option("--include", type=_NUMBERS, multiple=True, help="Re-include excluded classes.")
@click.option("--quality", is_flag=True, help="How good each class is; best first.")
@click.option("--csv", "as_csv", is_flag=True, help="As CSV.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def classes(
    store: Path,
    names: Sequence[tuple[int, str]],
    notes: Sequence[tuple[int, str]],
    exclude: tuple[tuple[int, ...], ...],
    include: tuple[tuple[int, ...], ...],
    quality: bool,
    as_csv: bool,
    as_json: bool,
) -> None:
    """List the classes of STORE; name them, exclude them from training.

    Annotations are stored beside the crops; the fingerprint does not change.

    \b
    --quality reads all base crops once and keeps the result beside STORE:
    consistency  chance that two members are more alike than a member and a crop
                 of another class: 1 perfect, 0.5 no better than any two crops
    outliers     members that are not like the others
    overlap      share of a crop that another class covers, too
    """  # noqa: D301 (\b is click's mark for text not to be wrapped)
    from store import PatchStore, annotate, read_annotation

    changes: dict[int, dict[str, Any]] = {}
    for label, name in names:
        changes.setdefault(label, {})["name"] = name
    for label, note in notes:
        changes.setdefault(label, {})["note"] = note
    for lists, excluded in ((exclude, True), (include, False)):
        for label in itertools.chain.from_iterable(lists):
            changes.setdefault(label, {})["excluded"] = excluded
    if changes:
        annotate(store, changes)
    said, opened = read_annotation(store), PatchStore(store)
    found: list[dict[str, Any]] = [
        {"class": label, **dataclasses.asdict(said[label]), "members": int(members)}
        for label, members in enumerate((opened.classes.neighbour >= 0).sum(1))
    ]
    if quality:
        from store.quality import as_row

        for row, facts in zip(found, _load_quality(opened), strict=True):
            row |= {name: v for name, v in as_row(facts).items() if name != "label"}
        found.sort(key=lambda row: -row["consistency"])
    if as_json:
        click.echo(json.dumps(found))
    elif as_csv:
        from store.csvfile import write_csv

        write_csv(sys.stdout, found[0], (row.values() for row in found))
    else:
        _print_classes(found)


def _load_quality(store: PatchStore) -> list[Quality]:
    """Of every class, with progress where it is not known yet."""
    from store.quality import count_crops, load_quality

    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] | None = None

        def progress(count: int) -> None:
            nonlocal advance
            if advance is None:
                stage = _Reporter().stage("quality", count_crops(store), "crops")
                advance = stack.enter_context(stage)
            advance(count)

        return load_quality(store, progress=progress)


def _print_classes(rows: list[dict[str, Any]]) -> None:
    judged = "consistency" in rows[0]
    more = "  consistency  outliers  overlap  mostly" if judged else ""
    click.echo(f"class  members{more}  name")
    for row in rows:
        words = f"{row['name']}{' (excluded)' if row['excluded'] else ''}".strip()
        words += f"  - {' '.join(row['note'].split())}" if row["note"] else ""
        if judged:
            tissue = {k.removeprefix("tissue_"): v for k, v in row.items() if "tissue_" in k}
            most = max(tissue, key=lambda name: tissue[name])
            more = (
                f"  {row['consistency']:11.2f}  {row['outliers']:8d}  {row['overlap']:7.0%}"
                f"  {most:6s}"
            )
        click.echo(f"{row['class']:5d}  {row['members']:7d}{more}  {words}".rstrip())


@main.command()
@click.argument("store", type=_FOLDER)
@click.option("--against-archive", is_flag=True, help="Cut a sample again from its sources, too.")
@click.option("--sample", type=click.IntRange(1), default=200, show_default=True, help="Its size.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def verify(store: Path, against_archive: bool, sample: int, as_json: bool) -> None:
    """Read and check everything in STORE.

    Exit status 1, and the broken rows named, if it is not whole.
    """
    from store.verification import count_rows, verify

    with _Reporter().stage("verify", count_rows(store), "rows") as advance:
        problems = list(verify(store, progress=advance))
    if against_archive and not problems:
        from pipeline.audit import audit

        problems = list(audit(store, sample=sample, progress=_Reporter()))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(p) for p in problems]))
    else:
        for problem in problems:
            click.echo(str(problem))
        if not problems:
            click.echo(f"{store}: whole")
    if problems:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("store", type=_FOLDER)
@click.argument("run", type=_FOLDER)
@click.option(
    "--pretext",
    type=click.Choice(["restoration", "inpainting", "shuffling", "rotation", "rubik", "none"]),
    help="What is learned besides the classes.  [restoration]",
)
@click.option("--classify/--no-classify", default=None, help="Learn the classes too.  [classify]")
@click.option(
    "--width", type=int, help="Channels of the first convolution; 32 is the paper's.  [32]"
)
@click.option("--batch-size", type=int, help="Crops of a step, over all processes.  [64]")
@click.option(
    "--accumulate", type=int, help="Gradient-accumulation steps, to need less memory.  [1]"
)
@click.option("--epochs", type=int, help="Maximum number of epochs.  [200]")
@click.option("--steps", type=int, help="Maximum number of optimiser steps.  [none]")
@click.option(
    "--warmup-epochs",
    type=int,
    help="Epochs of encoder and head alone at the start.  [a tenth of the run]",
)
@click.option("--learning-rate", type=float, help="[0.001]")
@click.option("--lr-schedule", type=click.Choice(["step", "plateau"]), help="[step]")
@click.option("--patience", type=int, help="Epochs without a better validation loss.  [50]")
@click.option("--device", help='Such as "cuda" or "cpu".  [auto]')
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "tf32", "bf16"]),
    help="[auto: bf16 on a GPU, else fp32]",
)
@click.option("--compile/--no-compile", default=None, help="Compile the net: faster on a GPU.")
@click.option(
    "--sync-batch-norm", is_flag=True, default=None, help="Batch norm over all processes."
)
@click.option("--threads", type=int, help="Threads that read crops.  [2]")
@click.option(
    "--cache",
    type=click.Choice(["auto", "none", "memory", "device"]),
    help="Where decoded crops are cached.  [auto]",
)
@click.option("--classes", type=_NUMBERS, help="Classes to use, such as 0-9,12.  [all]")
@click.option("--scales", type=_NUMBERS, help="Scales of train crops, such as 0,1.  [all]")
@click.option("--fraction", type=float, help="Share of the training persons to use.  [1]")
@click.option("--seed", type=int, help="[0]")
@click.option(
    "--skip-corrupt",
    is_flag=True,
    default=None,
    help="Leave out corrupt crops and count them, instead of stopping.",
)
@click.option(
    "--init",
    type=click.Path(),
    help="Weights to start from: a run, a file of semgen, or an official checkpoint.",
)
@click.option(
    "--init-part",
    type=click.Choice(["all", "unet", "encoder"]),
    help="Part of these weights to load.  [all]",
)
@click.option("--json", "as_json", is_flag=True, help="Summary as JSON on standard output.")
def pretrain(store: Path, run: Path, as_json: bool, **settings: Any) -> None:
    """Pretrain a 3-D U-Net on STORE into the folder RUN.

    RUN gets weights, metrics, pictures and TensorBoard events. Run again to resume: Ctrl-C and
    SIGTERM write a checkpoint, and one is written every ten minutes. Classes that are excluded
    (semgen classes) are left out.

    Several GPUs: torchrun --nproc-per-node 8 --no-python semgen pretrain STORE RUN
    """
    from trainer import TrainConfig, pretrain

    config = TrainConfig(**{k: v for k, v in settings.items() if v is not None})
    with _training_events() as on_event:
        summary = pretrain(store, run, config, on_event=on_event)
    if os.environ.get("RANK", "0") != "0":  # the first of several processes tells
        return
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), default=str))
    else:
        _print_training(summary)
        click.echo(f"Next: {_tool('semgen')} export {run} weights.safetensors")
        click.echo(f"      {_tool('tensorboard')} --logdir {run / 'tensorboard'}")


def _print_training(summary: TrainSummary) -> None:
    best = ", ".join(f"{name} {value:.4g}" for name, value in summary.best.items())
    state = "already complete" if summary.already_complete else f"ended by {summary.reason}"
    click.echo(
        f"{summary.run}: {state}, {summary.steps} steps, {summary.epochs} epochs,"
        f" {_duration(summary.seconds)}"
    )
    click.echo(f"best at step {summary.best_step}: {best}")
    if summary.num_skipped:
        click.echo(f"{summary.num_skipped} corrupt crops left out; run semgen verify")


@main.command()
@click.argument("run", type=_FOLDER)
@click.argument("file", type=_Path(dir_okay=False))
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["safetensors", "torch", "genesis"]),
    help="[by the suffix of FILE: .safetensors, or torch for .pt and .pth]",
)
@click.option(
    "--part", type=click.Choice(["all", "unet", "encoder"]), default="all", show_default=True
)
def export(run: Path, file: Path, file_format: Any, part: Any) -> None:
    """Write the best weights of RUN to FILE.

    Before the first validation of both losses, these are the last ones. "genesis" is what the
    official Semantic and Models Genesis code loads.
    """
    from trainer import export_weights

    step = export_weights(run, file, format=file_format, part=part)["step"]
    click.echo(f"{file}: {part} of {run} at step {step}, {_size(file.stat().st_size)}")


@main.command()
@click.argument("task", type=_Path())
@click.argument("run", type=_FOLDER)
@click.option(
    "--init",
    metavar="START",
    help="scratch, a run or file of weights, medicalnet:FILE, i3d:FILE.  [scratch]",
)
@click.option(
    "--init-part",
    type=click.Choice(["unet", "encoder"]),
    help="Part of a U-Net's weights to load.  [unet]",
)
@click.option("--width", type=int, help="Channels of the first convolution from scratch.  [32]")
@click.option(
    "--shape",
    type=_Vector("z,y,x", "32,64,64", number=int),
    help="Voxels of the net's input.  [32,64,64]",
)
@click.option(
    "--spacing", type=_Vector("z,y,x", "3,1.5,1.5"), help="Grid in mm.  [median of all cases]"
)
@click.option("--intensity", type=click.Choice(["auto", "ct", "per-image", "unit"]), help="[auto]")
@click.option(
    "--channel", type=click.IntRange(0), help="Channel to use of images that have several, from 0."
)
@click.option(
    "--window",
    type=_Vector("low,high", "-150,250"),
    help="HU window of CT.  [the one that START was pretrained with]",
)
@click.option(
    "--loss",
    type=click.Choice(["auto", "dice", "dice+cross-entropy", "cross-entropy"]),
    help="[dice to segment, cross-entropy to classify]",
)
@click.option("--batch-size", type=int, help="[16]")
@click.option("--epochs", type=int, help="[200]")
@click.option("--steps", type=int, help="Maximum number of optimiser steps.  [none]")
@click.option("--learning-rate", type=float, help="[0.001]")
@click.option("--patience", type=int, help="Epochs without a better validation loss.  [50]")
@click.option("--patches-per-case", type=int, help="Patches drawn per case and epoch.  [8]")
@click.option(
    "--mirror/--no-mirror",
    default=None,
    help="Mirror training examples at random along each axis.  [no]",
)
@click.option("--label-fraction", type=float, help="Share of the training patients.  [1]")
@click.option("--folds", type=int, help="Number of cross-validation folds, by patient.")
@click.option("--fold", type=int, help="Fold to test on, from 0.  [0]")
@click.option("--seed", type=int, help="[0]")
@click.option("--device", help='Such as "cuda" or "cpu".  [auto]')
@click.option("--precision", type=click.Choice(["auto", "fp32", "tf32", "bf16"]), help="[auto]")
@click.option(
    "--cases",
    "cases_path",
    type=_FOLDER,
    help="Folder for prepared cases, which runs may share.  [RUN/cases]",
)
@click.option("--force", is_flag=True, help="Test on scans that were pretrained on, too.")
@click.option("--json", "as_json", is_flag=True, help="Summary as JSON on standard output.")
def finetune(
    task: Path,
    run: Path,
    spacing: tuple[float, ...] | None,
    window: tuple[float, ...] | None,
    cases_path: Path | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fine-tune on TASK, your own labeled images, into the folder RUN; then test.

    TASK is a folder as nnU-Net and the Medical Segmentation Decathlon have it (dataset.json,
    imagesTr, labelsTr), or a CSV file with columns image, one of mask (to segment) and label (to
    classify), and maybe patient and split. Run again to resume.
    """
    from trainer.finetuning import FinetuneConfig
    from trainer.finetuning import finetune as finetune_on

    settings |= {"spacing_mm": spacing, "window_hu": window}
    config = FinetuneConfig(**{k: v for k, v in settings.items() if v is not None})
    with _training_events("finetune") as on_event, _case_stages() as on_case:
        summary = finetune_on(
            task,
            run,
            config,
            cases_path=cases_path,
            force=force,
            on_event=on_event,
            on_case=on_case,
        )
    if as_json:
        click.echo(_to_json(dataclasses.asdict(summary)))
        return
    _print_training(summary.training)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary.scores.items())
    click.echo(
        f"test     {summary.num_test} cases: {scores}" if summary.num_test else "test     none"
    )
    if summary.leaked:
        click.echo(f"WARNING: {len(summary.leaked)} of them were pretrained on; see result.json")
    kind = "IMAGE OUT.nii.gz" if summary.segments else "IMAGE OUT.csv"
    if summary.places:
        kind = "PLACES.csv OUT.csv"
    click.echo(f"Next: {_tool('semgen')} predict {run} {kind}")


def _to_json(value: Any) -> str:
    """As JSON has it: what is no finite number becomes null, a path text."""

    def clean(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(name): clean(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [clean(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(clean(value), default=str, allow_nan=False)


@main.command()
@click.argument("run", type=_FOLDER)
@click.argument("source", type=_Path(), metavar="INPUT")
@click.argument("out", type=_Path())
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--channel",
    type=click.IntRange(0),
    help="Channel to use of images that have several.  [as RUN was trained]",
)
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1, max_open=True),
    help="Overlap of the windows that slide over an image.  [as RUN was tested]",
)
def predict(
    run: Path, source: Path, out: Path, device: str, channel: int | None, overlap: float | None
) -> None:
    """Predict on INPUT with a fine-tuned RUN: an image, a DICOM folder, a folder of images.

    To segment, OUT is a mask (of several images a folder) with the geometry of the image; to
    classify, a CSV file with the probability of each class. For a RUN that was trained on places
    INPUT is a CSV file with columns image, x_mm, y_mm, z_mm.
    """
    from trainer.finetuning import predict as predict_with

    with _Reporter().stage("predict", None, "images") as advance:
        written = predict_with(
            run,
            source,
            out,
            device=device,
            channel=channel,
            overlap=overlap,
            progress=lambda *_: advance(1),
        )
    click.echo(f"{out}: {len(written)} file{'s' * (len(written) > 1)}")


@main.command()
@click.argument("kind", type=click.Choice(["ncc", "ncs", "lcs", "bms", "medmnist"]))
@click.argument("source", type=_Path(), metavar="DOWNLOAD")
@click.argument("out", type=_FOLDER)
@click.option(
    "--negatives",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="ncc: other candidates kept for each nodule; 0 keeps all.",
)
def task(kind: str, source: Path, out: Path, negatives: int) -> None:
    """Make a task from a public DOWNLOAD into the folder OUT.

    \b
    ncc       LUNA16: is a candidate a nodule?
    ncs       LIDC-IDRI: which voxels are the nodule?
    lcs       LiTS: which voxels are the liver?
    bms       BraTS, FLAIR: which voxels are the tumour?
    medmnist  a 3-D .npz file of MedMNIST v2
    """  # noqa: D301
    from trainer.finetuning.datasets import convert

    with _Reporter().stage("task", None, "cases") as advance:
        manifest = convert(kind, source, out, negatives=negatives, progress=advance)
    click.echo(f"{manifest}\nNext: {_tool('semgen')} finetune {manifest} RUN")


@main.command()
@click.argument("plan", type=_Path())
@click.argument("out", type=_FOLDER)
@click.option(
    "--devices",
    default="auto",
    show_default=True,
    help="One process each, such as cuda:0,cuda:1 or cpu,cpu.",
)
@click.option("--force", is_flag=True, help="Test on scans that were pretrained on, too.")
@click.option("--table", "table_only", is_flag=True, help="Train nothing; tables of what is done.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON on standard output.")
def compare(
    plan: Path, out: Path, devices: str, force: bool, table_only: bool, as_json: bool
) -> None:
    """Compare starting points on tasks, as PLAN (a TOML file) says, into the folder OUT.

    OUT gets results.jsonl, one line a trial, and the tables and figures made from it. Run again to
    resume; run elsewhere at the same time to share the work.
    """
    from trainer.comparison.figures import write_figures
    from trainer.comparison.tables import write_tables
    from trainer.comparison.trials import compare as compare_by
    from trainer.comparison.trials import read_results

    if table_only:
        results = read_results(out)
    else:
        with _case_stages("trials") as on_case:
            results = compare_by(
                plan,
                out,
                devices=devices.split(","),
                force=force,
                on_trial=lambda done, total: on_case("compare", done, total),
            )
    if not results:
        raise click.ClickException(f"{out}: no trial is done yet")
    written = [*write_tables(results, out), *write_figures(results, out)]
    if as_json:
        click.echo(json.dumps(results))
        return
    click.echo(written[0].read_text("utf-8"))
    failed = [result for result in results if result.get("failed")]
    click.echo(
        f"{len(results)} trials in {out / 'results.jsonl'}, {len(failed)} of them failed;"
        f" made {_listed(written)}"
    )
    if failed:
        first = failed[0]
        click.echo(
            f"First failure: {first['task']}, {first['start']}: {first['failed']}. To try a failed"
            f" trial again, delete its line in {out / 'results.jsonl'} and run the same command;"
            " to try other settings, give another OUT.",
            err=True,
        )


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(str(file) for file in files)


# Progress --------------------------------------------------------------------------------------


class _Reporter:
    """Progress of named stages: a bar on a terminal, now and then a line elsewhere."""

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int | None, unit: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """A stage of `total` units, `done` by an earlier run; advance the value by so many."""
        shown = _bar if sys.stderr.isatty() else _lines
        with shown(name, total, unit, done) as step:
            yield step


@contextlib.contextmanager
def _bar(name: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:10s}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}, {task.fields[rate]}/s"),
        TimeRemainingColumn(),
    )
    begun = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done, unit=unit, rate="-")

        def advance(count: int) -> None:
            progress.advance(task, count)
            fresh = progress.tasks[0].completed - done
            progress.update(task, rate=f"{fresh / (time.perf_counter() - begun):.3g}")

        yield advance


@contextlib.contextmanager
def _lines(name: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    begun = told = time.perf_counter()
    before = done

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.perf_counter()
        if now - told >= _PLAIN_SECONDS:
            told = now
            rate = (done - before) / (now - begun)
            left = f", {_duration((total - done) / rate)} left" if total and rate else ""
            of = f" of {total}" if total else ""
            click.echo(f"{name}: {done}{of} {unit}, {rate:.3g}/s{left}", err=True)

    yield advance
    now = f", {done - before} of them" if before else ""
    click.echo(f"{name}: {done} {unit}{now} in {_duration(time.perf_counter() - begun)}", err=True)


@contextlib.contextmanager
def _case_stages(unit: str = "cases") -> Iterator[Callable[[str, int, int], None]]:
    """Render how many of a total are done as stages, one after the other.

    What an earlier call did counts neither as done nor for the rate.
    """
    with contextlib.ExitStack() as stage:
        running, told = "", 0
        advance: Callable[[int], None]

        def on_case(what: str, done: int, total: int) -> None:
            nonlocal running, told, advance
            if what != running:
                stage.close()
                advance = stage.enter_context(_Reporter().stage(what, total - done, unit))
                running, told = what, done
            advance(done - told)
            told = done
            if done == total:
                stage.close()

        yield on_case


@contextlib.contextmanager
def _training_events(name: str = "pretrain") -> Iterator[Callable[[Event], None]]:
    """Render a training run's events as lines on standard error."""
    from trainer import Noticed, Started, Stepped, Validated

    told = 0.0

    def show(values: dict[str, float]) -> str:
        return ", ".join(f"{key} {value:.4g}" for key, value in values.items())

    def on_event(event: Event) -> None:
        nonlocal told
        text = ""
        if isinstance(event, Started):
            text = (
                f"{name}: {event.num_train} train and {event.num_validation} validation crops of"
                f" {event.num_classes} classes; {event.num_parameters / 1e6:.3g} M parameters on"
                f" {event.device}; up to {event.total_steps} steps"
            )
            if event.resumed_at:
                text += f", resumed at {event.resumed_at}"
        elif isinstance(event, Validated):
            text = f"epoch {event.epoch}: {show(event.metrics)}" + (" (best)" if event.best else "")
        elif isinstance(event, Noticed):
            text = event.text
        elif isinstance(event, Stepped) and time.perf_counter() - told >= _PLAIN_SECONDS:
            told = time.perf_counter()
            text = (
                f"step {event.step} of {event.total_steps}: {show(event.metrics)};"
                f" {event.cubes_per_s:.3g} cubes/s, {event.wait_share:.0%} waiting for data,"
                f" {_duration(event.remaining_s)} left"
            )
        if text:
            click.echo(text, err=True)

    yield on_event


def _tool(name: str) -> str:
    """A command as it must be typed here: its name, or its path where no shell would find it."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


if __name__ == "__main__":
    main()
