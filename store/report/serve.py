"""Serve the page of discovered classes, with editing: `semgen browse`.

The URL contains an access token; a request without it is refused. No request names a file: classes
and rows are numbers that are checked against the store. A change names the values that it replaces,
and is refused if others are there by now.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import split_host_and_port
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from store.classes import AnnotationChanged, annotate, read_annotation
from store.decisions import Changes, apply_decisions, decisions_csv, decisions_json
from store.format import SPLITS, StoreError
from store.group import open_group, read_attribute
from store.quality import Quality
from store.reader import PatchStore
from store.report.build import make_page
from store.report.facts import add_notes, describe_page
from store.report.pictures import encode_tiles
from store.report.sheets import (
    CARD_TILES,
    card_tiles,
    crop_volume,
    mean_crop,
    mean_volume,
    member_volumes,
    scan_sheet,
)
from store.report.shell import embed_json
from store.report.volumes import crop_nifti, read_viewer, scan_nifti

LOOPBACK = "127.0.0.1"
_CACHED_SHEETS = 256
"""Sheets of pictures that are kept; volumes are kept by the browser."""
_MOST_BYTES = 2**22
"""Size of a request: the decisions on a large store."""


class ReportApp:
    """An open store, its quality, and the access token of the page.

    paths, rejected_files
        As for `describe_page`; for the owner of the archive.
    """

    def __init__(
        self,
        store: PatchStore,
        quality: list[Quality],
        *,
        any_host: bool,
        paths: Mapping[int, str] | None = None,
        rejected_files: Sequence[tuple[str, str, str]] | None = None,
    ) -> None:
        self.store, self.any_host = store, any_host
        self.facts = describe_page(
            store, quality, classes_per_sheet=1, live=True, paths=paths,
            rejected_files=rejected_files,
        )  # fmt: skip
        self.token = secrets.token_urlsafe(24)
        self.draw = lru_cache(_CACHED_SHEETS)(self._draw)

    def page(self) -> str:
        """The page with the present annotation."""
        facts = add_notes(self.facts, read_annotation(self.store.path))
        sources = "default-src 'none'; img-src 'self' data:; connect-src 'self'"
        shell = make_page(sources, live=True)
        return shell.head + embed_json("data", facts) + shell.scripts + shell.tail

    def notes(self) -> dict[int, dict[str, Any]]:
        """Annotated classes as the page reads them."""
        notes = read_annotation(self.store.path).notes
        return {label: asdict(note) for label, note in notes.items()}

    def _draw(self, kind: str, number: int) -> bytes:
        """A sheet of pictures; KeyError for one that does not exist."""
        if kind == "scans":
            return scan_sheet(self.store)
        if number >= self.store.num_classes:
            raise KeyError(number)
        return encode_tiles(
            card_tiles(self.store, number, mean_crop(self.store, number)), CARD_TILES
        )

    def volumes(self, label: int, part: str) -> bytes:
        """Volumes of some members of a class, or of its mean; KeyError where there are none."""
        if label >= self.store.num_classes:
            raise KeyError(label)
        if part == "mean":
            return mean_volume(self.store, label)
        return member_volumes(self.store, label, int(part))


class _Handler(RequestHandler):
    app: ReportApp

    def initialize(self, app: ReportApp) -> None:
        self.app = app

    def prepare(self) -> None:
        """Refuse requests without the token, or for another host name (DNS rebinding)."""
        host, _ = split_host_and_port(self.request.host)
        known = self.app.any_host or host in {LOOPBACK, "localhost"}
        token = self.path_args[0].encode()
        if not known or not hmac.compare_digest(token, self.app.token.encode()):
            raise HTTPError(403)

    def set_default_headers(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("X-Frame-Options", "DENY")

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        """Log errors of the server without the URL, which contains the token."""
        if not isinstance(error, HTTPError):
            logging.getLogger("tornado.application").error("fault", exc_info=(kind, error, trace))

    def write_error(self, status_code: int, **kwargs: object) -> None:
        self.set_header("Content-Type", "text/plain")
        self.finish(f"{status_code}: {self._reason}\n")


class _Page(_Handler):
    async def get(self, token: str) -> None:
        self.finish(await asyncio.to_thread(self.app.page))


class _Bytes(_Handler):
    """Pictures and volumes."""

    async def send(self, make: Callable[[], bytes], kind: str) -> None:
        try:
            content = await asyncio.to_thread(make)
        except KeyError as error:
            raise HTTPError(404) from error
        self.set_header("Content-Type", kind)
        self.finish(content)


class _Sheet(_Bytes):
    async def get(self, token: str, kind: str, number: str | None) -> None:
        await self.send(lambda: self.app.draw(kind, int(number or 0)), "image/webp")


class _Volumes(_Bytes):
    async def get(self, token: str, label: str, part: str) -> None:
        await self.send(lambda: self.app.volumes(int(label), part), "application/octet-stream")


class _Crop(_Bytes):
    async def get(self, token: str, split: str, row: str) -> None:
        await self.send(
            lambda: crop_volume(self.app.store, split, int(row)), "application/octet-stream"
        )


class _Nifti(_Bytes):
    async def get(self, token: str, part: str, number: str) -> None:
        def make() -> bytes:
            if part == "scan":
                return scan_nifti(self.app.store, int(number))
            return crop_nifti(self.app.store, part, int(number))

        await self.send(make, "application/octet-stream")


class _Viewer(_Bytes):
    """The library that shows volumes in 3-D."""

    async def get(self, token: str) -> None:
        await self.send(read_viewer, "text/javascript; charset=utf-8")


class _Saving(_Handler):
    """Requests that change the annotation; a refusal is told in one line."""

    async def save(self, change: Callable[[], object]) -> None:
        try:
            await asyncio.to_thread(self.refuse_other_store)
            await asyncio.to_thread(change)
        except AnnotationChanged as error:
            self.refuse(409, error)
        except StoreError as error:
            self.refuse(400, error)
        except OSError as error:
            self.refuse(403, f"the store cannot be written: {error.strerror}")
        else:
            self.finish(json.dumps(self.app.notes()))

    def refuse_other_store(self) -> None:
        """StoreError if another store was prepared at the path of the one that the page shows."""
        store = self.app.store
        if read_attribute(open_group(store.path))["fingerprint"] != store.fingerprint:
            raise StoreError("the store was prepared again; stop semgen browse and start it again")

    def refuse(self, status: int, reason: object) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(str(reason).removeprefix(f"{self.app.store.path}: "))


class _Annotation(_Saving):
    async def get(self, token: str) -> None:
        self.finish(json.dumps(await asyncio.to_thread(self.app.notes)))

    async def put(self, token: str) -> None:
        if self.request.headers.get("Content-Type") != "application/json":
            raise HTTPError(415)
        request = _read_request(self.request.body)
        if request is None:
            raise HTTPError(400)
        changes, was = request
        await self.save(lambda: annotate(self.app.store.path, changes, was=was))


class _Decisions(_Saving):
    async def get(self, token: str, kind: str) -> None:
        write = {"csv": decisions_csv, "json": decisions_json}[kind]
        text = await asyncio.to_thread(write, self.app.store)
        self.set_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.set_header("Content-Disposition", f"attachment; filename=decisions.{kind}")
        self.finish(text)

    async def put(self, token: str, kind: str) -> None:
        if self.request.headers.get("Content-Type") != "application/octet-stream":
            raise HTTPError(415)  # a form of another site cannot send this
        body = self.request.body
        await self.save(lambda: apply_decisions(self.app.store, body, where="the file"))


def _read_request(body: bytes) -> tuple[Changes, Changes] | None:
    """New values and those that they replace, unchecked; None if the request has another form."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict) or set(request) != {"changes", "was"}:
        return None
    changes, was = _read_changes(request["changes"]), _read_changes(request["was"])
    return None if changes is None or was is None else (changes, was)


def _read_changes(content: object) -> Changes | None:
    if not isinstance(content, dict):
        return None
    found: Changes = {}
    for label, change in content.items():
        if not (label.isascii() and label.isdecimal() and len(label) < 10):
            return None
        if not isinstance(change, dict):
            return None
        found[int(label)] = change
    return found


def make_application(app: ReportApp) -> Application:
    """The Tornado application."""
    shared = {"app": app}
    return Application(
        [
            (r"/([^/]+)/", _Page, shared),
            (r"/([^/]+)/sheet/(cards|scans)(?:-(\d{1,9}))?", _Sheet, shared),
            (r"/([^/]+)/volumes/(\d{1,9})-(mean|\d{1,9})", _Volumes, shared),
            (rf"/([^/]+)/crop/({'|'.join(SPLITS)})-(\d{{1,9}})", _Crop, shared),
            (rf"/([^/]+)/volume/(scan|{'|'.join(SPLITS)})-(\d{{1,9}})\.nii", _Nifti, shared),
            (r"/([^/]+)/niivue\.js", _Viewer, shared),
            (r"/([^/]+)/annotation", _Annotation, shared),
            (r"/([^/]+)/decisions\.(csv|json)", _Decisions, shared),
            (r"/(.*)", _Handler, shared),
        ]
    )  # fmt: skip


async def serve(
    store: PatchStore,
    quality: list[Quality],
    *,
    host: str = LOOPBACK,
    port: int = 0,
    paths: Mapping[int, str] | None = None,
    rejected_files: Sequence[tuple[str, str, str]] | None = None,
    on_start: Callable[[str], object],
    stop: Awaitable[object] | None = None,
) -> None:
    """Listen on `host` and `port` (0: any free one) until `stop`; `on_start` gets the URL.

    paths, rejected_files
        Shown to the owner of the archive; see `describe_page`.
    """
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)  # it would log the token
    app = ReportApp(
        store,
        quality,
        any_host=host not in {LOOPBACK, "localhost"},
        paths=paths,
        rejected_files=rejected_files,
    )
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:  # also for an unknown host
        raise StoreError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; give another --host"
            " or --port, or omit --port to use a free port"
        ) from error
    server = HTTPServer(make_application(app), max_body_size=_MOST_BYTES)
    server.add_sockets(sockets)
    try:
        name = f"[{host}]" if ":" in host else host
        on_start(f"http://{name}:{sockets[0].getsockname()[1]}/{app.token}/")
        await (stop or asyncio.Event().wait())
    finally:
        server.stop()
        await server.close_all_connections()
