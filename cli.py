"""The command line: parse, call one function, turn errors into one line and an exit status.

Heavy imports stand inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from pipeline.config import HEADINGS as PREPARE_HEADINGS
from pipeline.config import PRESETS, PrepareConfig, load_config
from store.command_line.console import Group, MainGroup, Terminal, has_colour, is_quiet
from store.command_line.options import (
    CLASS_TEXT,
    COUNT,
    FILE,
    FOLDER,
    NUMBERS,
    POSITION,
    STORE,
    LocalPath,
    Vector,
    options_from,
)
from store.command_line.resolved import Resolved, recorded, resolve, template
from store.errors import check_local
from store.settings import load, read_toml
from trainer.config import HEADINGS as TRAIN_HEADINGS
from trainer.config import Part, TrainConfig, suggest_batch_size
from trainer.finetuning.config import HEADINGS as FINETUNE_HEADINGS
from trainer.finetuning.config import FinetuneConfig

# Threads that wait by spinning make every step many times slower where other processes use the same
# cores (benchmarks/shared_machine.py). OpenMP reads this when torch or FAISS is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_KINDS = {"prepare": PrepareConfig, "pretrain": TrainConfig, "finetune": FinetuneConfig}
"""Settings by command."""
_DEMO_PATIENTS = 24
_DEMO_TRAINING = TrainConfig(width=4, batch_size=12, epochs=16, warmup_epochs=6, log_every=5)


# What commands share ----------------------------------------------------------------------------


def _echo(result: object, *commands: Sequence[str | Path], as_json: bool = False) -> None:
    """Print what was done: as JSON, or with the commands to type next unless it is to be quiet.

    Words that are paths are typed so that the shell and the command take them as paths.
    """
    if as_json:
        _echo_json(result)
        return
    if is_quiet():
        commands = ()
    head, lines = "Next:", [str(result)]
    for name, *words in commands:
        typed = [shlex.quote(str(_as_path(word))) for word in words]
        lines.append(" ".join([f"{head:5s}", shlex.quote(_tool(str(name))), *typed]))
        head = ""
    click.echo("\n".join(lines))


def _tool(name: str) -> str:
    """A command as it can be typed here: its name, or its path if it is not on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)


def _as_path(word: str | Path) -> str | Path:
    """A path that starts with a dash, so that it is not taken for an option; others as they are."""
    return f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else word


def _open_browser(url: str) -> None:
    """Open a page in a graphical browser, if there is one, without waiting for it."""
    import threading
    import webbrowser

    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:  # that one runs in this terminal
        threading.Thread(target=browser.open, args=(url,), daemon=True).start()


def _echo_json(value: object) -> None:
    from store.inspect import format_json

    click.echo(format_json(value))


_STORE = click.argument("store", type=STORE, metavar="STORE|URL")
_LOCAL_STORE = click.argument("store", type=FOLDER)
_RUN = click.argument("run", type=FOLDER)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FORCE = click.option(
    "--force", is_flag=True, help="Also test on scans that were used for pretraining."
)
_PRESET = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="default",
    show_default=True,
    help='Named settings: "paper" as published, "demo" for a few small scans.',
)
_ONE_PER_STUDY = click.option(
    "--one-per-study/--all-series",
    default=None,
    help="Of several usable DICOM series of a study use the thinnest axial one, or all.  [default:"
    " one-per-study]",
)


@click.group(
    cls=MainGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="semgen", prog_name="semgen")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
def main(debug: bool) -> None:
    """Turn an archive of unlabeled CT scans into a labeled patch store and pretrained 3-D models.

    Start with `semgen demo`. Then: prepare, report, pretrain, export.
    """


main.sections = {
    "Prepare an archive": ("demo", "phantom", "prepare", "match"),
    "Look at a store": ("inspect", "report", "browse", "classes", "export-class"),
    "Check and share a store": ("verify", "push"),
    "Pretrain, and use the weights": ("pretrain", "export"),
    "Fine-tune and compare": ("task", "finetune", "predict", "compare"),
    "This command line": ("config", "completion"),
}

# Commands ---------------------------------------------------------------------------------------


@main.command()
@click.argument("directory", type=FOLDER, default=Path("semgen-demo"))
def demo(directory: Path) -> None:
    """Try semgen on synthetic patients: prepare, pretrain and look, in about two minutes.

    Makes phantom patients as files, prepares them, pretrains briefly, and writes two pages.
    DIRECTORY (default semgen-demo) gets archive/, store/, report.html, run/ and run.html. Run
    again to resume.
    """
    from pipeline import prepare
    from pipeline.phantom.files import write_archive
    from store import PatchStore
    from store.report import write_report
    from trainer import pretrain
    from trainer.messages import show_events
    from trainer.report import write_run_report

    archive, store, run = directory / "archive", directory / "store", directory / "run"
    progress, page = Terminal(), directory / "report.html"
    if not (archive / "landmarks.json").exists():
        write_archive(
            archive, patients=_DEMO_PATIENTS, format="mixed", seed=1, matrix=128, progress=progress
        )
    broken = archive / "broken.nii.gz"  # every real archive has such series
    if not broken.exists():
        broken.write_bytes(b"this is not an image" * 100)
    summary = prepare(archive, store, load_config(preset="demo"), progress=progress)
    click.echo(f"{summary}\n")
    write_report(PatchStore(store), page, progress=progress)
    trained = pretrain(
        store, run, _DEMO_TRAINING, on_event=show_events("pretrain", quiet=is_quiet())
    )
    curves = directory / "run.html"
    write_run_report([run], curves, stores=[PatchStore(store)], progress=progress)
    click.echo(
        f"{trained}\n"
        f"\nMade: {archive}/ ({summary.accepted + sum(summary.rejected.values())} series, one"
        f" broken on purpose), {store}/ ({summary.classes} classes), {run}/ (weights)."
        f"\nLook at: {page} (the classes, in a browser)"
        f"\n         {curves} (the training: curves, restored crops, confusion of classes)"
        f"\n         {_tool('semgen')} inspect {store}"
        f"\n         {_tool('tensorboard')} --logdir {run / 'tensorboard'}"
        f"\nThen with your own scans: {_tool('semgen')} prepare ARCHIVE STORE"
    )


@main.command()
@click.argument("directory", type=FOLDER)
@click.option(
    "--patients",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Number of patients.",
)
@click.option(
    "--format",
    type=click.Choice(["nifti", "dicom", "mixed"]),
    default="nifti",
    show_default=True,
    help="File format; mixed alternates between both.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed.")
@click.option(
    "--matrix",
    type=click.IntRange(64, 2048),
    default=256,
    show_default=True,
    help="Rows and columns of a slice.",
)
@click.option(
    "--varied",
    is_flag=True,
    help="Harder patients: more variation of build and organ position, scans cut at both ends, some"
    " with arms in the scan, a mass or a pleural effusion.",
)
@click.option(
    "--masks", is_flag=True, help="Also write organ masks into the folder DIRECTORY.masks."
)
def phantom(directory: Path, masks: bool, **options: Any) -> None:
    """Write a synthetic archive with known anatomy.

    DIRECTORY gets one scan per patient, and landmarks.json with the true positions.
    """
    from pipeline.phantom.files import masks_folder, write_archive

    write_archive(directory, masks=masks, **options, progress=Terminal())
    made = f"{options['patients']} patients in {directory}"
    if masks:
        made += f", their organ masks in {masks_folder(directory)}"
    _echo(made, ["semgen", "prepare", directory, "STORE"])


def _read_prepare_config(file: Path | None, options: dict[str, Any]) -> PrepareConfig:
    return load_config(file, preset=options.pop("preset"), overrides=options)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=LocalPath(), metavar="ARCHIVE... STORE")
@click.option(
    "--dry-run",
    is_flag=True,
    help="List the series that would be read; estimate crops, disk and time; write nothing.",
)
@click.option(
    "--manifest",
    type=FILE,
    help="CSV file with columns path, patient, split: which series to use, and for which split.",
)
@click.option(
    "--extend",
    type=FOLDER,
    metavar="OLD_STORE",
    help="Earlier store of this archive; series that did not change are not surveyed again.",
)
@click.option(
    "--autoencoder",
    type=LocalPath(exists=True),
    metavar="STORE|FILE",
    help="Reuse the autoencoder of another store, or of a file, instead of training one.",
)
@click.option(
    "--archive-moved",
    is_flag=True,
    help="The archive of STORE has been moved; ARCHIVE is its new location.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Worker processes.  [default: one per core]"
)
@click.option("--scheduler", metavar="ADDRESS", help="Address of a running Dask scheduler.")
@click.option("--scheduler-file", type=FILE, help="File that the Dask scheduler wrote.")
@click.option(
    "--cluster",
    type=FILE,
    metavar="FILE.toml",
    help="Settings of a batch system (SLURM, PBS, LSF, SGE) whose jobs are the workers.",
)
@_JSON
@_PRESET
@options_from(PrepareConfig, _read_prepare_config, headings=PREPARE_HEADINGS)
@_ONE_PER_STUDY
def prepare(
    paths: tuple[Path, ...], config: PrepareConfig, dry_run: bool, as_json: bool, **job: Any
) -> None:
    """Discover classes in ARCHIVE and cut crops into STORE.

    ARCHIVE is any number of folders and files with CT scans: DICOM, NIfTI, MetaImage, NRRD. Run the
    same command again to resume after any interruption. STORE.catalogue, readable by you only,
    records which file became which scan.
    """
    if len(paths) < 2:
        raise click.UsageError("give at least one ARCHIVE, then STORE")
    *archive, store = paths
    if dry_run:
        from pipeline.preview import preview

        found = preview(archive, store, config, **job, progress=Terminal())
        _echo(found, as_json=as_json)
        return
    from pipeline import prepare

    summary = prepare(archive, store, config, **job, progress=Terminal())
    size = suggest_batch_size(config.shape)
    batch = ["--batch-size", str(size)] if size < TrainConfig().batch_size else []
    _echo(
        summary,
        ["semgen", "report", store, "classes.html"],
        ["semgen", "pretrain", store, "RUN", *batch],
        as_json=as_json,
    )


@main.command()
@_STORE
@click.option("--class", "label", type=click.IntRange(0), help="Show one class and its members.")
@click.option(
    "--paths",
    is_flag=True,
    help="Show the first file of each scan and each rejected series, from STORE.catalogue.",
)
@_JSON
def inspect(store: str | Path, label: int | None, paths: bool, as_json: bool) -> None:
    """Show scans, rejected series, classes and crops of STORE."""
    from store import PatchStore
    from store.inspect import describe_class, describe_store, format_class, format_store

    if paths:
        check_local(store)
    opened = PatchStore(store, allow_building=True)
    facts = describe_store(opened) if label is None else describe_class(opened, label)
    if paths:
        from pipeline.archive.lookup import add_paths

        add_paths(facts, opened)
    if as_json:
        _echo_json(facts)
    elif label is None:
        click.echo(format_store(store, facts))
    else:
        if opened.state == "complete" and has_colour(sys.stdout):
            from store.report.terminal import draw_class

            click.echo(draw_class(opened, label))
        click.echo(format_class(facts))


@main.command()
@click.argument("sources", type=STORE, nargs=-1, required=True, metavar="STORE|URL|RUN...")
@click.argument("out", type=LocalPath(dir_okay=False))
@click.option(
    "--store", "stores", type=STORE, multiple=True, metavar="STORE|URL",
    help="The store of the runs: adds confusion of classes and a map of features. Repeat it for"
    " runs of several stores.",
)  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True,
    help="PyTorch device for confusion and features (only with --store); auto is a GPU if there is"
    " one, else the CPU.",
)  # fmt: skip
@click.option("--names", is_flag=True, help="Show the names of RUN folders and of test cases.")
def report(sources: Sequence[str | Path], out: Path, **options: Any) -> None:
    """Write the classes of STORE, or training runs, as one page, OUT.html.

    RUN is the folder of a pretraining or fine-tuning run, or of a comparison. Several runs are
    shown together: curves, restored crops over time, settings, scores. OUT.html opens in any
    browser without a network, and contains no path, name or header text.
    """
    from store import PatchStore
    from store.inspect import format_size
    from store.report import write_report
    from trainer.report import is_run

    runs = [Path(source) for source in sources if is_run(Path(source))]
    if runs or len(sources) > 1:
        from trainer.report import write_run_report

        options["stores"] = [PatchStore(store) for store in options["stores"]]
        click.echo(write_run_report(list(map(Path, sources)), out, progress=Terminal(), **options))
        return
    if options != {"stores": (), "device": "auto", "names": False}:
        raise click.UsageError(f"{sources[0]}: --store, --device and --names are for a RUN only")
    opened = PatchStore(sources[0])
    size = write_report(opened, out, progress=Terminal())
    click.echo(f"{out}: {opened.num_classes} classes, {format_size(size)}; open it in a browser")


@main.command()
@_LOCAL_STORE
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port.  [default: any free one]"
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Network interface to bind to."
)
@click.option("--open/--no-open", "opens", default=True, show_default=True, help="Open a browser.")
@click.option(
    "--paths",
    is_flag=True,
    help="Also show the first file of each scan and each rejected series, from STORE.catalogue.",
)
def browse(store: Path, port: int, host: str, opens: bool, paths: bool) -> None:
    """Decide on the classes of STORE in a browser: keep, exclude, name, compare.

    Each change is saved immediately; `semgen classes` shows it. Listens on localhost only, unless
    --host is given; the URL contains an access token. Press Ctrl-C to stop.
    """
    import asyncio

    from store import PatchStore
    from store.quality import load_quality
    from store.report.serve import serve

    def show(url: str) -> None:
        click.echo(f"{url}\nPress Ctrl-C to stop.")
        if opens:
            _open_browser(url)

    opened = PatchStore(store)
    files: dict[str, Any] = {}
    if paths:
        from pipeline.archive.lookup import read_rejections, read_sources

        files = {"paths": read_sources(store), "rejected_files": read_rejections(store)}
    quality = load_quality(opened, progress=Terminal())
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(opened, quality, host=host, port=port, on_start=show, **files))


@main.command()
@_STORE
@click.option(
    "--name", "names", type=CLASS_TEXT, multiple=True, help='Name a class, such as 3="left lung".'
)
@click.option(
    "--note", "notes", type=CLASS_TEXT, multiple=True, help='Add a note, such as 3="two organs".'
)
@click.option(
    "--exclude",
    type=NUMBERS,
    multiple=True,
    help="Exclude classes from training, such as 7 or 2-4,7.",
)
@click.option("--include", type=NUMBERS, multiple=True, help="Re-include excluded classes.")
@click.option(
    "--keep", type=NUMBERS, multiple=True, help="Mark classes as good, such as 1 or 1,4-6."
)
@click.option(
    "--tags",
    type=CLASS_TEXT,
    multiple=True,
    help='Replace the tags of a class, such as 3="vessel,left".',
)
@click.option(
    "--exclude-member",
    type=CLASS_TEXT,
    multiple=True,
    metavar="CLASS=SCAN",
    help="Exclude one member of a class from training, such as 3=91ab: first digits of a scan id.",
)
@click.option(
    "--include-member",
    type=CLASS_TEXT,
    multiple=True,
    metavar="CLASS=SCAN",
    help="Re-include an excluded member.",
)
@click.option(
    "--export",
    "export_file",
    type=LocalPath(dir_okay=False),
    help="Write names, notes, tags and decisions to a .csv or .json file.",
)
@click.option("--import", "import_file", type=FILE, help="Apply such a file.")
@click.option("--quality", is_flag=True, help="Show the quality of each class, best first.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@_JSON
def classes(
    store: str | Path,
    names: Sequence[tuple[int, str]],
    notes: Sequence[tuple[int, str]],
    exclude: tuple[tuple[int, ...], ...],
    include: tuple[tuple[int, ...], ...],
    keep: tuple[tuple[int, ...], ...],
    tags: Sequence[tuple[int, str]],
    exclude_member: Sequence[tuple[int, str]],
    include_member: Sequence[tuple[int, str]],
    export_file: Path | None,
    import_file: Path | None,
    quality: bool,
    as_csv: bool,
    as_json: bool,
) -> None:
    """List the classes of STORE; name, keep or exclude them.

    Annotations are stored beside the crops; the fingerprint does not change. `semgen pretrain`
    leaves out excluded classes and members. --import is applied before the other options, --export
    after them.

    \b
    --quality reads all base crops once and caches the result beside STORE:
    grade         good from a consistency of 0.9, fair from 0.8, mixed below; best first
                  within a grade: consistency times body
    consistency   probability that two members are more similar than a member and a
                  crop of another class: 1 is perfect, 0.5 is chance
    outliers      members that are not similar to the others
    overlap       share of a crop that another class also covers
    median score  how well the members match the reference: 1 is perfect
    weak          members whose match only just passed
    body          share of the reference's crop that is body
    """  # noqa: D301 (\b is click's mark for text not to be wrapped)
    from store import PatchStore
    from store.csvfile import write_csv
    from store.decisions import change_classes, export_decisions, import_decisions
    from store.inspect import describe_classes, format_classes

    if as_csv and as_json:
        raise click.UsageError("give either --csv or --json")
    both = {n for labels in exclude for n in labels} & {n for labels in include for n in labels}
    if both:
        raise click.UsageError(f"class {min(both)}: give either --exclude or --include")
    changes: dict[int, dict[str, Any]] = {}
    given: list[tuple[str, int, Any]] = [
        *(("name", *pair) for pair in names),
        *(("note", *pair) for pair in notes),
        *(("tags", label, text.split(",")) for label, text in tags),
        *(("excluded", label, True) for labels in exclude for label in labels),
        *(("excluded", label, False) for labels in include for label in labels),
        *(("kept", label, True) for labels in keep for label in labels),
    ]
    for field, label, value in given:
        changes.setdefault(label, {})[field] = value
    members = [(*member, True) for member in exclude_member]
    members += [(*member, False) for member in include_member]
    opened = PatchStore(store)
    if import_file:
        count = import_decisions(opened, import_file)
        click.echo(f"{import_file}: {count} classes changed", err=True)
    if changes or members:
        change_classes(opened, changes, members)
    if export_file:
        click.echo(f"{export_file}: {export_decisions(opened, export_file)} classes", err=True)
    found = describe_classes(opened, quality=quality, progress=Terminal())
    if as_json:
        _echo_json(found)
    elif as_csv:
        write_csv(sys.stdout, found[0], (row.values() for row in found))
    else:
        click.echo(format_classes(found))


@main.command("export-class")
@_STORE
@click.argument("label", type=click.IntRange(0), metavar="CLASS")
@click.argument("out", type=FOLDER)
@click.option(
    "--members",
    type=COUNT,
    default="20",
    show_default=True,
    help="Number of members: the reference, then those nearest to it; or all.",
)
@click.option("--all-scales", is_flag=True, help="Write crops of all scales, not only base crops.")
@_JSON
def export_class(
    store: str | Path, label: int, out: Path, members: int | None, all_scales: bool, as_json: bool
) -> None:
    """Write members of CLASS in STORE as NIfTI files into the new folder OUT.

    Files are named by scan id; OUT/members.csv lists them. If STORE.catalogue and the archive are
    readable, each file lies over its original scan in a viewer such as 3D Slicer. Share these files
    only as you would share the scans.
    """
    from pipeline.class_files import export_class

    done = export_class(
        store, label, out, members=members, all_scales=all_scales, progress=Terminal()
    )
    _echo(done, as_json=as_json)


@main.command()
@_STORE
@click.option(
    "--against-archive", is_flag=True, help="Also cut a sample of crops again from the archive."
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Number of crops to cut again.",
)
@_JSON
def verify(store: str | Path, against_archive: bool, sample: int, as_json: bool) -> None:
    """Read and check everything in STORE.

    Exit status 1 if anything is broken; the broken rows are named.
    """
    from store import verify

    if against_archive:
        check_local(store)
    problems = list(verify(store, progress=Terminal()))
    if against_archive and not problems:
        from pipeline.audit import audit

        problems = list(audit(store, sample=sample, progress=Terminal()))
    if as_json:
        _echo_json(problems)
    else:
        click.echo("\n".join(map(str, problems)) or f"{store}: valid")
    if problems:
        raise click.exceptions.Exit(1)


@main.command()
@_LOCAL_STORE
@click.argument("url")
@_JSON
def push(store: Path, url: str, as_json: bool) -> None:
    """Upload STORE to URL in object storage: s3://, gs:// or az://.

    Run again to resume, or to update the annotation (semgen classes): what is already at URL is not
    sent again, and no other store is overwritten. Credentials come from the environment.
    STORE.catalogue is never uploaded.
    """
    from store.push import push

    done = push(store, url, progress=Terminal())
    _echo(
        done,
        ["semgen", "verify", done.url],
        ["semgen", "pretrain", done.url, "RUN"],
        as_json=as_json,
    )


@main.command()
@click.argument("here", type=LocalPath(), metavar="SCAN_A")
@click.argument("there", type=LocalPath(), metavar="SCAN_B")
@click.option(
    "--at",
    "places",
    type=POSITION,
    multiple=True,
    help="Position in SCAN_A in mm from its first voxel, such as 120,80.5,95; repeatable.",
)
@click.option(
    "--landmarks",
    type=FILE,
    help='JSON file with positions in SCAN_A by name: {"carina": [120, 80.5, 95]}.',
)
@click.option("--picture", type=LocalPath(dir_okay=False), help="PNG file with both scans.")
@_JSON
def match(
    here: Path,
    there: Path,
    places: Sequence[tuple[float, ...]],
    landmarks: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Find positions of SCAN_A in SCAN_B by the anatomy around them.

    Positions are z,y,x in mm, after turning the scan to LPS. A position that is found gets a score
    of at most 1, and the distance from the start after going there and back.
    """
    from pipeline.match_files import match_files, read_landmarks

    positions = read_landmarks(landmarks) if landmarks else {}
    positions |= {",".join(f"{v:g}" for v in place): place for place in places}
    if not positions:
        raise click.UsageError("give at least one position: --at, or --landmarks")
    matches = match_files(here, there, positions, picture=picture)
    if as_json:
        _echo_json(matches)
    else:
        click.echo("\n".join(map(str, matches)))


@main.command()
@_STORE
@_RUN
@_JSON
@options_from(TrainConfig, headings=TRAIN_HEADINGS)
def pretrain(store: str | Path, run: Path, config: TrainConfig, as_json: bool) -> None:
    """Pretrain a 3-D net on STORE into the folder RUN.

    RUN gets weights, metrics, pictures and TensorBoard events. Run again to resume: Ctrl-C and
    SIGTERM write a checkpoint. Excluded classes and members (semgen classes) are left out.

    Several GPUs: torchrun --nproc-per-node 8 --no-python semgen pretrain STORE RUN
    """
    from trainer import pretrain
    from trainer.messages import show_events

    summary = pretrain(store, run, config, on_event=show_events("pretrain", quiet=is_quiet()))
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one prints
        return
    _echo(
        summary,
        ["semgen", "export", run, "weights.safetensors"],
        ["tensorboard", "--logdir", run / "tensorboard"],
        as_json=as_json,
    )


@main.command()
@_RUN
@click.argument("file", type=LocalPath())
@click.option(
    "--format",
    type=click.Choice(["safetensors", "torch", "genesis", "nnunet", "nnssl"]),
    help='"genesis" is what the official Semantic and Models Genesis code loads, "nnunet" what'
    ' nnUNetv2_train -pretrained_weights loads, "nnssl" a folder as nnssl publishes it.  [default:'
    " by the suffix of FILE: .safetensors, .pt or .pth]",
)
@click.option(
    "--part",
    type=click.Choice(get_args(Part)),
    default="all",
    show_default=True,
    help='Part of the net: "backbone" is encoder and decoder, "unet" these and the layer that'
    " restores crops.",
)
@click.option(
    "--plans",
    type=FILE,
    help="With nnunet: plans of nnU-Net that the weights must fit, such as"
    " nnUNetResEncUNetLPlans.json.",
)
@click.option(
    "--configuration",
    default="3d_fullres",
    show_default=True,
    help="Configuration in --plans.",
)
@click.option(
    "--adapt",
    metavar="NAME",
    help="With --plans: write a copy of the plans with the net of the weights, NAME.json beside"
    " them, for nnUNetv2_train -p NAME.",
)
@click.option("--licence", help="With nnssl: licence of the weights, for the model card.")
@click.option(
    "--patch-size",
    type=Vector(int, 3, None),
    help="With nnssl: recommended patch size in voxels, z,y,x.  [default: that of the crops]",
)
def export(run: Path, file: Path, format: Any, part: Any, **options: Any) -> None:
    """Write the best weights of RUN to FILE.

    If the run has no validation after the warm-up yet, its latest weights are written. With
    --format nnssl, FILE is a folder.
    """
    from store.inspect import format_size
    from trainer import export_weights

    done = export_weights(run, file, format=format, part=part, **options)
    size = sum(found.stat().st_size for found in (file, *file.glob("*")) if found.is_file())
    click.echo(f"{file}: {done['part']} of {run} at step {done['step']}, {format_size(size)}")
    if name := options["adapt"]:
        configuration = options["configuration"]
        adapted = options["plans"].with_name(f"{name}.json")
        click.echo(
            f"{adapted}: plans with the net of the weights; next:\n"
            f"  nnUNetv2_preprocess -d ID -plans_name {name} -c {configuration}\n"
            f"  nnUNetv2_train ID {configuration} FOLD -p {name} -pretrained_weights {file}"
        )


@main.command()
@click.argument("task", type=LocalPath())
@_RUN
@click.option(
    "--cases",
    "cases_path",
    type=FOLDER,
    help="Folder for preprocessed cases, which runs can share.  [default: RUN/cases]",
)
@_FORCE
@_JSON
@options_from(FinetuneConfig, headings=FINETUNE_HEADINGS)
def finetune(task: Path, run: Path, config: FinetuneConfig, as_json: bool, **options: Any) -> None:
    """Fine-tune on your own labeled images, then test.

    Trains on TASK into the folder RUN. TASK is a folder in the layout of nnU-Net and the
    Medical Segmentation Decathlon (dataset.json, imagesTr, labelsTr), or a CSV file with a column
    image, either mask (to segment) or label (to classify), and optionally patient and split. Run
    again to resume.
    """
    from trainer.finetuning import finetune
    from trainer.messages import show_events

    on_event = show_events("finetune", quiet=is_quiet())
    summary = finetune(task, run, config, **options, on_event=on_event, progress=Terminal())
    source = "CENTRES.csv" if summary.places else "IMAGE"
    out = "OUT.nii.gz" if summary.segments else "OUT.csv"
    _echo(summary, ["semgen", "predict", run, source, out], as_json=as_json)


@main.command()
@_RUN
@click.argument("source", type=LocalPath(), metavar="INPUT")
@click.argument("out", type=LocalPath())
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help='PyTorch device; "auto" is a GPU if there is one.',
)
@click.option(
    "--channel",
    type=click.IntRange(0),
    help="Channel to use of images with several channels.  [default: as in training]",
)
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1, max_open=True),
    help="Overlap of the sliding windows.  [default: as in training]",
)
def predict(run: Path, source: Path, out: Path, **options: Any) -> None:
    """Predict on INPUT with a fine-tuned RUN.

    INPUT is an image, a DICOM folder or a folder of images. To segment, OUT is a mask (for a folder
    of images, a folder) with the geometry of the image; to classify, a CSV file with the
    probability of each class. For a RUN that classifies crops around given centres, INPUT is a CSV
    file with columns image, x_mm, y_mm, z_mm.
    """
    from trainer.finetuning import predict

    written = predict(run, source, out, **options, progress=Terminal())
    click.echo(f"{out}: {len(written)} file{'s' * (len(written) > 1)}")


@main.command()
@click.argument("kind", type=click.Choice(["ncc", "ncs", "lcs", "bms", "medmnist"]))
@click.argument("source", type=LocalPath(), metavar="DOWNLOAD")
@click.argument("out", type=FOLDER)
@click.option(
    "--negatives",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="ncc: non-nodule candidates kept per nodule; 0 keeps all.",
)
def task(kind: str, source: Path, out: Path, negatives: int) -> None:
    """Make a task from a public data set.

    DOWNLOAD is the data set as it was downloaded; OUT gets the task.

    \b
    ncc       lung nodule classification, from LUNA16
    ncs       lung nodule segmentation, from LIDC-IDRI
    lcs       liver segmentation, from LiTS
    bms       brain tumour segmentation, from BraTS (FLAIR)
    medmnist  classification, from a 3-D .npz file of MedMNIST v2
    """  # noqa: D301
    from trainer.finetuning.datasets import convert

    manifest = convert(kind, source, out, negatives=negatives, progress=Terminal())
    _echo(manifest, ["semgen", "finetune", manifest, "RUN"])


@main.command()
@click.argument("plan", type=LocalPath())
@click.argument("out", type=FOLDER)
@click.option(
    "--devices",
    default="auto",
    show_default=True,
    help="Devices, one process each, such as cuda:0,cuda:1; auto: as in the plan, else one.",
)
@_FORCE
@click.option(
    "--table",
    "table_only",
    is_flag=True,
    help="Do not train: only write tables and figures of the finished trials.",
)
@_JSON
def compare(
    plan: Path, out: Path, devices: str, force: bool, table_only: bool, as_json: bool
) -> None:
    """Compare starting points on tasks, with statistics.

    PLAN is a TOML file with the tasks and starting points. OUT gets results.jsonl, one line per
    trial, with tables and figures. Run again to resume; run on several machines at the same time to
    share the work.
    """
    from trainer.comparison import compare, read_results, write_figures, write_tables

    if table_only:
        results = read_results(out)
    else:
        results = compare(plan, out, devices=devices.split(","), force=force, progress=Terminal())
    if not results:
        raise click.ClickException(f"{out}: no trial has finished yet")
    written = [*write_tables(results, out), *write_figures(results, out)]
    if as_json:
        _echo_json(results)
        return
    click.echo(written[0].read_text("utf-8"))
    failed = [result for result in results if result.get("failed")]
    click.echo(
        f"{len(results)} trials in {out / 'results.jsonl'}, {len(failed)} of them failed;"
        f" wrote {', '.join(map(str, written))}"
    )
    if failed:
        first = failed[0]
        click.echo(
            f"First failure: {first['task']}, {first['start']}: {first['failed']}. To repeat a"
            f" failed trial, delete its line in {out / 'results.jsonl'} and run the same command;"
            " for other settings, give another OUT.",
            err=True,
        )


@main.group(cls=Group)
def config() -> None:
    """Show resolved settings and where each comes from, or write a settings file."""


class _ShowGroup(Group):
    """The command after `show` may also be a store or a run."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            return "recorded", _show_recorded, args
        return super().resolve_command(ctx, args)


@config.group(cls=_ShowGroup, subcommand_metavar="COMMAND|STORE|RUN [OPTIONS]")
def show() -> None:
    """Show resolved settings, and where each comes from, as TOML.

    Of a command with its options, or as recorded in a store or a run. Save the output to use it
    with --config.
    """


def _traced(kind: type) -> Callable[[Path | None, dict[str, Any]], Resolved]:
    """Read settings as the command does, and keep where each comes from."""

    def read(file: Path | None, options: dict[str, Any]) -> Resolved:
        given = {name: value for name, value in options.items() if value is not None}
        layers: dict[str, dict[str, Any]] = {}
        if kind is PrepareConfig:
            preset = given.pop("preset")
            values: Any = load_config(file, preset=preset, overrides=given)
            layers[f"preset {preset}"] = PRESETS[preset]
        else:
            values = load(kind, file, given)
        if file is not None:
            layers[file.name] = read_toml(file)
        for param in click.get_current_context().command.params:
            if param.name in given:
                value = given[param.name]
                names = param.secondary_opts if value is False else param.opts
                layers[f"option {max(names, key=len)}"] = {param.name: value}
        return resolve(values, layers)

    return read


def _echo_settings(settings: Resolved, as_json: bool) -> None:
    if as_json:
        _echo_json(settings.to_json())
    else:
        click.echo(settings)


@show.command("prepare")
@_JSON
@_PRESET
@options_from(PrepareConfig, _traced(PrepareConfig), headings=PREPARE_HEADINGS)
@_ONE_PER_STUDY
def _show_prepare(config: Resolved, as_json: bool) -> None:
    """Show the settings of `semgen prepare` with these options."""
    _echo_settings(config, as_json)


@show.command("pretrain")
@_JSON
@options_from(TrainConfig, _traced(TrainConfig), headings=TRAIN_HEADINGS)
def _show_pretrain(config: Resolved, as_json: bool) -> None:
    """Show the settings of `semgen pretrain` with these options."""
    _echo_settings(config, as_json)


@show.command("finetune")
@_JSON
@options_from(FinetuneConfig, _traced(FinetuneConfig), headings=FINETUNE_HEADINGS)
def _show_finetune(config: Resolved, as_json: bool) -> None:
    """Show the settings of `semgen finetune` with these options."""
    _echo_settings(config, as_json)


@click.command(cls=show.command_class)
@click.argument("made", type=STORE, metavar="STORE|RUN")
@_JSON
def _show_recorded(made: str | Path, as_json: bool) -> None:
    """Show the settings that are recorded in a store or a run."""
    from store import PatchStore
    from trainer.report.runs import read_run

    if isinstance(made, Path) and not made.exists():
        raise click.UsageError(f"{made}: give a store, a run, or one of {', '.join(_KINDS)}")
    file = made / "config.json" if isinstance(made, Path) else None
    if file is not None and file.is_file():  # a run
        values = read_run(file.parent).config
    else:
        values = PatchStore(made, allow_building=True).config
    _echo_settings(recorded(values), as_json)


@config.command("template")
@click.argument("command", type=click.Choice(list(_KINDS)))
def _template(command: str) -> None:
    """Print a settings file with all settings as comments, each with its description."""
    click.echo(template(_KINDS[command]))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands, options and files in your shell.

    \b
    bash: add to ~/.bashrc   eval "$(semgen completion bash)"
    zsh:  add to ~/.zshrc    eval "$(semgen completion zsh)"
    fish: type once          semgen completion fish > ~/.config/fish/completions/semgen.fish

    Then open a new shell. `semgen` must be on the PATH.
    """  # noqa: D301
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "semgen", "_SEMGEN_COMPLETE").source())


if __name__ == "__main__":
    main(prog_name="semgen")
