"""Collect what the page of runs shows, run by run, and write it."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from store import PatchStore, StoreError, read_annotation
from store.atomic import replace_file
from store.errors import check_suffix
from store.inspect import format_size
from store.progress import SILENT, Progress
from store.report.shell import embed_json, embed_text, read_part, render_shell
from trainer.comparison.results import RESULTS
from trainer.errors import TrainError
from trainer.report.compared import describe_comparison
from trainer.report.finetuned import describe_test, read_pictures
from trainer.report.measure import (
    CLASS_TILE,
    CLASS_TILES,
    COLUMNS,
    CROP_TILE,
    Measured,
    NotMeasured,
    measure,
)
from trainer.report.runs import Run, describe_run, label_runs, read_run
from trainer.samples import list_samples, read_sample

MOST_RUNS: Final = 8
_SCRIPTS: Final = (
    "charts.js", "words.js", "classes.js", "runs.js", "finetuned.js", "compared.js", "main.js",
)  # fmt: skip
_QUALITY = 85


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportSummary:
    """Result of `write_run_report`."""

    out: Path
    num_bytes: int
    letters: dict[str, Path]
    """Which run is called what on the page; it does not show their folders."""
    missing: tuple[str, ...]
    """What the page lacks, and why."""

    def __str__(self) -> str:
        """Lines of text, for a terminal."""
        head = f"{self.out}: {format_size(self.num_bytes)}; open it in a browser"
        named = [f"  {letter}  {folder}" for letter, folder in self.letters.items()]
        return "\n".join([head, *(named if len(named) > 1 else ()), *self.missing])


def write_run_report(
    sources: Sequence[Path],
    out: Path,
    *,
    stores: Sequence[PatchStore] = (),
    device: str = "auto",
    names: bool = False,
    progress: Progress = SILENT,
) -> ReportSummary:
    """Write the page of pretraining and fine-tuning runs, or of one comparison.

    sources
        Run directories, at most eight, or the folder of a comparison.
    stores
        The stores that the runs were trained on, for confusion of classes and features.
    names
        Show the names of run directories and of test cases. Without it, the page has none.

    Raises TrainError where a source is no run, or a store is of none of the runs; SemgenError where
    `out` does not end in .html or .htm.
    """
    check_suffix(out, ".html", ".htm")
    if any((source / RESULTS).is_file() for source in sources):
        if len(sources) > 1:
            raise TrainError("a comparison has a page of its own; give its folder alone")
        return _write(out, {"comparison": describe_comparison(sources[0])}, {}, {}, ())
    if len(sources) > MOST_RUNS:
        raise TrainError(f"{len(sources)} runs; a page shows at most {MOST_RUNS}, so name fewer")
    runs = [read_run(source) for source in sources]
    _check_stores(runs, stores)
    letters = dict(zip("ABCDEFGH", (run.folder for run in runs), strict=False))
    described, missing = [], []
    sheets: dict[str, bytes] = {}
    for letter, run, label in zip(letters, runs, label_runs(runs), strict=False):
        facts = {"letter": letter, "label": run.folder.name if names else label}
        facts |= describe_run(run) | {"samples": [], "classes": None, "test": None}
        sheets |= _add_samples(letter, run, facts)
        if run.is_finetuning:
            sheets |= _add_test(letter, run, facts, names=names)
        else:
            try:
                found = measure(run.folder, stores, device=device, progress=progress)
                sheets |= _add_classes(letter, run, found, facts, stores)
            except NotMeasured as reason:
                facts["notMeasured"] = str(reason)
                missing.append(f"  {letter}  without classes and features: {reason}")
        described.append(facts)
    return _write(out, {"runs": described}, sheets, letters, missing)


def _check_stores(runs: list[Run], stores: Sequence[PatchStore]) -> None:
    known = {run.fingerprint for run in runs}
    for store in stores:
        if store.fingerprint not in known:
            raise TrainError(
                f"{store.location}: no run of this page was trained on this store (fingerprint"
                f" {(store.fingerprint or '')[:12]}); give the store of the run"
            )


def _write(
    out: Path,
    content: dict[str, Any],
    sheets: dict[str, bytes],
    letters: dict[str, Path],
    missing: Sequence[str],
) -> ReportSummary:
    title = "semgen: comparison" if "comparison" in content else "semgen: runs"
    shell = render_shell(
        title,
        styles=[read_part("runs.css", "trainer.report")],
        scripts=[read_part(name, "trainer.report") for name in _SCRIPTS],
        sources="default-src 'none'; img-src data:",
    )
    with replace_file(out) as partial, partial.open("w", encoding="utf-8") as page:
        page.write(shell.head)
        page.write(embed_json("data", content))
        for name, picture in sheets.items():
            page.write(embed_text(name, base64.b64encode(picture).decode()))
        page.write(shell.scripts)
        page.write(shell.tail)
    return ReportSummary(
        out=out, num_bytes=out.stat().st_size, letters=letters, missing=tuple(missing)
    )


# Pictures: facts about them are added to `facts`, they themselves are returned by name


def _add_samples(letter: str, run: Run, facts: dict[str, Any]) -> dict[str, bytes]:
    sheets = {}
    for number, sample in enumerate(list_samples(run.folder)):
        captions, rows, picture = read_sample(sample.file)
        name = f"sample-{letter}-{number}"
        facts["samples"].append(
            {"step": sample.step, "captions": captions, "rows": rows, "sheet": name}
        )
        sheets[name] = _encode(picture)
    return sheets


def _add_test(letter: str, run: Run, facts: dict[str, Any], *, names: bool) -> dict[str, bytes]:
    test = describe_test(run.folder, names=names)
    if test is None:
        return {}
    facts["test"] = test
    pictures = read_pictures(run.folder, len(test["cases"]))
    test["pictures"] = [f"test-{letter}-{number}" for number in range(len(pictures))]
    encoded = (_encode(picture, lossless=True) for picture in pictures)  # outlines are thin
    return dict(zip(test["pictures"], encoded, strict=True))


def _add_classes(
    letter: str, run: Run, found: Measured, facts: dict[str, Any], stores: Sequence[PatchStore]
) -> dict[str, bytes]:
    store = next((store for store in stores if store.fingerprint == run.fingerprint), None)
    names = dict(_read_names(store)) if store else {}
    facts["classes"] = {
        **found.facts,
        "names": names,
        "crops": f"crops-{letter}",
        "pictures": f"classes-{letter}",
        "cropTile": [CROP_TILE, COLUMNS],
        "classTile": [CLASS_TILE, CLASS_TILES * 10, CLASS_TILES],
    }
    return {f"crops-{letter}": found.crops, f"classes-{letter}": found.classes}


def _read_names(store: PatchStore) -> Iterator[tuple[int, str]]:
    """Names of classes that have one."""
    try:
        notes = read_annotation(store.location).notes
    except StoreError:
        return
    for label, note in notes.items():
        if note.name:
            yield label, note.name


def _encode(picture: Image.Image, *, lossless: bool = False) -> bytes:
    content = io.BytesIO()
    rgb = picture.convert("RGB")
    rgb.save(content, "WEBP", quality=_QUALITY, method=4, lossless=lossless)
    return content.getvalue()
