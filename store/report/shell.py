"""The shell of every page that semgen writes: one HTML file without anything from a network.

Scripts share one global scope and run in the order given; `base.js` and `base.css` come first.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from store.inspect import format_json


class Shell(NamedTuple):
    """A page in three parts. Between them stand elements of data, made by `embed_json`."""

    head: str
    """Until the data that the scripts need at once."""
    scripts: str
    """The scripts; what follows them is read while the page is already shown."""
    tail: str


def render_shell(
    title: str, *, styles: Sequence[str], scripts: Sequence[str], sources: str,
    script_sources: str = "",
) -> Shell:  # fmt: skip
    """Make the parts of a page.

    styles, scripts
        CSS and JavaScript, as text, in addition to base.css and base.js.
    sources
        Of the page's security policy, without styles and scripts.
    script_sources
        Where scripts may come from besides the page itself.
    """
    page = read_part("shell.html")
    for mark, text in (
        ("/*TITLE*/", html.escape(title)),
        ("/*SOURCES*/", sources),
        ("/*SCRIPT-SOURCES*/", f" {script_sources}" if script_sources else ""),
        ("/*STYLE*/", "\n".join([read_part("base.css"), *styles])),
        (
            "/*SCRIPTS*/",
            "\n".join(f"<script>\n{text}</script>" for text in [read_part("base.js"), *scripts]),
        ),
    ):
        page = page.replace(mark, text)
    head, rest = page.split("<!--DATA-->\n")
    scripts_part, tail = rest.split("<!--LATE-->\n")
    return Shell(head, scripts_part, tail)


@cache
def read_part(name: str, package: str = "store.report") -> str:
    """A file of the folder `page` of a package."""
    return (files(package) / "page" / name).read_text("utf-8")


def embed_json(name: str, content: Any) -> str:
    """An inert element with the id `name` that holds a value; `readData(name)` reads it."""
    text = format_json(content, compact=True).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def embed_text(name: str, text: str) -> str:
    """An inert element with the id `name` that holds base64 text."""
    return f'<script type="text/plain" id="{name}">{text}</script>\n'
