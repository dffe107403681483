"""The page of classes: one file, or parts that a server sends."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from store.atomic import replace_file
from store.classes import read_annotation
from store.errors import check_suffix
from store.progress import SILENT, Advance, Progress
from store.quality import load_quality
from store.reader import PatchStore
from store.report.facts import add_notes, describe_page
from store.report.pictures import Grey, encode_tiles
from store.report.sheets import (
    CARD_TILES,
    card_tiles,
    class_sheet,
    mean_crop,
    scan_sheet,
)
from store.report.shell import Shell, embed_json, embed_text, read_part, render_shell

CLASSES_PER_SHEET: Final = 25
_SCRIPTS: Final = (
    "pictures", "words", "order", "select", "wall", "members", "class", "member", "compare",
    "scans", "decisions", "curate", "main",
)  # fmt: skip


def write_report(store: PatchStore, out: Path, *, progress: Progress = SILENT) -> int:
    """Write the page, a file .html or .htm; returns its size in bytes.

    In memory are the crops of one class, and the pictures of all classes, at most some 15 MB: those
    of cards are written first, so that a browser shows them while it reads the rest.
    """
    check_suffix(out, ".html", ".htm")
    quality = load_quality(store, progress=progress)
    facts = describe_page(store, quality, classes_per_sheet=CLASSES_PER_SHEET)
    facts = add_notes(facts, read_annotation(store.location))
    shell = make_page("default-src 'none'; img-src data:")
    with (
        progress.stage("report", store.num_classes, "classes") as advance,
        replace_file(out) as partial,
        partial.open("w", encoding="utf-8") as page,
    ):
        page.write(shell.head + embed_json("data", facts))
        late: list[str] = []
        shown = [one["shown"] for one in facts["classes"]]
        for name, content in _sheets(store, shown, advance):
            element = embed_text(name, base64.b64encode(content).decode())
            if name.startswith("cards-"):
                page.write(element)
            else:
                late.append(element)
        page.write(shell.scripts)
        page.writelines(late)
        page.write(shell.tail)
    return out.stat().st_size


def make_page(sources: str, *, live: bool = False) -> Shell:
    """The page without its data; `sources` are those of its security policy.

    live
        A server sends the page: it may load the 3-D viewer from there.
    """
    names = [*_SCRIPTS[:-1], "viewer", _SCRIPTS[-1]] if live else _SCRIPTS
    return render_shell(
        "semgen: discovered classes",
        styles=[read_part("classes.css")],
        scripts=[read_part(f"{name}.js") for name in names],
        sources=sources,
        script_sources="'self'" if live else "",
    )


def _sheets(
    store: PatchStore, shown: Sequence[Sequence[int]], advance: Advance
) -> Iterator[tuple[str, bytes]]:
    """Pictures of the page by name; `shown` are the members of each class, by number."""
    cards: list[Grey] = []
    for label in range(store.num_classes):
        mean = mean_crop(store, label)
        yield f"class-{label}", class_sheet(store, label, mean, shown[label])
        cards += card_tiles(store, label, mean)
        if label + 1 == store.num_classes or (label + 1) % CLASSES_PER_SHEET == 0:
            yield f"cards-{label // CLASSES_PER_SHEET}", encode_tiles(cards, CARD_TILES)
            cards = []
        advance(1)
    yield "scans", scan_sheet(store)
